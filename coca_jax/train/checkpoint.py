"""Checkpoints: parameters, optimiser, step, PRNG key and data position together, through Orbax, asynchronously."""

from __future__ import annotations

import json
import os
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from coca_jax import config
from coca_jax.config import ConfigError
from coca_jax.data.mixture import read_spec
from coca_jax.sharding import path_of
from coca_jax.train.state import Parameters, TrainState

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.model"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used. The message names the folder, the leaf and the fix."""


def absolute(workdir: epath.PathLike) -> epath.Path:
    """The path of a workdir as Orbax needs it: from the root of a file system, or a bucket's."""
    text = os.fspath(workdir)
    return epath.Path(text if "://" in text else os.path.abspath(os.path.expanduser(text)))


class Checkpoints:
    """The checkpoints of one workdir.

    Saves return once the arrays are copied to the host; writing goes on behind. A step becomes visible by a rename,
    after everything in it is written: a killed save leaves a temporary folder, which the next start removes.
    """

    def __init__(self, workdir: epath.PathLike, c: config.Checkpoint | None = None, best: str = "") -> None:
        """
        Args:
          workdir: local path or bucket.
          c: how many to keep; None opens the folder for reading alone.
          best: name of the metric that keep_best goes by; less is better for losses and ranks.
        """
        self.folder = absolute(workdir) / "checkpoints"
        keep: list[Any] = [policies.LatestN(c.keep)] if c else []
        if c and c.keep_best and best:
            keep.append(
                policies.BestN(
                    get_metric_fn=lambda metrics: metrics[best],
                    reverse=any(word in best for word in ("loss", "rank", "perplexity")),
                    n=c.keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                create=c is not None,
                cleanup_tmp_directories=c is not None,
                preservation_policy=policies.AnyPreservationPolicy(keep) if keep else None,
            ),
            item_names=("state", "data"),
            item_handlers={"state": ocp.StandardCheckpointHandler(), "data": ocp.JsonCheckpointHandler()},
        )

    def latest(self) -> int | None:
        """The newest whole step, or None."""
        return self._manager.latest_step()

    def save(
        self,
        state: TrainState,
        place: dict[str, Any],
        identity: dict[str, Any],
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Starts a save of the state with its place in the data; does nothing where that step is saved already.

        With several processes all call it at the same step, and all write into one folder.

        Args:
          state: real.
          place: in the data, in plain values: `position` of the first example of its stream that the state has not
            seen, over all processes, and what else belongs to it.
          identity: what must not change between save and resume (the data's fingerprint, the seed).
          metrics: of an evaluation at this step, for keep_best.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_raw_key(state)),
                data=ocp.args.JsonSave(place | identity),
            ),
            metrics={k: float(v) for k, v in metrics.items()} if metrics else None,
        )

    def restore(self, abstract: TrainState, identity: dict[str, Any]) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest state and its place in the data, or None where there is no checkpoint.

        Neither depends on how many processes or devices saved it.

        Args:
          abstract: shapes, dtypes and shardings of the state, of this run's mesh.
          identity: must equal the one saved.

        Raises:
          CheckpointError: the data has changed, or a leaf is missing, unknown or misshapen.
        """
        latest = self.latest()
        # The first process decides: what another sees of a shared folder may be a moment old.
        step = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if latest is None else latest)))
        if step < 0:
            return None
        folder = self.folder / str(step)
        if (folder / "identity").exists():
            raise CheckpointError(
                f"{folder}: its place in the data was saved by an earlier coca_jax, process by process: finish the run "
                "with the version that began it, or start in another --workdir (its parameters can still be loaded)"
            )
        saved = self._manager.restore(step, args=ocp.args.Composite(data=ocp.args.JsonRestore())).data
        for key, value in json.loads(json.dumps(identity)).items():
            if saved.get(key) != value:
                raise CheckpointError(
                    f"{folder}: {key} was {saved.get(key)!r} when it was saved and is {value!r} now, "
                    "so the data cannot go on where it stopped: put it back, or start in another --workdir"
                )
        self._check(step, abstract)
        restored = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(_raw_key(abstract)))
        )
        return _typed_key(restored.state), {key: value for key, value in saved.items() if key not in identity}

    def restore_parameters(self, abstract: Parameters, step: int | None = None) -> tuple[Parameters, int]:
        """The parameters alone (the moving average where there is one), and their step.

        Args:
          abstract: shapes, dtypes and, if wanted, shardings. A learned position embedding may have another grid here:
            it comes as saved.
          step: None for the newest.

        Raises:
          CheckpointError: there is no such step, or a leaf is missing, unknown or misshapen.
        """
        step = self.latest() if step is None else step
        if step is None or step not in self._manager.all_steps():
            raise CheckpointError(f"{self.folder} holds no checkpoint{'' if step is None else f' of step {step}'}")
        saved = self._saved(step)
        name = "ema" if any(path.startswith("ema/") for path in saved) else "params"
        wanted = {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path({name: abstract})}
        here = {path: leaf for path, leaf in saved.items() if path.startswith(name + "/")}
        _compare(f"{self.folder / str(step)}", here, wanted, free=("position_embedding",))
        tree = jax.tree_util.tree_map_with_path(
            lambda path, leaf: jax.ShapeDtypeStruct(here[path_of(path)].shape, leaf.dtype, sharding=_sharding(leaf)),
            {name: abstract},
        )
        checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        restored = checkpointer.restore(
            self.folder / str(step) / "state",
            args=ocp.args.PyTreeRestore(
                item=tree,
                restore_args=ocp.checkpoint_utils.construct_restore_args(tree),
                partial_restore=True,
            ),
        )
        return restored[name], step

    def wait(self) -> None:
        """Until every save that was started is whole."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _saved(self, step: int) -> dict[str, Any]:
        """Path -> metadata (shape, dtype) of every array in a saved state."""
        # The handler and not a Checkpointer, which warns that a part of a checkpoint has no description of its own.
        tree = ocp.PyTreeCheckpointHandler().metadata(self.folder / str(step) / "state").tree
        return {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

    def _check(self, step: int, abstract: TrainState) -> None:
        leaves = jax.tree_util.tree_leaves_with_path(_raw_key(abstract))
        _compare(f"{self.folder / str(step)}", self._saved(step), {path_of(path): leaf for path, leaf in leaves})


def _compare(where: str, saved: dict[str, Any], wanted: dict[str, Any], free: tuple[str, ...] = ()) -> None:
    """Orbax restores part of a tree without a word: every leaf is compared here first."""
    wrong = [f"{path} is missing" for path in wanted if path not in saved]
    wrong += [f"{path} is unknown" for path in saved if path not in wanted]
    wrong += [
        f"{path} is {tuple(saved[path].shape)} there and {tuple(leaf.shape)} here"
        for path, leaf in wanted.items()
        if path in saved and tuple(saved[path].shape) != tuple(leaf.shape) and not path.endswith(free or ("\n",))
    ]
    if wrong:
        more = f", and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise CheckpointError(
            f"{where} does not fit this configuration: {'; '.join(wrong[:8])}{more}. Use the configuration that it was "
            "trained with, or another --workdir"
        )


