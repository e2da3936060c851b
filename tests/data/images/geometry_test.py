"""Resizing, boxes on cells, and the middle square."""

from __future__ import annotations

import cv2
import numpy as np
import PIL.Image
import pytest

from coca_jax.data import images
from tests.data.images.pictures import detailed, save, turned


@pytest.mark.parametrize("shrink", [1.02, 1.1, 1.3, 1.5, 1.7, 1.9, 2.0, 2.3, 3.1, 4.0, 6.5])
def test_resize_is_near_to_pillows_antialiased_bicubic(shrink):
    pixels = detailed(280, 420)
    target = (round(420 / shrink), round(280 / shrink * 1.1))  # one side shrinks a tenth less
    out = images.resize(pixels, *target).astype(int)
    wanted = np.asarray(PIL.Image.fromarray(pixels).resize(target, PIL.Image.Resampling.BICUBIC), np.int32)
    linear = cv2.resize(pixels, target, interpolation=cv2.INTER_LINEAR)
    assert out.shape == (target[1], target[0], 3)
    # detailed() has more of the highest frequencies than a photograph: 1.2 on average and 1.8 at worst on photographs.
    assert np.abs(out - wanted).mean() < 4
    assert np.abs(out - wanted).mean() < 0.7 * np.abs(linear - wanted).mean() or shrink < 1.2


@pytest.mark.parametrize("shape", [(10, 10), (7, 300), (300, 7), (1, 1), (400, 30)])
def test_resize_of_any_shape_keeps_a_flat_colour(shape):
    image = np.zeros((*shape, 3), np.uint8) + np.array([9, 99, 199], np.uint8)
    for target in ((48, 48), (5, 90), (1, 1), shape[::-1]):
        out = images.resize(image, *target)
        assert out.shape == (target[1], target[0], 3) and (out == (9, 99, 199)).all()


@pytest.mark.parametrize("width, height", [(48, 48), (100, 30), (37, 111), (150, 200), (299, 7)])
def test_resize_keeps_the_place_of_things(width, height):
    ramp = np.zeros((200, 300, 3), np.uint8)
    ramp[..., 0] = np.rint(np.linspace(20, 230, 300))[None, :]
    ramp[..., 1] = np.rint(np.linspace(20, 230, 200))[:, None]
    out = images.resize(ramp, width, height).astype(float)
    x, y = (np.arange(width) + 0.5) / width * 300 - 0.5, (np.arange(height) + 0.5) / height * 200 - 0.5
    inside = np.s_[2:-2, 2:-2] if height > 7 else np.s_[:, 2:-2]
    wanted = np.stack(np.broadcast_arrays(20 + 210 * x / 299, 20 + 210 * y[:, None] / 199), axis=-1)
    difference = (out[..., :2] - wanted)[inside]
    assert np.abs(difference).max() < 2 and np.abs(difference.mean((0, 1))).max() < 0.5  # rounded three times


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


@pytest.mark.parametrize("shape", [(401, 300), (97, 256), (48, 48), (31, 20)])
@pytest.mark.parametrize("crop", [1.0, 0.875])
def test_an_encoded_picture_is_fitted_like_its_pixels(shape, crop):
    jpeg = save(detailed(*shape), "JPEG", quality=90, subsampling=0)
    from_jpeg = images.decode_and_fit(jpeg, 48, crop).astype(int)
    from_pixels = images.fit(images.decode(jpeg), 48, crop)
    assert np.abs(from_jpeg - from_pixels).mean() < 1  # rounding, as in augmentation_test
    reduced = images.fit(images.decode(jpeg, min_side=round(48 / crop)), 48, crop)
    assert np.abs(from_jpeg - reduced).mean() < 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_is_fitted_upright(orientation):
    jpeg = save(detailed(301, 203), "JPEG", quality=90, subsampling=0, exif=turned(orientation))
    out = images.decode_and_fit(jpeg, 48).astype(int)
    assert np.abs(out - images.fit(images.decode(jpeg), 48)).mean() < 8  # trimmed at another side: half a pixel
    assert np.abs(out - images.fit(images.decode(save(images.decode(jpeg), "PNG")), 48)).mean() < 8
