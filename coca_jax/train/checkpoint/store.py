"""The checkpoints of a workdir: saved asynchronously through Orbax, read back, verified on restore, never lost."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from coca_jax import config, peers
from coca_jax.data.addresses import remedy
from coca_jax.distributed import gather, is_first
from coca_jax.train.checkpoint import digest, manifest, read, tree, verify
from coca_jax.train.checkpoint.folder import Folder
from coca_jax.train.checkpoint.manifest import Leaf
from coca_jax.train.checkpoint.paths import FOLDER, CheckpointError, one_line, workdir_at
from coca_jax.train.state import Parameters, TrainState

# Seconds.
GIVE_UP = 1200  # after which a save that is still being written counts as failed
PATIENCE = 60.0  # that training waits for the save before
AT_THE_END = 120.0  # that the last save of a run is tried again
FIRST_RETRY, LAST_RETRY = 5.0, 300.0  # after a save that failed; doubled each time


@dataclasses.dataclass
class _Save:
    """One that was asked for: what, since when, and what came of it (None: not known yet; empty: it is whole)."""

    step: int
    content: dict[str, Any]
    leaves: dict[str, Leaf]
    metrics: dict[str, float] | None
    started: float = dataclasses.field(default_factory=time.monotonic)
    thread: threading.Thread | None = None
    problem: str | None = None


@dataclasses.dataclass(frozen=True)
class _Failure:
    """A save that failed: why, how many did in a row, and when it is tried again."""

    step: int
    problem: str
    times: int
    retry_at: float


class Checkpoints:
    """The checkpoints of one workdir.

    A save returns once the arrays are copied to the host and their digests are known; writing goes on behind. A step
    becomes visible at once (by a rename; in a bucket by a marker) when everything in it is written, its manifest too: a
    killed save leaves a temporary folder, which the next start removes. Then the step is read back. Only when that gave
    what was to be saved are older ones removed, and never the newest one that is known to be good.

    A save that fails does not end the run: it is said, and tried again (`due`). All processes call the same methods at
    the same steps, and decide alike.
    """

    def __init__(self, workdir: epath.PathLike, c: config.Checkpoint | None = None, best: str = "") -> None:
        """
        Args:
          workdir: local path or bucket.
          c: how many to keep; None opens the folder for reading alone: nothing in it is changed.
          best: name of the metric that keep_best goes by; less is better for losses and ranks.

        Raises:
          CheckpointError: see `workdir_at`.
        """
        self.folder = workdir_at(workdir) / FOLDER
        self._steps = Folder(self.folder, c, best)
        self._writes = c is not None
        self._save: _Save | None = None  # in flight
        self._last: tuple[TrainState, dict[str, Any], dict[str, float] | None] | None = None
        self._failure: _Failure | None = None
        self._poll_at, self._poll_every = 0, 1
        self._removals: ThreadPoolExecutor | None = None
        self._checkpointer: ocp.AsyncCheckpointer | None = None
        if self._writes and is_first():
            self._steps.begin()

    def latest(self) -> int | None:
        """The newest whole step, or None."""
        return max(self._steps.all(), default=None)

    def _newest(self) -> str:
        """The same in words, whatever the storage answers."""
        try:
            newest = self.latest()
        except OSError as error:
            return f"not known ({one_line(error)})"
        return "none" if newest is None else f"step {newest}"

    # -----------------------------------------------------------------------------------------------------------------
    # Saving

    def save(
        self,
        state: TrainState,
        place: dict[str, Any],
        identity: dict[str, Any],
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Starts a save of the state with its place in the data; does nothing where that step is saved already.

        With several processes all call it at the same step, and all write into one folder. What goes wrong is said and
        not raised.

        Args:
          state: real.
          place: in the data, in plain values: `position` of the first example of its stream that the state has not
            seen, over all processes, and what else belongs to it.
          identity: what must not change between save and resume (the data's fingerprint, the seed).
          metrics: of an evaluation at this step, for keep_best.
        """
        self._start(state, place | identity, {k: float(v) for k, v in metrics.items()} if metrics else None)

    def was_evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """Keeps with a step what an evaluation gave that was made after it was saved. What goes wrong is said."""
        if is_first():
            self._steps.was_evaluated(step, {k: float(v) for k, v in metrics.items()})

    def _start(self, state: TrainState, content: dict[str, Any], metrics: dict[str, float] | None) -> None:
        self._settle(PATIENCE)
        self._last = (state, content, metrics)  # whose arrays live until the next step takes them
        self._write(int(state.step), tree.raw_key(state), content, metrics)

    def _write(
        self, step: int, tree_: dict[str, Any], content: dict[str, Any], metrics: dict[str, float] | None = None
    ) -> None:
        if self._save:
            seconds = time.monotonic() - self._save.started
            self._failed(step, f"step {self._save.step} is still being written after {seconds:.0f} s")
            return
        here: dict[str, Any] = {"sums": digest.of_process(tree_), "saved": False, "problem": ""}
        if is_first():
            here["saved"], here["problem"] = self._steps.prepare(step)
        everyone = gather(here)
        if everyone[0]["saved"]:
            return
        if everyone[0]["problem"]:
            self._failed(step, everyone[0]["problem"])
            return
        leaves = _leaves(tree_, digest.combined(one["sums"] for one in everyone))
        self._save = save = _Save(step, content, leaves, metrics)
        try:
            self._orbax().save(
                self.folder / str(step),
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(tree_),
                    data=ocp.args.JsonSave(content | {"format": manifest.FORMAT}),
                    **({"metrics": ocp.args.JsonSave(metrics)} if metrics else {}),
                ),
            )
        except Exception as error:  # of many kinds: the storage's, tensorstore's, Orbax's
            save.problem = one_line(error)
        else:
            save.thread = threading.Thread(target=self._complete, args=(save,), name="read back", daemon=True)
            save.thread.start()
        self._poll_at, self._poll_every = step + 1, 1

    def _orbax(self) -> ocp.AsyncCheckpointer:
        if self._checkpointer is None:
            self._checkpointer = ocp.AsyncCheckpointer(
                ocp.CompositeCheckpointHandler(
                    state=ocp.StandardCheckpointHandler(),
                    data=ocp.JsonCheckpointHandler(),
                    metrics=ocp.JsonCheckpointHandler(filename="metrics"),
                ),
                async_options=ocp.AsyncOptions(timeout_secs=GIVE_UP, post_finalization_callback=self._write_manifest),
            )
        return self._checkpointer

    def _write_manifest(self) -> None:
        """In Orbax's thread of the first process, before the step appears."""
        assert self._save
        manifest.write(self._steps.unfinished(self._save.step), self._save.step, self._save.leaves)

    def _complete(self, save: _Save) -> None:
        """In a thread of its own: waits until a step has appeared, and reads this process's share of it back."""
        try:
            self._orbax().wait_until_finished()
            folder = self.folder / str(save.step)
            deadline = time.monotonic() + 30  # a network folder may show it late
            while not folder.exists() and time.monotonic() < deadline:
                time.sleep(0.5)
            mine = list(save.leaves)[jax.process_index() :: jax.process_count()]
            wrong = list(verify.check_leaves(folder, {path: save.leaves[path] for path in mine}))
            save.problem = "; ".join(wrong[:4])
        except BaseException as error:
            save.problem = one_line(error)

    def _settle(self, patience: float) -> None:
        """Waits so long for the save in flight, and where it has ended everywhere, draws the conclusions."""
        save = self._save
        if save is None:
            return
        if save.thread:
            save.thread.join(patience)
        everyone = gather(save.problem)
        if None in everyone:
            return
        self._save = None
        if problem := next((one for one in everyone if one), ""):
            if is_first():
                self._steps.set_aside(save.step, problem)
            self._failed(save.step, problem)
            return
        self._steps.is_good(save.step, save.metrics)
        peers.newest_checkpoint = save.step
        if self._failure and self._failure.step > save.step:  # one that could not wait for this one: now it can
            self._failure = dataclasses.replace(self._failure, retry_at=0.0)
        else:
            if self._failure and is_first():
                logging.warning("step %d is saved: %s has checkpoints again", save.step, self.folder)
            self._failure = self._last = None
        if is_first():
            self._remover().submit(self._steps.remove_old)

    def _remover(self) -> ThreadPoolExecutor:
        if self._removals is None:
            self._removals = ThreadPoolExecutor(1, "remove old checkpoints")
        return self._removals

    def _failed(self, step: int, problem: str) -> None:
        times = self._failure.times + 1 if self._failure else 1
        wait = min(FIRST_RETRY * 2 ** (times - 1), LAST_RETRY)
        self._failure = _Failure(step, problem, times, time.monotonic() + wait)
        if is_first():
            self._say_failure(wait)

    def _say_failure(self, wait: float) -> None:
        assert self._failure
        logging.warning(
            "step %d is NOT saved (%s); the newest checkpoint is %s; trying again in %.0f s",
            *(self._failure.step, self._failure.problem, self._newest(), wait),
        )

    def due(self, step: int) -> bool:
        """Whether to save after this step though none is planned: the one before has failed, and a while has passed.

        To be called after every step. With several processes they look at it together 1, 2, 4, ... 64 steps apart.
        """
        if not self._save and not self._failure:
            return False
        if jax.process_count() > 1:
            if step < self._poll_at:
                return False
            self._poll_every = min(2 * self._poll_every, 64)
            self._poll_at = step + self._poll_every
        self._settle(0)
        return bool(gather(not self._save and self._failure and time.monotonic() >= self._failure.retry_at)[0])

    def wait(self, patience: float = AT_THE_END) -> None:
        """Until the save that was started last is whole and read back. One that failed is tried again.

        Args:
          patience: seconds for which it is tried again.

        Raises:
          CheckpointError: it could not be saved; says why, and what there is.
        """
        deadline, pause = time.monotonic() + patience, 1.0
        while True:
            self._settle(GIVE_UP)
            if not self._failure:
                break
            going_on = gather(time.monotonic() + pause < deadline)[0] and not self._save
            if not going_on or self._last is None or _is_gone(self._last[0]):
                problem, newest = self._failure.problem, self._newest()
                then = f"the run goes on from its newest checkpoint ({newest})"
                then = "no checkpoint is seen there now" if newest == "none" else then
                raise CheckpointError(
                    f"step {self._failure.step} could not be saved in {self.folder} within {patience:g} s ({problem}): "
                    f"{remedy(problem)}, and start again: {then}"
                )
            time.sleep(pause)
            pause = min(2 * pause, 15.0)
            self._start(*self._last)
        if self._removals:
            self._removals.submit(lambda: None).result()

    def close(self) -> None:
        """Waits for what was started, but no longer than PATIENCE, and raises nothing."""
        if save := self._save:
            if save.thread:
                save.thread.join(PATIENCE)
            if save.problem != "":
                logging.warning("step %d is NOT saved (%s)", save.step, save.problem or "it is still being written")
        if self._removals:
            self._removals.shutdown()
        if self._checkpointer and (self._save is None or self._save.problem is not None):
            try:
                self._checkpointer.close()
            except Exception as error:
                logging.warning("%s: %s", self.folder, one_line(error))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    # -----------------------------------------------------------------------------------------------------------------
    # Restoring

    def restore(self, abstract: TrainState, identity: dict[str, Any]) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest good state and its place in the data, or None where there never was a checkpoint.

        Neither depends on how many processes or devices saved it. Every leaf is compared with the manifest; a step that
        is damaged is renamed, and the one before is taken.

        Args:
          abstract: shapes, dtypes and shardings of the state, of this run's mesh.
          identity: must equal the one saved.

        Raises:
          CheckpointError: the data has changed, a leaf is missing, unknown or misshapen, or no step is whole.
        """

        def restored(folder: epath.Path) -> tuple[TrainState, dict[str, Any]]:
            return read.state(folder, abstract, identity)

        return self._newest_good(restored, None)

    def restore_parameters(self, abstract: Parameters, step: int | None = None) -> tuple[Parameters, int]:
        """The parameters alone (the moving average where there is one), and their step.

        Every leaf is compared with the manifest.

        Args:
          abstract: shapes, dtypes and, if wanted, shardings. A learned position embedding may have another grid here:
            it comes as saved.
          step: None for the newest good one.

        Raises:
          CheckpointError: there is no such step, it is damaged, or a leaf is missing, unknown or misshapen.
        """
        found = self._newest_good(lambda folder: (read.parameters(folder, abstract), int(folder.name)), step)
        if found is None:
            raise CheckpointError(f"{self.folder} holds no checkpoint{'' if step is None else f' of step {step}'}")
        return found

    def _newest_good(self, restored: Callable[[epath.Path], Any], wanted: int | None) -> Any:
        # The first process decides: what another sees of a shared folder may be a moment old.
        steps, aside = gather([sorted(self._steps.all(), reverse=True), self._steps.aside()])[0]
        for step in steps if wanted is None else [step for step in steps if step == wanted]:
            folder = self.folder / str(step)
            try:
                found = restored(folder)
            except manifest.Damaged as damage:  # in all processes alike
                if wanted is not None:
                    raise CheckpointError(f"{folder} is damaged: {damage}: take another step, or a copy") from damage
                if is_first():
                    where = self._steps.set_aside(step, str(damage)) if self._writes else None
                    moved = f"; moved to {where}" if where else ""
                    logging.warning("%s is damaged, and is not used%s: %s", folder, moved, damage)
                continue
            self._steps.is_good(step)
            return found
        if (steps and wanted is None) or (aside and not steps):
            raise CheckpointError(
                f"{self.folder} holds no whole checkpoint any more: put a copy of one there, or, to begin anew, start "
                "in another --workdir"
            )
        return None


def _leaves(saved: dict[str, Any], sums: digest.Sums) -> dict[str, Leaf]:
    leaves = {}
    for path, leaf in tree.by_path(saved).items():
        values = sums[path]
        same = len(set(values.values())) == 1
        if not same and is_first():
            logging.warning("%s is not equal on all devices that hold it: its digest is left out", path)
        leaves[path] = Leaf(tuple(leaf.shape), str(leaf.dtype), digest.text(values[0]) if same else None)
    return leaves


def _is_gone(state: TrainState) -> bool:
    return any(leaf.is_deleted() for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array))
