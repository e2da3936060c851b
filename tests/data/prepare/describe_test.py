"""What `describe` says and shows of a data set."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest

from coca_jax.data import records
from coca_jax.data.prepare.describe import contact_sheet, describe, text
from coca_jax.data.records import DataError, Record
from tests import faulty
from tests.data.images import pictures
from tests.data.prepare import sets


def described(source: str, **settings):
    return describe(source, progress=False, **settings)


def test_everything(mixed):
    page = text(described(mixed, sample=0), 64)
    for wanted in (
        "40 records, all of them read",
        "width, pixels",
        "JPEG 23, PNG 13",
        "labels                 2: warm ",
        "4 of 40 cannot be used",
        "1  truncated: its picture ends before its end",
        "key-0: picture number 0  [warm]",
        "blank captions         1 left out",
    ):
        assert wanted in page, page
    assert "token" not in page


def test_a_sample(mixed):
    found = described(mixed, sample=10)
    assert found.statistics.records + found.statistics.bad == 10
    assert [record.key for record in found.examples][:2] == ["key-0", "key-4"]
    assert "40 records, 10 of them read, evenly over all" in text(found, 64)


def test_tokens(mixed, small_tokenizer, tmp_path):
    small_tokenizer.save(tmp_path / "t.model")
    found = described(mixed, sample=0, tokenizer=str(tmp_path / "t.model"))
    assert "caption, tokens" in text(found, 64)
    assert "cut at 3 tokens        100.00% of captions are longer" in text(found, 3)
    with pytest.raises(DataError, match="no such file"):
        described(mixed, tokenizer=str(tmp_path / "no.model"))


def test_nothing_can_be_used(tmp_path):
    records.write(tmp_path / "a", [records.pack(Record(f"{i}", b"", ("x",)), 1, 1) for i in range(3)])
    found = described(f"array_record:{tmp_path}/a")
    assert "3 of 3 cannot be used" in text(found, 64)
    with pytest.raises(DataError, match="there is no picture for it"):
        contact_sheet(found.examples, tmp_path / "sheet.jpg")


def test_texts_from_the_data_cannot_command_the_terminal(tmp_path):
    image = pictures.save(pictures.photo(20, 20), "PNG")
    evil = "red\x1b[31m\x07 and\r\nmore\u202e \ud7ff " + "x" * 500
    records.write(tmp_path / "a", [records.pack(Record(evil, image, (evil,), evil), 1, 1)])
    found = described(f"array_record:{tmp_path}/a")
    page = text(found, 64)
    assert all(c.isprintable() or c == "\n" for c in page)
    assert r"red\u001b[31m\u0007 and more\u202e \ud7ff" in page and max(map(len, page.splitlines())) < 200
    contact_sheet(found.examples, tmp_path / "sheet.jpg")


def test_contact_sheet(tmp_path):
    colors = {"red": (250, 10, 10), "green": (10, 200, 10), "blue": (10, 10, 250)}
    packed = []
    for i in range(11):
        name = list(colors)[i % 3]
        image = pictures.save(np.full((300, 200 + 300 * (i % 2), 3), colors[name], np.uint8), "PNG")
        packed.append(records.pack(Record(f"{i}", image, (f"a {name} surface, {'very ' * 60}plain",)), 1, 1))
    records.write(tmp_path / "a", packed)
    contact_sheet(described(f"array_record:{tmp_path}/a").examples, tmp_path / "sheet.jpg")
    with PIL.Image.open(tmp_path / "sheet.jpg") as opened:
        assert opened.format == "JPEG"
        sheet = np.asarray(opened.convert("RGB"), np.int32)
    assert sheet.shape[1] == 8 * 168 + 8 and sheet.shape[0] % 2 == 0
    height = (sheet.shape[0] - 8) // 2
    for i in range(16):
        top, left = 8 + i // 8 * height, 8 + i % 8 * 168
        wanted = list(colors.values())[i % 3] if i < 11 else (255, 255, 255)
        assert np.abs(sheet[top + 80, left + 80] - wanted).max() < 12, i
        letters = sheet[top + 162 : top + height - 8, left : left + 160]
        assert (letters.min() < 100) == (i < 11)  # something is written below, and inside of its place
        assert letters[:, -1].min() > 200
    with pytest.raises(DataError, match="cannot be written"):
        contact_sheet(described(f"array_record:{tmp_path}/a").examples, tmp_path / "no" / "sheet.jpg")


def test_a_contact_sheet_in_a_bucket(mixed):
    bucket, file = faulty.register(), "az://bucket/sheet.jpg"
    examples = described(mixed, sample=4).examples
    contact_sheet(examples, file)
    assert bucket.cat_file(file).startswith(b"\xff\xd8")
    bucket.faults["write"].append(faulty.Throttled("slow down"))  # no OSError
    with pytest.raises(DataError, match=f"{file} cannot be written: .*slow down; name another file"):
        contact_sheet(examples, file)
    with pytest.raises(DataError, match="nothing is read from memory:// or written to it"):
        contact_sheet(examples, "memory://bucket/sheet.jpg")


def test_describe_does_not_touch_the_set(mixed, tmp_path):
    source = sets.write_mixed(tmp_path / "set")
    before = sets.contents(tmp_path / "set")
    described(source)
    assert sets.contents(tmp_path / "set") == before
