"""A checkpoint of any mesh is restored on any other, leaf for leaf, and has the same digests there."""

from __future__ import annotations

import pathlib
import subprocess
import tempfile
from collections.abc import Callable

import pytest

# The fixture of tests/conftest.py.
RunPython = Callable[..., subprocess.CompletedProcess[str]]

Moves = dict[tuple[int, int, int], tuple[tuple[int, int, int], ...]]

# Meshes (replica, fsdp, tensor) that a state is saved on, and those that it is restored on.
MOVES: Moves = {
    (1, 8, 1): ((1, 4, 2), (8, 1, 1), (1, 4, 1), (1, 1, 1)),
    (2, 2, 2): ((1, 8, 1), (2, 1, 2)),
    (1, 1, 1): ((1, 2, 4),),
}
FEW: Moves = {(1, 8, 1): ((1, 2, 2), (1, 1, 1))}


def few() -> None:
    move(FEW)


def all_of_them() -> None:
    move(MOVES)


def move(moves: Moves) -> None:
    """Run with eight devices; smaller meshes take the first of them."""
    import itertools
    import math

    import jax
    import numpy as np
    from etils import epath

    from coca_jax import config, sharding
    from coca_jax.train import optimizer, state
    from coca_jax.train.checkpoint import Checkpoints, digest, verify
    from coca_jax.train.checkpoint import tree as trees
    from tests import tiny

    c = tiny.replace(tiny.CONFIG, model__text__vocab_size=64, loss__lambda_cap=0.0)
    tx = optimizer.make_optimizer(c.optimizer, c.steps, state.abstract_parameters(c))
    meshes = {
        shape: sharding.make_mesh(shape, jax.devices()[: math.prod(shape)])
        for shape in {(1, 1, 1), *moves, *itertools.chain(*moves.values())}
    }

    def host(s: state.TrainState) -> dict[str, np.ndarray]:
        return {path: np.asarray(leaf) for path, leaf in trees.by_path(trees.raw_key(s)).items()}

    with jax.set_mesh(meshes[1, 1, 1]):
        wanted = state.real(c, tx, meshes[1, 1, 1])
    arrays = host(wanted)
    digests = {path: digest.of_array(leaf) for path, leaf in arrays.items()}
    assert len(set(digests.values())) > 20

    count = 0
    for before, afters in moves.items():
        places = state.abstract(c, tx, meshes[before])
        placed = jax.tree.map(lambda leaf, place: jax.device_put(leaf, place.sharding), wanted, places)
        for path, sums in digest.of_process(trees.raw_key(placed)).items():
            assert set(sums.values()) == {digests[path]}, path
        with tempfile.TemporaryDirectory() as folder, Checkpoints(folder, config.Checkpoint()) as checkpoints:
            checkpoints.save(placed, {"position": 0}, {})
            checkpoints.wait()
            assert verify.check_step(epath.Path(folder) / "checkpoints" / "0") == []
            for after in afters:
                abstract = state.abstract(c, tx, meshes[after])
                found = checkpoints.restore(abstract, {})
                assert found, (before, after)
                for path, leaf in host(found[0]).items():
                    np.testing.assert_array_equal(leaf, arrays[path], err_msg=f"{before} {after} {path}")
                for leaf, place in itertools.zip_longest(jax.tree.leaves(found[0]), jax.tree.leaves(abstract)):
                    assert leaf.sharding == place.sharding and leaf.dtype == place.dtype
                count += 1
    print("moved", count)


def test_every_leaf_is_the_same_on_a_smaller_mesh(run_python: RunPython, tmp_path: pathlib.Path) -> None:
    assert "moved 2" in run_python(few, env={"TMPDIR": str(tmp_path)}).stdout


@pytest.mark.slow
def test_every_leaf_is_the_same_on_every_mesh(run_python: RunPython, tmp_path: pathlib.Path) -> None:
    assert "moved 7" in run_python(all_of_them, env={"TMPDIR": str(tmp_path)}).stdout
