from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coca_jax.model.coca import CoCa
from coca_jax.model.image_encoder import resize_parameters, resize_positions, sincos_grid
from tests import tiny


def test_positions_of_an_equal_grid_are_returned_unchanged() -> None:
    table: Any = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    assert resize_positions(table, 4, class_token=False) is table


def test_resizing_keeps_the_class_token_and_a_smooth_plane() -> None:
    # With row and column as channels, another resolution must sample the same plane.
    def plane(side: int) -> np.ndarray:
        at = (np.arange(side) + 0.5) / side
        return np.stack(np.meshgrid(at, at, indexing="ij"), axis=-1).reshape(-1, 2).astype(np.float32)

    token = np.full((1, 2), 7.0, np.float32)
    for class_token in (False, True):
        before = np.concatenate([token, plane(8)]) if class_token else plane(8)
        after = np.asarray(resize_positions(before, 16, class_token=class_token))
        if class_token:
            np.testing.assert_array_equal(after[:1], token)
            after = after[1:]
        inside = after.reshape(16, 16, 2)[3:-3, 3:-3]
        # Exact away from the border, where bicubic interpolation has all its neighbors.
        np.testing.assert_allclose(inside, plane(16).reshape(16, 16, 2)[3:-3, 3:-3], atol=1e-4)


def test_positions_that_are_not_a_grid_are_rejected() -> None:
    with pytest.raises(ValueError, match="not a square grid"):
        resize_positions(np.zeros((17, 4), np.float32), 8, class_token=False)


@pytest.mark.parametrize("class_token", [False, True])
def test_a_model_runs_at_another_resolution(class_token: bool) -> None:
    small = tiny.replace(tiny.MODEL, image__class_token=class_token)
    large = tiny.replace(small, image__size=32)
    params = resize_parameters(tiny.parameters(small), large)
    features = CoCa(large).apply({"params": params}, tiny.images(large, 2), method="encode_image").image_features
    assert features.shape == (2, 8) and np.isfinite(features).all()
    assert params["image_encoder"]["position_embedding"].shape == (64 + class_token, 16)


def test_the_patch_embedding_equals_a_convolution() -> None:
    model = tiny.replace(tiny.MODEL, image__depth=1)
    params, images = tiny.parameters(model), tiny.images(model, 2)
    kernel, bias = (params["image_encoder"]["patch_embedding"][k] for k in ("kernel", "bias"))
    convolved = jax.lax.conv_general_dilated(
        images, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    convolved = (convolved + bias[None, None, None]).reshape(2, 16, 16)

    def patches(coca: CoCa, images: jax.Array) -> jax.Array:
        return coca.image_encoder(images)

    # Zero weights in all blocks pass the patch embedding through the stack unchanged.
    still = jax.tree.map(jnp.zeros_like, params["image_encoder"]["blocks"])
    encoder = params["image_encoder"] | {"blocks": still, "position_embedding": jnp.zeros((16, 16))}
    seen = CoCa(model).apply({"params": params | {"image_encoder": encoder}}, images, method=patches)
    np.testing.assert_allclose(seen, convolved, rtol=1e-4, atol=1e-4)


def test_sincos_positions_differ_for_every_patch() -> None:
    grid = np.asarray(sincos_grid(5, 32, class_token=True))
    assert grid.shape == (26, 32)
    np.testing.assert_array_equal(grid[0], 0)
    distances = np.linalg.norm(grid[1:, None] - grid[None, 1:], axis=-1)
    assert distances[~np.eye(25, dtype=bool)].min() > 0.1
