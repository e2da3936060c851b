"""The contrastive losses against plain formulas.

They differ only by the order of float32 sums, so the error of an element scales with the largest element of its array.
Measured: up to 6e-7 of it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coca_jax import losses, sharding

KINDS = ("softmax", "sigmoid")
TOLERANCE = 5e-6  # relative to an array's largest element
ROWS = 48
# Mesh -> tile size. 8 and 4 shards hold 6 and 12 of the 48 rows.
TILES = {
    (8, 1, 1): 6,  # a ring of 8 devices
    (1, 8, 1): 13,  # a ring of 4 groups of 2
    (2, 2, 2): 7,  # a ring of 4 over two mesh axes, in tiles that do not divide their rows
    (1, 4, 2): 24,  # a ring of 2 groups of 2
}


def features(rows: int, width: int = 8, seed: int = 0, similarity: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Unit-length features; matching ones are more similar the larger `similarity`."""
    image, text = np.random.default_rng(seed).normal(size=(2, rows, width))
    text = text + similarity * image
    return tuple((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in (image, text))


def gradients(kind: str, tile: int, *arguments: Any) -> Any:
    """((loss, metrics), gradients of both features, scale and bias), compiled."""

    def loss(*arguments: Any) -> Any:
        return losses.contrastive(*arguments, kind=kind, tile=tile)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(*arguments)


def assert_same(one: Any, other: Any, kind: str, message: str) -> None:
    """Compare value, metrics and gradients, except softmax's bias gradient, which is rounding error around 0."""
    (loss, metrics), grads = one
    (other_loss, other_metrics), other_grads = other
    assert metrics.keys() == other_metrics.keys()
    assert {k: float(v) for k, v in metrics.items()} == {k: float(v) for k, v in other_metrics.items()}, message
    count = 4 if kind == "sigmoid" else 3
    for a, b in zip((loss, *grads[:count]), (other_loss, *other_grads[:count]), strict=True):
        largest = float(np.abs(b).max())
        assert largest > 1e-6
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE * largest, err_msg=message)


def scalars(kind: str) -> tuple[Any, Any]:
    return jnp.float32(12), jnp.float32(-7 if kind == "sigmoid" else 0)


def test_softmax_equals_the_definition() -> None:
    image, text = features(6, 5)
    scores = np.exp(7.0 * image.astype(np.float64) @ text.T)
    own = np.diag(scores)
    expected = -(np.log(own / scores.sum(axis=1)).mean() + np.log(own / scores.sum(axis=0)).mean()) / 2
    hits = (scores.argmax(axis=1) == np.arange(6)).mean(), (scores.argmax(axis=0) == np.arange(6)).mean()
    for tile in (0, 4):
        value, metrics = losses.contrastive(image, text, jnp.float32(7), tile=tile)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        found = metrics["accuracy/image_to_text"], metrics["accuracy/text_to_image"]
        np.testing.assert_allclose(found, hits, rtol=1e-6)


def test_sigmoid_equals_the_definition() -> None:
    image, text = features(6, 5)
    logits = 7.0 * image.astype(np.float64) @ text.T - 3.0
    labels = 2 * np.eye(6) - 1  # +1 for matching pairs, as in SigLIP's algorithm 1
    expected = -np.log(1 / (1 + np.exp(-labels * logits))).sum() / 6
    for tile in (0, 4):
        value = losses.contrastive(image, text, jnp.float32(7), jnp.float32(-3), kind="sigmoid", tile=tile)[0]
        np.testing.assert_allclose(value, expected, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tile", [1, 7])
def test_tiles_equal_the_plain_formula_on_one_device(kind: str, tile: int) -> None:
    arguments = *features(18), *scalars(kind)
    assert_same(gradients(kind, tile, *arguments), gradients(kind, 0, *arguments), kind, f"{kind} {tile}")


def compare_on_meshes(tiles: dict[tuple[int, int, int], int]) -> None:
    """Runs with 8 devices: tiles on meshes against the plain formula on one device."""
    arguments = *features(ROWS), *scalars("sigmoid")
    for kind in KINDS:
        reference = gradients(kind, 0, *arguments)
        for shape, tile in tiles.items():
            mesh = sharding.make_mesh(shape)
            placed = [jax.device_put(x, sharding.batch_sharding(mesh)) for x in arguments[:2]]
            with jax.set_mesh(mesh):
                found = gradients(kind, tile, *placed, *arguments[2:])
            assert_same(found, reference, kind, f"{kind}, mesh {shape}, tile {tile}")


def check_meshes() -> None:
    compare_on_meshes(TILES)


def check_meshes_without_tiles() -> None:
    compare_on_meshes(dict.fromkeys(TILES, 0))


def check_more_tiles() -> None:
    for tile in (4, 5, 12, 25, 47):
        compare_on_meshes(dict.fromkeys(TILES, tile))


def test_every_mesh_equals_one_device(run_python) -> None:
    run_python(check_meshes)


@pytest.mark.slow
def test_every_mesh_equals_one_device_with_many_tiles(run_python) -> None:
    run_python(check_more_tiles, timeout=900)


@pytest.mark.slow
def test_every_mesh_equals_one_device_without_tiles(run_python) -> None:
    run_python(check_meshes_without_tiles)


def temporaries(kind: str, tile: int, rows: int, place: Any = None) -> int:
    """Bytes a device, compiled without running."""
    shape = jax.ShapeDtypeStruct((rows, 16), jnp.float32, sharding=place)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)

    def loss(*arguments: Any) -> Any:
        return losses.contrastive(*arguments, kind=kind, tile=tile)[0]

    # Gradients stay where their features are, as in training.
    places = None if place is None else (place, place, sharding.replicated(place.mesh), sharding.replicated(place.mesh))
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)), out_shardings=places)
    return compiled.lower(shape, shape, scalar, scalar).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_the_similarities_are_never_held(kind: str) -> None:
    rows, tile = 4096, 256
    assert temporaries(kind, tile, rows) < 4 * rows * rows / 16
    assert temporaries(kind, 0, rows) >= 4 * rows * rows, "the measure would find nothing"


