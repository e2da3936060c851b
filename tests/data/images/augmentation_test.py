"""Augmentation: what it draws, what it does to pixels, and that the decoder's path changes neither."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
import pytest
import simplejpeg

from coca_jax import config
from coca_jax.data import images
from coca_jax.data.images import augmentation, geometry
from coca_jax.data.images.decoding import Encoded
from tests.data.images.pictures import detailed, photo, save, turned

PLAIN = config.Data(crop_area=(1.0, 1.0), crop_ratio=(1.0, 1.0))


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
    boxes = np.array([augmentation._crop_box(200, 150, rng, data) for _ in range(2000)])
    left, top, width, height = boxes.T
    area, ratio = width * height / (200 * 150), width / height
    assert area.min() > 0.29 and area.max() < 0.61 and area.min() < 0.31 and area.max() > 0.58
    assert ratio.min() > 0.48 and ratio.max() < 2.05
    assert (left >= 0).all() and (top >= 0).all()
    assert (left + width <= 200).all() and (top + height <= 150).all()
    assert left.min() == 0 and top.min() == 0 and (left + width).max() == 200 and (top + height).max() == 150
    assert abs((left + width / 2).mean() - 100) < 3 and abs((top + height / 2).mean() - 75) < 3


SIZE = 48
WIDE = config.Data(crop_area=(0.1, 1.0), crop_ratio=(0.5, 2.0))


@pytest.mark.parametrize("subsampling", [0, 2])
def test_reduced_decoding_shows_what_full_decoding_shows(subsampling):
    """A JPEG, reduced as each crop allows, against the same pixels in a PNG, which is never reduced."""
    jpeg = save(detailed(401, 483), "JPEG", quality=90, subsampling=subsampling)
    png = save(images.decode(jpeg), "PNG")
    factors = set()
    for seed in range(40):
        reduced, whole = (images.decode_and_augment(d, SIZE, np.random.default_rng(seed), WIDE) for d in (jpeg, png))
        box = augmentation._crop_box(483, 401, np.random.default_rng(seed), WIDE)
        factors.add(geometry.align(box, 483, 401, SIZE).factor)
        # Reduced, it is rounded once; decoded, clipped and averaged, it is rounded twice. 0.7 was the most seen.
        assert np.abs(reduced.astype(int) - whole).mean() < 1
    assert factors == {2, 4}


@pytest.mark.parametrize("rotate", [0.0, 25.0])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_path_of_the_decoder_changes_neither_the_crop_nor_the_draws(orientation, rotate, monkeypatch):
    """Every orientation, with sizes that no factor divides, with simplejpeg, Pillow's reduction, and no reduction."""
    data = dataclasses.replace(WIDE, rotate=rotate, flip=True, color_jitter=0.2)
    jpeg = save(detailed(301, 363), "JPEG", quality=90, subsampling=0, exif=turned(orientation))
    png = save(simplejpeg.decode_jpeg(jpeg, "RGB"), "PNG", exif=turned(orientation))
    for seed in range(8):
        generators = [np.random.default_rng(seed) for _ in range(3)]
        results = [images.decode_and_augment(d, SIZE, r, data) for d, r in zip((jpeg, png), generators, strict=False)]
        with monkeypatch.context() as patch:
            patch.setattr(Encoded, "_decode_jpeg", lambda self, factor: int("not this time"))
            results.append(images.decode_and_augment(jpeg, SIZE, generators[2], data))
        assert len({str(rng.bit_generator.state) for rng in generators}) == 1
        for other in results[1:]:
            assert np.abs(results[0].astype(int) - other).mean() < 1.5


def middle_of(image: np.ndarray) -> np.ndarray:
    """(x, y) of the middle of what is bright on black, pixels."""
    weights = image.sum(-1).astype(float)
    y, x = np.indices(weights.shape) + 0.5
    return np.array([(x * weights).sum(), (y * weights).sum()]) / weights.sum()


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [230, 100, 60, 33, 12])
def test_nothing_is_shifted(kind, size):
    """A dot's middle is where the crop's own geometry puts it, to a tenth of a pixel, at every reduction."""
    picture = np.zeros((481, 603, 3), np.uint8)
    cv2.circle(picture, (302, 240), 40, (250, 250, 250), -1)
    dot = middle_of(picture)
    data = config.Data(crop_area=(0.7, 0.9), crop_ratio=(0.9, 1.1))
    encoded = save(picture, kind, **({"quality": 95} if kind == "JPEG" else {}))
    for seed in range(10):
        out = images.decode_and_augment(encoded, size, np.random.default_rng(seed), data)
        box = augmentation._crop_box(603, 481, np.random.default_rng(seed), data)
        region = geometry.align(box, 603, 481, size)
        exact = (dot - np.array(region[:2]) * region.factor) * size / (np.array(region[2:4]) * region.factor)
        assert np.abs(middle_of(out) - exact).max() < 0.1
        drawn = (dot - np.array(box[:2])) * size / np.array(box[2:])
        assert np.abs(middle_of(out) - drawn).max() < 1  # cells move an edge by less than a pixel of the result


def test_rotated_crops_are_not_shifted_by_the_reduction():
    picture = np.zeros((481, 603, 3), np.uint8)
    cv2.circle(picture, (330, 220), 30, (250, 250, 250), -1)
    data = config.Data(crop_area=(0.7, 0.9), crop_ratio=(0.9, 1.1), rotate=40.0)
    for size in (100, 60, 33):
        for seed in range(10):
            jpeg, png = (
                images.decode_and_augment(save(picture, kind), size, np.random.default_rng(seed), data)
                for kind in ("JPEG", "PNG")
            )
            assert np.abs(middle_of(jpeg) - middle_of(png)).max() < 0.1


def test_crops_keep_the_detail_that_the_result_can_show():
    """No crop is cut from fewer pixels than it has to fill, nor decoded with twice as many as needed."""
    rng = np.random.default_rng(0)
    factors = []
    for _ in range(2000):
        width, height = (int(side) for side in rng.integers(1, 900, 2))
        box = augmentation._crop_box(width, height, rng, WIDE)
        region = geometry.align(box, width, height, SIZE)
        factors.append(region.factor)
        columns, rows = width // region.factor, height // region.factor
        assert region.left >= 0 and region.left + region.width <= columns
        assert region.top >= 0 and region.top + region.height <= rows
        assert region.factor == 1 or min(region.width, region.height) >= SIZE
        assert region.factor == geometry.MAX_FACTOR or min(box[2:]) < 2 * region.factor * SIZE
        if region.factor == 1:
            assert region[:4] == box
        assert all(abs(b - c * region.factor) <= 1.5 * region.factor for b, c in zip(box, region[:4], strict=True))
    assert set(factors) == {1, 2, 4, 8}


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
    whole = geometry.Region(0, 0, 64, 64, 1)
    quarter = augmentation._rotated_crop(image, whole, 1, 64, 90.0, (255, 255, 255))
    assert min(np.abs(np.rot90(image, k).astype(int) - quarter).max() for k in (1, 3)) <= 1
    part = geometry.Region(10, 20, 40, 30, 1)
    nearly = augmentation._rotated_crop(image, part, 1, 24, 1e-6, (255, 255, 255))
    assert np.abs(nearly.astype(int) - images.resize(image[20:50, 10:50], 24, 24)).mean() < 2
    black = np.zeros((64, 64, 3), np.uint8)
    corner = augmentation._rotated_crop(black, whole, 1, 64, 45.0, (10, 20, 250))
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
    augmentation._crop_box(48, 48, draws, PLAIN)
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
