"""Reading a step as arrays on the mesh, every leaf compared with the manifest. All processes take part, and agree."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from coca_jax.distributed import gather, is_first
from coca_jax.sharding import path_of
from coca_jax.train.checkpoint import digest, manifest, tree, verify
from coca_jax.train.checkpoint.folder import read_place
from coca_jax.train.checkpoint.manifest import Damaged, Leaf
from coca_jax.train.checkpoint.paths import CheckpointError, one_line
from coca_jax.train.state import Parameters, TrainState


def state(folder: epath.Path, abstract: TrainState, identity: dict[str, Any]) -> tuple[TrainState, dict[str, Any]]:
    """The state of a step and its place in the data. Arguments as of `Checkpoints.restore`.

    Raises:
      Damaged: the step is not what was saved.
      CheckpointError: the data has changed, a leaf is missing, unknown or misshapen, or the storage does not answer.
    """
    if gather((folder / "identity").exists())[0]:
        raise CheckpointError(
            f"{folder}: its place in the data was saved by an earlier coca_jax, process by process: finish the run "
            "with the version that began it, or start in another --workdir (its parameters can still be loaded)"
        )
    leaves = _leaves(folder)
    saved = _by_first(folder, lambda: read_place(folder))
    if saved.pop("format", 1) > manifest.FORMAT:
        raise CheckpointError(f"{folder} was saved by a later coca_jax: use that one, or start in another --workdir")
    for key, value in json.loads(json.dumps(identity)).items():
        if saved.get(key) != value:
            raise CheckpointError(
                f"{folder}: {key} was {saved.get(key)!r} when it was saved and is {value!r} now, "
                "so the data cannot go on where it stopped: put it back, or start in another --workdir"
            )
    wanted = tree.raw_key(abstract)
    found = _together(folder, leaves, lambda: verify.saved_leaves(folder)[1])
    # A run that an earlier version began has no guard: it goes on with a fresh one.
    older = not any(path.startswith("guard/") for path in found)
    guard = {"guard": tree.fresh_guard(wanted.pop("guard"))} if older else {}
    tree.compare(str(folder), found, tree.by_path(wanted))
    handler = ocp.StandardCheckpointHandler()
    args = ocp.args.StandardRestore(_as_saved(wanted, found))
    restored = _together(folder, leaves, lambda: handler.restore(folder / manifest.STATE, args=args))
    _check(folder, leaves, restored)
    return tree.typed_key(_as_wanted(restored, wanted) | guard), {k: v for k, v in saved.items() if k not in identity}


def parameters(folder: epath.Path, abstract: Parameters) -> Parameters:
    """The parameters of a step, the moving average where there is one. Arguments as of `restore_parameters`.

    Raises as `state`.
    """
    leaves = _leaves(folder)
    saved = _together(folder, leaves, lambda: verify.saved_leaves(folder)[1])
    name = "ema" if any(path.startswith("ema/") for path in saved) else "params"
    here = {path: leaf for path, leaf in saved.items() if path.startswith(name + "/")}
    tree.compare(str(folder), here, tree.by_path({name: abstract}), free=("position_embedding",))
    wanted = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.ShapeDtypeStruct(here[path_of(path)].shape, leaf.dtype, sharding=tree.sharding_of(leaf)),
        {name: abstract},
    )
    item = _as_saved(wanted, here)
    args = ocp.args.PyTreeRestore(
        item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
    )
    handler = ocp.PyTreeCheckpointHandler()
    restored = _together(folder, leaves, lambda: handler.restore(folder / manifest.STATE, args=args))
    _check(folder, leaves, restored)
    return _as_wanted(restored, wanted)[name]


def _leaves(folder: epath.Path) -> dict[str, Leaf] | None:
    """What the manifest says of the leaves; None where the step is older than manifests.

    Raises:
      Damaged: the manifest or the marker is missing, or a file is missing, cut or (of the small ones) changed.
    """
    said: list[Any] = ["", {}]
    if is_first():
        try:
            written = manifest.read(folder)
            said = ["; ".join(list(manifest.check_files(folder, written, whole=False))[:4]), {}]
            said[1] = {path: dataclasses.asdict(leaf) for path, leaf in written.leaves.items()}
        except Damaged as damage:
            said = [str(damage) if verify.is_of_format(folder) else "", None]
        except OSError as error:
            said = ["", one_line(error)]
    problem, leaves = gather(said)[0]
    if problem:
        raise Damaged(problem)
    if isinstance(leaves, str):
        raise CheckpointError(f"{folder} cannot be read ({leaves}): see that the storage answers, and start again")
    if leaves is None:
        if is_first():
            logging.warning("%s was saved before there were manifests: it is restored unverified", folder)
        return None
    return {path: Leaf(tuple(leaf["shape"]), leaf["dtype"], leaf["digest"]) for path, leaf in leaves.items()}


def _by_first(folder: epath.Path, function: Callable[[], Any]) -> Any:
    """What the first process reads of a small file, in plain values, in all of them."""
    said: list[Any] = ["", None]
    if is_first():
        try:
            said[1] = function()
        except (OSError, ValueError, RecursionError) as error:
            said[0] = one_line(error)
    problem, value = gather(said)[0]
    if problem:
        raise Damaged(f"its place in the data cannot be read: {problem}")
    return value


def _together(folder: epath.Path, leaves: dict[str, Leaf] | None, function: Callable[[], Any]) -> Any:
    """What each process reads. Where one of them cannot, all raise alike.

    Raises:
      Damaged: because the step is; of one without a manifest, whatever cannot be decoded is.
      CheckpointError: the files are what they were: memory, the storage or another thing has failed.
    """
    error: Exception | None = None
    result: Any = None
    try:
        result = function()
    except Exception as raised:  # tensorstore's are ValueErrors
        error = raised
    undecoded = isinstance(error, ValueError | KeyError | FileNotFoundError)
    everyone = gather([one_line(error) if error else "", undecoded])
    problem, undecoded = next((one for one in everyone if one[0]), ("", False))
    if not problem:
        return result
    wrong = ""
    if leaves is None:
        wrong = problem if undecoded else ""
    elif is_first():
        try:
            wrong = "; ".join(list(manifest.check_files(folder, manifest.read(folder), whole=True))[:4])
        except (Damaged, OSError) as damage:
            wrong = one_line(damage) if isinstance(damage, Damaged) else ""
    if wrong := gather(wrong)[0]:
        raise Damaged(wrong) from error
    raise CheckpointError(f"{folder} cannot be read, though its files are what was written: {problem}") from error


def _check(folder: epath.Path, leaves: dict[str, Leaf] | None, restored: Any) -> None:
    """Raises Damaged, in all processes alike, where a leaf is not what was saved."""
    if leaves is None:
        return
    sums = digest.combined(gather(digest.of_process(restored)))
    wrong = []
    for path, leaf in tree.by_path(restored).items():
        if path not in leaves:
            wrong.append(f"leaf {path} is not in {manifest.FILE}")
            continue
        for found in sorted({digest.text(value) for value in sums[path].values()}):
            wrong += verify.compare(path, leaves[path], leaf.shape, found)
    if wrong:
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise Damaged("; ".join(wrong[:4]) + more)


def _as_saved(wanted: Any, saved: dict[str, Any]) -> Any:
    """The tree in the types that it was saved in: digests are of those bits."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.ShapeDtypeStruct(leaf.shape, saved[path_of(path)].dtype, sharding=leaf.sharding), wanted
    )


def _as_wanted(restored: Any, wanted: Any) -> Any:
    return jax.tree.map(
        lambda leaf, like: leaf if leaf.dtype == like.dtype else leaf.astype(like.dtype), restored, wanted
    )
