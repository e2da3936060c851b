"""The tree that is saved: what it is made of, and whether one found on disk is the one wanted."""

from __future__ import annotations

from typing import Any

import jax

from coca_jax.sharding import path_of
from coca_jax.train import guard as guards
from coca_jax.train.checkpoint.paths import CheckpointError
from coca_jax.train.guard import Guard
from coca_jax.train.state import TrainState


def by_path(tree: Any) -> dict[str, Any]:
    return {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def compare(where: str, saved: dict[str, Any], wanted: dict[str, Any], free: tuple[str, ...] = ()) -> None:
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


def sharding_of(leaf: Any) -> Any:
    # Without a given place the arrays come whole to the first device.
    return getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def raw_key(state: TrainState) -> dict[str, Any]:
    """The state as a plain dict with the PRNG key as the integers that it is made of."""
    rng: Any = state.rng
    if isinstance(rng, jax.ShapeDtypeStruct):
        data = jax.eval_shape(jax.random.key_data, rng)
        rng = jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=rng.sharding)
    else:
        rng = jax.random.key_data(rng)
    tree = {"step": state.step, "params": state.params, "opt_state": state.opt_state, "rng": rng}
    tree["guard"] = {name: getattr(state.guard, name) for name in Guard.__dataclass_fields__}
    return tree | ({} if state.ema is None else {"ema": state.ema})


def typed_key(tree: dict[str, Any]) -> TrainState:
    rng = jax.random.wrap_key_data(tree["rng"])
    return TrainState(tree["step"], tree["params"], tree["opt_state"], tree.get("ema"), rng, Guard(**tree["guard"]))


def fresh_guard(places: dict[str, Any]) -> dict[str, Any]:
    """The values that a run begins with, where they are wanted: for a state that was saved before there was a guard."""
    shardings = {name: leaf.sharding for name, leaf in places.items()}
    made: dict[str, Any] = jax.jit(
        lambda: {name: getattr(guards.fresh(), name) for name in places}, out_shardings=shardings
    )()
    return made
