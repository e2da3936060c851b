"""What a run says of itself: metrics.jsonl, TensorBoard, one progress line."""

from __future__ import annotations

import collections
import contextlib
import json
import math
import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import tqdm
from absl import logging
from etils import epath
from tensorboardX import summary
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import RecordWriter, directory_check

from coca_jax import chips
from coca_jax.config import printing
from coca_jax.data import addresses, side_files

METRICS_FILE = "metrics.jsonl"
_HELD_LINES = 100_000  # while they cannot be written; then the oldest go
_BOARD_SECONDS = 30.0  # between flushes of what TensorBoard reads
# What a clock says of a step. Everything else in the file is the run's own: a run that is made again has the same bits.
CLOCKS = (
    *("examples_per_second", "images_per_second_per_device", "model_tflops_per_device", "mfu"),
    "data_wait_seconds",
)


class Writer:
    """Metrics of one run: a JSON line a step in metrics.jsonl, and scalars for TensorBoard. Only process 0 writes.

    A run that goes on from an earlier step drops the lines after that step: each step stands in the file once. Where
    nothing can be written (a full disk, a storage that does not answer) the run goes on: that is said, lines are held
    until they can be written, and what was for TensorBoard meanwhile is left out.
    """

    def __init__(self, workdir: epath.Path, start_step: int, evaluated: bool = True) -> None:
        """
        Args:
          workdir: folder or bucket.
          start_step: that the run goes on after.
          evaluated: False where its evaluation is made again: what was written of it is dropped.
        """
        self._path, self._start_step, self._evaluated = addresses.path(workdir) / METRICS_FILE, start_step, evaluated
        self._writes = jax.process_index() == 0
        self._lines: collections.deque[str] = collections.deque(maxlen=_HELD_LINES)
        self._begun = False
        self._file: Any = None
        self._board = _Board(workdir / "tensorboard", start_step)
        self._file_attempts, self._board_attempts = _Attempts(self._path), _Attempts(workdir / "tensorboard")
        if self._writes:
            self._file_attempts.make(self._append)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Adds scalars of a step. Not-a-number is written as null, which is JSON."""
        if not self._writes:
            return
        values = {name: float(value) for name, value in metrics.items()}
        line = {"step": step} | {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._lines.append(json.dumps(line) + "\n")
        self._file_attempts.make(self._append)
        self._board_attempts.make(lambda: self._board.write(step, values))

    def _append(self) -> None:
        """Writes the lines that are held, all or none."""
        if not self._begun:
            keep_until(self._path, self._start_step, self._evaluated)
            self._begun = True
        if not self._lines:
            return
        size = self._path.stat().length if self._path.exists() else 0
        try:
            if not self._file:
                side_files.make_room(self._path)
                self._file = self._path.open("a")
            self._file.write("".join(self._lines))
            self._file.flush()
        except Exception:
            file, self._file = self._file, None
            with contextlib.suppress(Exception):
                file.close()
            with contextlib.suppress(Exception):  # of a bucket, where nothing was added
                os.truncate(self._path, size)
            raise
        self._lines.clear()

    def close(self) -> None:
        if not self._writes:
            return
        self._file_attempts.make(self._append, now=True)
        with contextlib.suppress(Exception):
            if self._file:
                self._file.close()
        self._board_attempts.make(self._board.close, now=True)


class _Attempts:
    """Writing what a run can do without: a failure is said, not raised, and for a while nothing more is tried."""

    def __init__(self, what: epath.Path) -> None:
        self._what, self._pause, self._retry_at = what, 0.0, 0.0

    def make(self, write: Callable[[], None], now: bool = False) -> None:
        if not now and time.monotonic() < self._retry_at:
            return
        try:
            write()
        except Exception as error:  # OSError, and what libraries for buckets raise
            self._pause = min(max(2 * self._pause, 1.0), 300.0)
            self._retry_at = time.monotonic() + self._pause
            logging.warning("%s cannot be written (%s): the run goes on", self._what, printing.one_line(error))
        else:
            if self._pause:
                logging.warning("%s is written again", self._what)
            self._pause = 0.0


class _Board:
    """Scalars for TensorBoard. After a failure they go into another file: what is after a half-written record is lost.

    tensorboardX's SummaryWriter writes in a thread, which dies of the first error, and then blocks who calls it.
    """

    def __init__(self, folder: epath.Path, start_step: int) -> None:
        self._folder, self._start_step, self._files = str(folder), start_step, 0
        self._events: RecordWriter | None = None
        self._flushed = time.monotonic()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        try:
            if self._events is None:
                side_files.make_room(addresses.path(self._folder), folder=True)
                directory_check(self._folder)
                self._files += 1
                name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{self._files}"
                self._events = RecordWriter(os.path.join(self._folder, name))
                self._add(event_pb2.Event(file_version="brain.Event:2"))
                # TensorBoard forgets what earlier files have from this step on.
                begins = step if self._files > 1 else self._start_step + 1
                start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
                self._add(event_pb2.Event(step=begins, session_log=start))
            for name, value in values.items():
                self._add(event_pb2.Event(step=step, summary=summary.scalar(name, value)))
            if time.monotonic() > self._flushed + _BOARD_SECONDS:
                self._events.flush()
                self._flushed = time.monotonic()
        except Exception:
            events, self._events = self._events, None
            with contextlib.suppress(Exception):
                if events:
                    events.close()
            raise

    def _add(self, event: Any) -> None:
        event.wall_time = time.time()
        assert self._events
        self._events.write(event.SerializeToString())

    def close(self) -> None:
        if self._events:
            self._events.close()


def read_lines(path: epath.Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; those that cannot be read are left out. Raises Unreadable."""
    return side_files.read_lines(path, _with_step).objects


