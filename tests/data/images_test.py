"""Decoding, geometry, colour and normalising, against Pillow and against what must hold."""

from __future__ import annotations

import io
import json

import cv2
import jax
import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest

from coca_jax import config
from coca_jax.data import images
from coca_jax.data.records import DataError

PLAIN = config.Data(crop_area=(1.0, 1.0), crop_ratio=(1.0, 1.0))


def save(image: PIL.Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def photo(height: int = 240, width: int = 320) -> np.ndarray:
    """Smooth enough that JPEG keeps it, with a different colour in each corner."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    waves = 20 * np.sin(9 * x + 5 * y)
    return np.stack([200 * x + 30, 200 * y + 30, 120 - 80 * x * y + waves], axis=-1).clip(0, 255).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "WEBP", "TIFF"])
def test_decode_other_formats(kind):
    flat = np.zeros((20, 30, 3), np.uint8) + np.array([10, 200, 90], np.uint8)
    decoded = images.decode(save(PIL.Image.fromarray(flat), kind, **({"lossless": True} if kind == "WEBP" else {})))
    np.testing.assert_array_equal(decoded, flat)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_decode_jpeg_like_pillow(mode):
    image = PIL.Image.fromarray(photo()).convert(mode)
    data = save(image, "JPEG", quality=90)
    wanted = np.asarray(PIL.Image.open(io.BytesIO(data)).convert("RGB"), np.int32)
    decoded = images.decode(data)
    assert decoded.shape == (240, 320, 3)
    assert np.abs(decoded - wanted).mean() < 1


def test_transparency_lies_on_the_background():
    rng = np.random.default_rng(0)
    rgba = rng.integers(0, 256, (16, 16, 4), dtype=np.uint8)
    decoded = images.decode(save(PIL.Image.fromarray(rgba), "PNG"), (10, 20, 250))
    alpha = rgba[..., 3:] / 255
    np.testing.assert_allclose(decoded, rgba[..., :3] * alpha + np.array([10, 20, 250]) * (1 - alpha), atol=1)


@pytest.mark.parametrize("mode", ["P", "LA"])
def test_transparency_of_other_modes(mode):
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:, 4:] = (90, 90, 90, 255)  # left half see-through
    image = PIL.Image.fromarray(rgba)
    image = image.quantize(4) if mode == "P" else image.convert("LA")
    decoded = images.decode(save(image, "PNG"), (255, 0, 0))
    assert (decoded[:, :4] == (255, 0, 0)).all()
    assert np.abs(decoded[:, 4:].astype(int) - 90).max() <= 2


def test_sixteen_bits_of_grey():
    grey = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    decoded = images.decode(save(PIL.Image.fromarray(grey), "PNG"))
    np.testing.assert_array_equal(decoded, np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=2))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind, orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    data = save(PIL.Image.fromarray(photo(60, 80)), kind, exif=exif)
    wanted = np.asarray(PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data))).convert("RGB"), np.int32)
    decoded = images.decode(data)
    assert decoded.shape == wanted.shape
    assert np.abs(decoded - wanted).mean() < 1.5


@pytest.mark.parametrize("min_side, shape", [(0, (240, 321)), (121, (240, 321)), (120, (120, 161)), (50, (60, 81))])
def test_reduced_jpeg(min_side, shape):
    pixels = photo(240, 321)
    decoded = images.decode(save(PIL.Image.fromarray(pixels), "JPEG", quality=95), min_side=min_side)
    assert decoded.shape[:2] == shape
    wanted = cv2.resize(pixels, (shape[1], shape[0]), interpolation=cv2.INTER_AREA).astype(int)
    assert np.abs(decoded - wanted).mean() < 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_truncated(kind):
    data = save(PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), kind)
    with pytest.raises(DataError, match=f"{len(data) // 2} bytes that are not a readable picture"):
        images.decode(data[: len(data) // 2])


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"<html>not found</html>"])
def test_not_a_picture(data):
    with pytest.raises(DataError, match="not a readable picture"):
        images.decode(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_too_many_pixels(kind, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    with pytest.raises(DataError, match="40 x 30 pixels is over the limit of 1000"):
        images.decode(save(PIL.Image.new("RGB", (40, 30)), kind))


# ---------------------------------------------------------------------------------------------------------------------


def test_resize_does_not_alias():
    checkers = np.repeat((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)[..., None], 3, axis=2)
    small = images.resize(checkers, 16, 16)
    assert small.min() >= 126 and small.max() <= 129


@pytest.mark.parametrize("shape", [(72, 72), (40, 100), (100, 40), (10, 10), (1, 300), (48, 48)])
def test_fit(shape):
    image = np.zeros((*shape, 3), np.uint8)
    image[:, :] = (9, 99, 199)
    out = images.fit(image, 48)
    assert out.shape == (48, 48, 3)
    assert (out == (9, 99, 199)).all()


def test_fit_keeps_the_middle_and_the_aspect():
    image = np.zeros((100, 300, 3), np.uint8)
    cv2.circle(image, (150, 50), 30, (255, 255, 255), -1)
    out = images.fit(image, 50)[..., 0] > 127
    rows, columns = np.flatnonzero(out.any(1)), np.flatnonzero(out.any(0))
    assert abs(len(rows) - 30) <= 1 and abs(len(columns) - 30) <= 1  # still a circle, of half the size
    assert abs(rows.mean() - 24.5) <= 1 and abs(columns.mean() - 24.5) <= 1


def test_fit_with_a_crop_shows_things_larger():
    image = np.zeros((100, 100, 3), np.uint8)
    image[30:70, 30:70] = 255
    for crop in (1.0, 0.8, 0.5):
        out = images.fit(image, 80, crop)
        assert out.shape == (80, 80, 3)
        assert abs(np.sqrt((out > 127).all(2).sum()) - 40 * 80 / (100 * crop)) <= 1
    np.testing.assert_array_equal(images.Preprocessor(80, crop=0.5).pixels([image])[0], images.fit(image, 80, 0.5))


def everything(**changes) -> config.Data:
    return config.Data(flip=True, color_jitter=0.4, hue_jitter=0.1, grayscale=0.2, rotate=20.0, blur=0.5, **changes)


@pytest.mark.parametrize("shape", [(72, 72), (300, 200), (1, 1), (3, 500), (500, 3)])
def test_augment_any_shape_repeatably(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    for seed in range(20):
        first, second = (images.augment(image, 48, np.random.default_rng(seed), everything()) for _ in range(2))
        assert first.shape == (48, 48, 3) and first.dtype == np.uint8
        np.testing.assert_array_equal(first, second)


def test_augment_differs_by_seed_and_leaves_its_input_alone():
    image = photo()
    before = image.copy()
    results = {images.augment(image, 32, np.random.default_rng(seed), everything()).tobytes() for seed in range(10)}
    assert len(results) == 10
    np.testing.assert_array_equal(image, before)


def test_augment_that_is_off_is_a_resize():
    image = photo(96, 96)
    out = images.augment(image, 48, np.random.default_rng(0), PLAIN)
    np.testing.assert_array_equal(out, images.resize(image, 48, 48))


def test_crops_stay_within_area_and_ratio_and_reach_everywhere():
    data = config.Data(crop_area=(0.3, 0.6), crop_ratio=(0.5, 2.0))
    rng = np.random.default_rng(0)
    boxes = np.array([images._crop_box(200, 150, rng, data) for _ in range(2000)])
    left, top, width, height = boxes.T
    area, ratio = width * height / (200 * 150), width / height
    assert area.min() > 0.29 and area.max() < 0.61 and area.min() < 0.31 and area.max() > 0.58
    assert ratio.min() > 0.48 and ratio.max() < 2.05
    assert (left >= 0).all() and (top >= 0).all()
    assert (left + width <= 200).all() and (top + height <= 150).all()
    assert left.min() == 0 and top.min() == 0 and (left + width).max() == 200 and (top + height).max() == 150
    assert abs((left + width / 2).mean() - 100) < 3 and abs((top + height / 2).mean() - 75) < 3


def test_reduced_decoding_never_enlarges_a_crop():
    data = config.Data(crop_area=(0.2, 1.0), crop_ratio=(0.5, 1.6))
    side = images.crop_min_side(48, data)
    rng = np.random.default_rng(0)
    boxes = np.array([images._crop_box(side, side, rng, data) for _ in range(2000)])
    assert boxes[:, 2:].min() >= 47  # a pixel for rounding


def test_flip_is_even_and_off_unless_asked_for():
    image = photo(48, 48)
    flip = config.Data(crop_area=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=True)
    rng = np.random.default_rng(0)
    results = [images.augment(image, 48, rng, flip) for _ in range(400)]
    flipped = sum(np.array_equal(out, image[:, ::-1]) for out in results)
    assert all(np.array_equal(out, image[:, ::-1]) or np.array_equal(out, image) for out in results)
    assert 160 < flipped < 240  # 4 standard deviations
    assert all(np.array_equal(images.augment(image, 48, rng, PLAIN), image) for _ in range(20))


def test_rotation():
    image = photo(64, 64)
    turned = images._rotated_crop(image, (0, 0, 64, 64), 64, 90.0, (255, 255, 255))
    assert min(np.abs(np.rot90(image, k).astype(int) - turned).max() for k in (1, 3)) <= 1
    nearly = images._rotated_crop(image, (10, 20, 40, 30), 24, 1e-6, (255, 255, 255))
    assert np.abs(nearly.astype(int) - images.resize(image[20:50, 10:50], 24, 24)).mean() < 2
    black = np.zeros((64, 64, 3), np.uint8)
    corner = images._rotated_crop(black, (0, 0, 64, 64), 64, 45.0, (10, 20, 250))
    assert (corner[0, 0] == (10, 20, 250)).all() and (corner[32, 32] == 0).all()


def colored(rng_seed: int = 0, **changes) -> tuple[np.ndarray, np.ndarray]:
    data = config.Data(crop_area=(1.0, 1.0), crop_ratio=(1.0, 1.0), **changes)
    image = (photo(48, 48) * 0.4 + 70).astype(np.uint8)  # far from 0 and 255, so that nothing is clipped
    return image, images.augment(image, 48, np.random.default_rng(rng_seed), data)


LUMA = np.array([0.299, 0.587, 0.114])


def test_grayscale():
    image, out = colored(grayscale=1.0)
    assert np.ptp(out, axis=2).max() == 0
    np.testing.assert_allclose(out[..., 0], image @ LUMA, atol=1)


def test_hue_turns_colours_and_keeps_the_grey():
    image, out = colored(hue_jitter=0.2)
    np.testing.assert_allclose(out @ LUMA, image @ LUMA, atol=2)
    assert np.abs(out.astype(int) - image).max() > 20


def test_jitter_is_brightness_contrast_saturation():
    draws = np.random.default_rng(5)
    # The crop draws from the same generator first: two uniform numbers and two integers.
    images._crop_box(48, 48, draws, PLAIN)
    brightness, contrast, saturation = draws.uniform(0.8, 1.2, 3)
    image, out = colored(5, color_jitter=0.2)
    wanted = image * brightness
    wanted = (wanted - (wanted @ LUMA).mean()) * contrast + (wanted @ LUMA).mean()
    wanted = wanted * saturation + (wanted @ LUMA)[..., None] * (1 - saturation)
    np.testing.assert_allclose(out, wanted.clip(0, 255), atol=1)


def test_blur_smooths():
    image = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    data = config.Data(crop_area=(1.0, 1.0), crop_ratio=(1.0, 1.0), blur=1.0)
    spread = [images.augment(image, 48, np.random.default_rng(seed), data).std() for seed in range(20)]
    assert max(spread) <= image.std() and min(spread) < 0.8 * image.std()


# ---------------------------------------------------------------------------------------------------------------------


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
