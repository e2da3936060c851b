"""What makes a record unusable, and what becomes of a picture that is too large."""

from __future__ import annotations

import io

import numpy as np
import PIL.Image
import pytest

from coca_jax.data import images
from coca_jax.data.prepare.checking import check, in_words
from coca_jax.data.records import BadExample, Record
from tests.data.images import pictures
from tests.data.prepare import sets


def record(image: bytes | None = None, **fields) -> Record:
    if image is None:
        image = pictures.save(pictures.photo(60, 90), "JPEG")
    return Record(**{"key": "k", "image": image, "captions": ("a caption",)} | fields)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (record(key=""), "unreadable"),
        (record(key=7), "unreadable"),
        (record(image="a text"), "unreadable"),
        (record(captions=("fine", 3)), "unreadable"),
        (record(label=3), "unreadable"),
        (record(captions=("half a pair \ud800",)), "encoding"),
        (record(label="\udcff"), "encoding"),
        (record(captions=()), "no_caption"),
        (record(captions=("", "\t\u3000")), "no_caption"),
        (record(b""), "empty"),
        (record(b"GIF89a but no more"), "truncated"),
        (record(b"<html></html>"), "not_a_picture"),
        (record(pictures.save(pictures.photo(60, 90), "JPEG")[:700]), "truncated"),
        (record(pictures.save(PIL.Image.new("1", (10_000, 10_000)), "PNG")), "too_large"),
    ],
)
def test_bad_records(bad, reason):
    with pytest.raises(BadExample) as error:
        check(bad)
    assert error.value.reason in ((reason, "not_a_picture") if reason == "truncated" else (reason,))
    in_words(error.value).encode()


def test_messages_are_the_same_in_every_run():
    error = BadExample("not_a_picture", "cannot read <_io.BytesIO object at 0x7f70a21a16c0>\n of \udcff")
    assert in_words(error) == "cannot read <_io.BytesIO object> of \\udcff"


@pytest.mark.parametrize("max_side", [0, 90, 1000])
def test_small_enough_pictures_keep_their_bytes(max_side):
    gif = pictures.save(sets.drawing("P", 60, 90), "GIF", save_all=True, append_images=[sets.drawing("P", 60, 90)])
    turned = pictures.save(pictures.photo(60, 90), "JPEG", exif=pictures.turned(6))
    for image, kind, size in ((None, "JPEG", (90, 60)), (gif, "GIF", (60, 90)), (turned, "JPEG", (60, 90))):
        wanted = record(image)
        found = check(wanted, max_side)
        assert found.record == wanted
        assert (found.format, found.resized, found.width, found.height) == (kind, False, *size)


def test_blank_captions_are_left_out():
    found = check(record(captions=("one", " ", "two", "")))
    assert (found.record.captions, found.blank) == (("one", "two"), 2)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_photographs_become_jpeg(kind):
    pixels = pictures.photo(240, 320)
    found = check(record(pictures.save(pixels, kind)), max_side=100, quality=95)
    assert (found.width, found.height, found.resized, found.format) == (100, 75, True, kind)
    with PIL.Image.open(io.BytesIO(found.record.image)) as image:
        assert (image.format, image.size, image.mode) == ("JPEG", (100, 75), "RGB")
    wanted = np.asarray(PIL.Image.fromarray(pixels).resize((100, 75), PIL.Image.Resampling.BOX), np.int32)
    assert np.abs(images.decode(found.record.image).astype(np.int32) - wanted).mean() < 4
    worse = check(record(pictures.save(pixels, kind)), max_side=100, quality=30)
    assert len(worse.record.image) < len(found.record.image)


def test_a_turned_photograph_is_resized_upright():
    found = check(record(pictures.save(pictures.photo(240, 320), "JPEG", exif=pictures.turned(6))), max_side=100)
    assert images.decode(found.record.image).shape == (100, 75, 3)
    assert (found.width, found.height) == (75, 100)


@pytest.mark.parametrize(("mode", "see_through"), [("P", False), ("RGBA", True), ("LA", True)])
def test_drawings_become_png(mode, see_through):
    found = check(record(pictures.save(sets.drawing(mode), "PNG")), max_side=40)
    with PIL.Image.open(io.BytesIO(found.record.image)) as image:
        assert (image.format, image.size) == ("PNG", (40, 20))
        assert ("A" in image.mode) == see_through
    pixels = images.decode(found.record.image, background=(0, 0, 255))
    if see_through:
        assert pixels[10, 35].tolist() == [0, 0, 255]
        # Colours that hide under transparent pixels stay hidden, also at the border.
        assert (pixels[:, :, 1].max() if mode == "RGBA" else 0) <= 1
    else:
        assert np.abs(pixels[10, 35].astype(int) - (0, 255, 0)).max() < 30


def test_of_an_animation_the_first_frame_is_resized():
    frames = [sets.drawing("P"), sets.drawing("P").transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)]
    found = check(record(pictures.save(frames[0], "GIF", save_all=True, append_images=frames[1:])), max_side=40)
    assert images.decode(found.record.image)[10, 3].argmax() == 0  # red on the left


def test_extreme_shapes():
    found = check(record(pictures.save(np.zeros((2, 900, 3), np.uint8), "PNG")), max_side=100)
    assert (found.width, found.height) == (100, 1)