def keep_until(path: epath.Path, step: int, evaluated: bool = True) -> None:
    """Drops the lines of later steps from a file of JSON lines with a step each; makes it where it is not there.

    With `evaluated` False also the evaluation's of that step, which have no loss of training. A file with lines that
    cannot be read is set aside first. Raises OSError.
    """
    kept = [line for line in side_files.take_lines(path, _with_step) if line["step"] <= step]
    kept = [line for line in kept if evaluated or line["step"] < step or "loss" in line]
    side_files.write_lines(path, kept)


def _with_step(line: dict[str, Any]) -> dict[str, Any] | None:
    return line if isinstance(line.get("step"), int) else None


class Progress:
    """The progress line: step, losses, accuracy in the batch, examples/s, TFLOP/s and MFU, time left."""

    def __init__(self, start_step: int, steps: int, batch_size: int, step_flops: float) -> None:
        """
        Args:
          start_step, steps: the step that the run goes on after, and its last.
          batch_size: of the whole job.
          step_flops: model FLOPs of one step of the whole job (model/flops.py).
        """
        self._bar = tqdm.tqdm(
            initial=start_step,
            total=steps,
            unit="step",
            desc="train",
            mininterval=1.0,
            dynamic_ncols=True,
            disable=jax.process_index() != 0,
        )
        self._batch_size, self._step_flops = batch_size, step_flops
        self._devices, self._chip = jax.device_count(), chips.from_device_kind(jax.devices()[0].device_kind)
        self._rate = Rate(start_step)

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._rate.update(step)
        shown = {
            "loss": metrics.get("loss"),
            "con": metrics.get("loss/contrastive"),
            "cap": metrics.get("loss/captioning"),
            "acc": metrics.get("accuracy/image_to_text"),
        }
        parts = [f"{name} {float(value):.3f}" for name, value in shown.items() if value is not None]
        rates = self.rates
        parts.append(f"{rates['examples_per_second']:.0f} examples/s")
        if rates["examples_per_second"]:
            if self._devices > 1:
                parts.append(f"{rates['images_per_second_per_device']:.3g} images/s/device")
            parts.append(f"{rates['model_tflops_per_device']:.3g} TFLOP/s/device")
        if "mfu" in rates:
            parts.append(f"MFU {rates['mfu']:.1%}")
        self._bar.set_postfix_str(", ".join(parts), refresh=False)
        self._bar.update(step - self._bar.n)

    @property
    def rates(self) -> dict[str, float]:
        """Of the last few seconds of training, evaluations and saves left out.

        `examples_per_second` of the whole job; once it is known, `images_per_second_per_device`,
        `model_tflops_per_device` (10^12 model FLOPs a second), and on chips of the table in chips.py `mfu`: the share
        of the chip's dense bfloat16 peak, whatever the model computes in.
        """
        steps = self._rate.steps_per_second
        rates = {"examples_per_second": steps * self._batch_size}
        if steps:
            tflops = steps * self._step_flops / self._devices / 1e12
            rates["images_per_second_per_device"] = steps * self._batch_size / self._devices
            rates["model_tflops_per_device"] = tflops
            if self._chip:
                rates["mfu"] = tflops / self._chip.peak_tflops
        return rates

    @property
    def seconds_per_step(self) -> float:
        """The median of recent steps; 0 while there is none."""
        return self._rate.seconds_per_step

    def pause(self) -> None:
        """Before something that is not a step: its time is not training time."""
        self._rate.pause()

    def say(self, text: str) -> None:
        """A line above the bar."""
        if jax.process_index() == 0:
            self._bar.write(text)

    def close(self) -> None:
        self._bar.close()


class Rate:
    """Steps per second, the median of recent steps: one slow step (a compilation, a save) does not bend it."""

    def __init__(self, step: int) -> None:
        self._step, self._last = step, time.monotonic()
        self._times: list[float] = []
        self._paused = True  # the first step compiles

    def update(self, step: int) -> None:
        now = time.monotonic()
        if step > self._step and not self._paused:
            self._times = [*self._times[-63:], (now - self._last) / (step - self._step)]
        self._step, self._last, self._paused = step, now, False

    def pause(self) -> None:
        self._paused = True

    @property
    def seconds_per_step(self) -> float:
        return max(float(np.median(self._times)), 1e-9) if self._times else 0.0

    @property
    def steps_per_second(self) -> float:
        return 1.0 / self.seconds_per_step if self._times else 0.0