def _sharding(leaf: Any) -> Any:
    # Without a given place the arrays come whole to the first device.
    return getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _raw_key(state: TrainState) -> dict[str, Any]:
    """The state as a plain dict with the PRNG key as the integers that it is made of."""
    rng: Any = state.rng
    if isinstance(rng, jax.ShapeDtypeStruct):
        data = jax.eval_shape(jax.random.key_data, rng)
        rng = jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=rng.sharding)
    else:
        rng = jax.random.key_data(rng)
    tree = {"step": state.step, "params": state.params, "opt_state": state.opt_state, "rng": rng}
    return tree | ({} if state.ema is None else {"ema": state.ema})


def _typed_key(tree: dict[str, Any]) -> TrainState:
    rng = jax.random.wrap_key_data(tree["rng"])
    return TrainState(tree["step"], tree["params"], tree["opt_state"], tree.get("ema"), rng)


# What may differ between the run that began in a workdir and the one that goes on: it changes how, not what.
_MAY_CHANGE = (
    "log_every",
    "mesh",
    "evaluate",
    "checkpoint",
    "data.max_bad",
    "data.prefetch",
    "data.threads",
    "data.workers",
    "model.image.remat",
    "model.image.scan_unroll",
    "model.text.remat",
    "model.pooler.remat",
    "model.attention",
    "model.text.scan_unroll",
    "loss.caption_chunk",
    "loss.contrastive_tile",
)


def keep_config(workdir: epath.Path, c: config.Config) -> None:
    """Writes config.json into a new workdir; in a used one, refuses a configuration that would be another run.

    To be called by one process.

    Raises:
      ConfigError: naming the first key that differs, both values and what to do.
    """
    path = workdir / CONFIG_FILE
    if path.exists():
        before = read_config(workdir)
        for key, old, new in _differences(json.loads(config.to_json(before)), json.loads(config.to_json(c))):
            # Of a mixture the weights may change, see Schedule.changed.
            weights_alone = key == "data.train" and list(read_spec(old)) == list(read_spec(new))
            if not weights_alone and not any(key == k or key.startswith(k + ".") for k in _MAY_CHANGE):
                raise ConfigError(
                    f"config.{key}={new!r}, but {path} was begun with {old!r}: put it back, or start in another "
                    "--workdir"
                )
            logging.info("config.%s was %r and is %r", key, old, new)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(config.to_json(c))
    partial.replace(path)


def read_config(workdir: epath.PathLike) -> config.Config:
    """The configuration of a workdir.

    Raises:
      CheckpointError: the folder is not a workdir, or its config.json is damaged.
    """
    path = epath.Path(workdir) / CONFIG_FILE
    if not path.exists():
        raise CheckpointError(f"{workdir} is not a workdir: it has no {CONFIG_FILE}")
    try:
        values = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): restore it, or start in another --workdir") from error
    return config.from_config_dict(values)


def _differences(a: Any, b: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(a, dict) and isinstance(b, dict):
        return [d for key in b for d in _differences(a.get(key), b[key], f"{path}.{key}" if path else key)]
    return [] if a == b else [(path, a, b)]
