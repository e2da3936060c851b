"""A trace of some steps for a profiler's viewer; docs/profiling.md says how to open it."""

from __future__ import annotations

import importlib.util
import pathlib
import re
import tempfile
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import jax
from absl import logging
from etils import epath

from coca_jax.config import ConfigError

FOLDER = "profile"


class Steps(NamedTuple):
    """The first and the last step that are traced, counted from 1 as on the progress line."""

    first: int
    last: int


def read_steps(text: str, steps: int) -> Steps | None:
    """The steps of `--profile=start:stop`; None of an empty text.

    Args:
      text: both steps are traced, and those between them.
      steps: of the whole run.

    Raises:
      ConfigError: it is not two numbers in order, or they are not steps of the run.
    """
    if not text:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if not found or not 1 <= int(found.group(1)) <= int(found.group(2)):
        raise ConfigError(f"--profile={text} is not start:stop, the first and the last step to trace; e.g. 20:24")
    if int(found.group(2)) > steps:
        raise ConfigError(
            f"--profile={text} goes beyond the run, which ends at config.steps={steps}: name earlier steps"
        )
    return Steps(int(found.group(1)), int(found.group(2)))


def check_profiler() -> None:
    """To be called before a trace is started, where an error still can be said.

    Raises:
      ConfigError: libtpu is installed, but there is no TPU: its part of JAX's profiler then ends the process (seen
        with libtpu 0.0.52 and jax 0.10.2).
    """
    settings: Any = jax.config
    if jax.default_backend() == "cpu" and not settings.jax_platforms and importlib.util.find_spec("libtpu"):
        raise ConfigError(
            "--profile: libtpu is installed, but JAX found no TPU, and libtpu's profiler would end the process: "
            "set JAX_PLATFORMS=cpu in the environment to trace this processor"
        )


class Profile:
    """Traces the steps asked for into `workdir/profile`, from the first process; does nothing where none were."""

    def __init__(self, workdir: epath.Path, steps: Steps | None, start_step: int) -> None:
        """
        Args:
          workdir: folder or bucket.
          steps: to trace.
          start_step: after which the run goes on; steps up to it are not made again.

        Raises:
          ConfigError: as `check_profiler`.
        """
        if steps:
            check_profiler()
        self._folder = workdir / FOLDER
        self._steps = steps if jax.process_index() == 0 else None
        self._local: tempfile.TemporaryDirectory[str] | None = None
        if self._steps and self._steps.first <= start_step:
            logging.warning("--profile: step %d is past, the run goes on after %d", self._steps.first, start_step)
            self._steps = None

    def step(self, step: int) -> AbstractContextManager[Any]:
        """Around the dispatch of a step: starts the trace where it is the first one, and names the step in it."""
        if self._steps and step == self._steps.first:
            # Written here first: the profiler writes to local files alone, and the workdir may be a bucket.
            self._local = tempfile.TemporaryDirectory()
            jax.profiler.start_trace(self._local.name)
        return nullcontext() if self._local is None else jax.profiler.StepTraceAnnotation("train", step_num=step)

    def after(self, step: int, outputs: Any) -> bool:
        """To be called after a step was dispatched, with arrays that are ready when it is done.

        Returns:
          Whether it waited for the device and wrote: that time is not training time.
        """
        if self._local is None or not self._steps or step < self._steps.last:
            return False
        jax.block_until_ready(outputs)
        self._write()
        return True

    def close(self) -> None:
        """Keeps what was traced of a run that ends before the last step."""
        if self._local is not None:
            self._write()

    def _write(self) -> None:
        local, self._local = self._local, None
        assert local is not None
        with local as folder:
            jax.profiler.stop_trace()
            for file in pathlib.Path(folder).rglob("*"):
                if not file.is_dir():
                    target = self._folder / file.relative_to(folder)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(file.read_bytes())
        logging.info("profile written to %s", self._folder)
