"""Any picture for a model, and normalising."""

from __future__ import annotations

import io
import json

import jax
import numpy as np
import PIL.Image
import pytest

from coca_jax.data import images
from coca_jax.data.records import DataError
from tests.data.images.pictures import photo, save


def test_normalize_is_the_same_in_numpy_and_jax():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    mean, std = (0.48, 0.45, 0.4), (0.26, 0.25, 0.27)
    wanted = (pixels / 255.0 - np.array(mean)) / np.array(std)
    on_host = images.normalize(pixels, mean, std)
    on_device = jax.jit(lambda x: images.normalize(x, mean, std))(pixels)
    assert on_host.dtype == np.float32 and on_device.dtype == np.float32
    np.testing.assert_allclose(on_host, wanted, atol=1e-5)
    np.testing.assert_allclose(on_device, wanted, atol=1e-5)
    np.testing.assert_allclose(images.normalize(pixels.astype(np.float32), mean, std), on_host, atol=1e-6)


def test_preprocessor_takes_any_kind(tmp_path):
    pixels = photo(60, 60)
    image = PIL.Image.fromarray(pixels)
    image.save(tmp_path / "a.png")
    preprocessor = images.Preprocessor(32, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    batch = preprocessor([tmp_path / "a.png", str(tmp_path / "a.png"), save(image, "PNG"), image, pixels])
    assert batch.shape == (5, 32, 32, 3) and batch.dtype == np.float32
    for row in batch[1:]:
        np.testing.assert_array_equal(row, batch[0])
    np.testing.assert_array_equal(preprocessor(np.stack([pixels, pixels])), batch[:2])
    grey = np.asarray(image.convert("L"))
    assert np.ptp(images.Preprocessor(32)([grey]), axis=-1).max() == 0
    assert preprocessor([]).shape == (0, 32, 32, 3)


def test_preprocessor_leaves_a_pillow_image_alone():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    image = PIL.Image.open(io.BytesIO(save(PIL.Image.fromarray(photo(30, 60)), "PNG", exif=exif)))
    images.Preprocessor(16)([image])
    assert image.size == (60, 30)


def test_preprocessor_survives_json():
    preprocessor = images.Preprocessor(224, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), (1, 2, 3), 0.875)
    assert images.Preprocessor.from_json(json.loads(json.dumps(preprocessor.to_json()))) == preprocessor


def test_preprocessor_says_what_is_wrong(tmp_path):
    preprocessor = images.Preprocessor(16)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"bad\.png: 10 bytes that are not a readable picture"):
        preprocessor([tmp_path / "bad.png"])
    with pytest.raises(DataError, match=r"missing\.png: no such picture"):
        preprocessor([tmp_path / "missing.png"])
    with pytest.raises(DataError, match=r"float32 \[4, 4, 3\] is not a picture"):
        preprocessor([np.zeros((4, 4, 3), np.float32)])
    with pytest.raises(DataError, match="takes a list"):
        preprocessor("a.png")