def check_row_blocks() -> None:
    rows, tile = 8192, 256
    mesh = sharding.make_mesh((2, 4, 1))
    with jax.set_mesh(mesh):
        for kind in KINDS:
            block = 4 * rows * rows / 8  # a device's rows of the similarities
            assert temporaries(kind, tile, rows, sharding.batch_sharding(mesh)) < block / 8
            assert temporaries(kind, 0, rows, sharding.batch_sharding(mesh)) >= block, "the measure would find nothing"


def test_no_device_holds_its_rows_of_the_similarities(run_python) -> None:
    run_python(check_row_blocks)


@pytest.mark.parametrize("tile", [0, 1])
def test_accuracy_counts_ties_as_correct(tile: int) -> None:
    same = jnp.ones((2, 4)) / 2
    value, metrics = losses.contrastive(same, same, jnp.float32(10), tile=tile)
    np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
    assert metrics["accuracy/image_to_text"] == metrics["accuracy/text_to_image"] == 1.0


def test_gradients_stay_exact_when_the_loss_is_almost_zero() -> None:
    """At scale 100 a log-sum-exp has 5 digits left, too few for logit gradients of 1e-4."""
    image, text = features(8, 64, similarity=9.0)
    logits = 100.0 * image.astype(np.float64) @ text.T
    rows, columns = (np.exp(logits - logits.max(axis, keepdims=True)) for axis in (1, 0))
    grads = rows / rows.sum(axis=1, keepdims=True) + columns / columns.sum(axis=0, keepdims=True) - 2 * np.eye(8)
    expected = 100 * grads @ text / 16
    assert 0 < np.abs(grads).max() < 1e-4
    for tile in (0, 3):
        found = gradients("softmax", tile, image, text, jnp.float32(100), jnp.float32(0))[1][0]
        # The logits are rounded to 1e-5, and so are their gradients, relatively.
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_propagate_nan_features(kind: str) -> None:
    image, text = features(6)
    image[4, 2] = np.nan
    assert np.isnan(losses.contrastive(image, text, jnp.float32(1), jnp.float32(0), kind=kind, tile=4)[0])


def test_bfloat16_features_give_float32_losses_and_bfloat16_gradients() -> None:
    image, text = (jnp.bfloat16(x) for x in features(12))
    (value, _), grads = gradients("sigmoid", 5, image, text, *scalars("sigmoid"))
    (reference, _), expected = gradients("sigmoid", 0, image, text, *scalars("sigmoid"))
    assert value.dtype == grads[2].dtype == jnp.float32 and grads[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(value, reference, rtol=TOLERANCE)
    for a, b in zip(grads[:2], expected[:2], strict=True):  # both are rounded to 8 bits at the end
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=0, atol=2**-8 * np.abs(b).max())


def test_tiles_reject_rows_that_the_mesh_does_not_divide() -> None:
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((12, 8), (12, 8), ())]
    mesh = jax.sharding.AbstractMesh((1, 8, 1), sharding.MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    with jax.sharding.use_abstract_mesh(mesh):
        with pytest.raises(ValueError, match=r"12 rows.*8 shards.*use 8 or 16 rows.*contrastive_tile=0"):
            jax.eval_shape(lambda *a: losses.contrastive(*a, tile=4), *shapes)
        assert jax.eval_shape(lambda *a: losses.contrastive(*a, tile=12), *shapes)[0].shape == ()
