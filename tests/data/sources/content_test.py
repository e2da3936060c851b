"""What a source's digests notice, in every kind: other bytes of the same size, and nothing where a set was copied."""

from __future__ import annotations

import io
import pathlib
import shutil
import tarfile
from collections.abc import Callable

import fsspec
import pytest

from coca_jax.data import records
from coca_jax.data.mixture import open_mixture
from coca_jax.data.records import Record
from coca_jax.data.sources import content, files, open_source
from tests import pairs

EXAMPLES = [(pairs.png(pairs.picture(color, shape)), pairs.caption(color, shape)) for color, shape in pairs.examples()]


def write_array_record(folder: pathlib.Path) -> str:
    packed = [records.pack(Record(f"{n}", image, (text,)), 24, 24) for n, (image, text) in enumerate(EXAMPLES)]
    records.write(folder / "set.array_record", packed)
    return "array_record:set.array_record"


def write_tar(folder: pathlib.Path) -> str:
    with tarfile.open(folder / "set.tar", "w") as tar:
        for number, (image, text) in enumerate(EXAMPLES):
            for name, data in ((f"{number:03}.png", image), (f"{number:03}.txt", text.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return "webdataset:set.tar"


def write_parquet(folder: pathlib.Path) -> str:
    pytest.importorskip("pyarrow.parquet")
    import pyarrow.parquet

    table = pyarrow.table({"image": [image for image, _ in EXAMPLES], "caption": [text for _, text in EXAMPLES]})
    pyarrow.parquet.write_table(table, folder / "set.parquet", compression="NONE")
    return "parquet:set.parquet"


def write_folder(folder: pathlib.Path) -> str:
    for number, (image, _) in enumerate(EXAMPLES):
        name = ("cat", "dog")[number % 2]
        (folder / name).mkdir(exist_ok=True)
        (folder / name / f"{number:03}.png").write_bytes(image)
    return "folder:."


KINDS = {
    "set.array_record": write_array_record,
    "set.tar": write_tar,
    "set.parquet": write_parquet,
    "dog/003.png": write_folder,
}


@pytest.mark.parametrize("name", KINDS)
def test_other_bytes_of_the_same_size_are_noticed_by_name_and_other_times_are_not(
    name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one").mkdir()
    monkeypatch.chdir(tmp_path / "one")
    spec = KINDS[name](tmp_path / "one")
    before = content.of_source(open_source(spec))
    assert name in before and content.LIST in before
    # A copy has other times.
    shutil.copytree(tmp_path / "one", tmp_path / "two", copy_function=shutil.copyfile)
    monkeypatch.chdir(tmp_path / "two")
    assert content.of_source(open_source(spec)) == before
    path = tmp_path / "two" / name
    data = bytearray(path.read_bytes())
    at = data.find(b"IDAT") + 8  # inside of an image
    data[at] ^= 0xFF
    path.write_bytes(data)
    after = content.of_source(open_source(spec))
    assert {key for key in before if before[key] != after[key]} == {name}
    named = content.of_source(open_mixture(spec))
    assert {key.removeprefix(f"{spec}: ") for key in named} == set(after)


def test_templates_and_class_names_are_part_of_it(tmp_path: pathlib.Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "templates.txt").write_text("a photo of a {}.\n")
    (tmp_path / "classes.json").write_text('{"cat": "kitten", "dog": "puppy"}')
    spec = f"folder:{tmp_path}?templates={tmp_path}/templates.txt&classes={tmp_path}/classes.json"

    def changed(change: Callable[[], object]) -> set[str]:
        before = content.of_source(open_source(spec))
        change()
        after = content.of_source(open_source(spec))
        return {key for key in before if before[key] != after[key]}

    assert changed(lambda: (tmp_path / "templates.txt").write_text("a photo of the {}.\n")) == {"?templates="}
    assert changed(lambda: (tmp_path / "classes.json").write_text('{"cat": "puppy", "dog": "kitten"}')) == {"?classes="}
    assert changed(lambda: None) == set()


def test_a_text_beside_an_image_is_part_of_it(tmp_path: pathlib.Path) -> None:
    for number, (image, text) in enumerate(EXAMPLES):
        (tmp_path / f"{number:03}.png").write_bytes(image)
        (tmp_path / f"{number:03}.txt").write_text(text)
    before = content.of_source(open_source(f"folder:{tmp_path}"))
    (tmp_path / "003.txt").write_text(EXAMPLES[3][1].replace("a", "A"))
    after = content.of_source(open_source(f"folder:{tmp_path}"))
    assert {key for key in before if before[key] != after[key]} == {"003.txt"}


@pytest.mark.parametrize("remote", [False, True])
def test_little_is_read_of_large_sets(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, remote: bool) -> None:
    """Of 1,000 files with 10 GB in all; the two ends of a file are always among it."""
    most, piece, total = content._REMOTE if remote else content._LOCAL
    asked: list[tuple[int, int]] = []
    size = 10 << 20

    class Store:
        def cat_file(self, path: str, start: int, end: int) -> bytes:
            asked.append((start, end - start))
            return b"x" * (end - start)

    def read(path: str, start: int, length: int) -> bytes:
        asked.append((start, length))
        return b"x" * length

    monkeypatch.setattr(files, "store", lambda path: (Store(), path))
    monkeypatch.setattr(files.HANDLES, "read", read)
    top = "memory://set" if remote else str(tmp_path)
    found = content.of_files([files.File(f"{top}/{n:04}.tar", size, "") for n in range(1000)])
    assert len(found) == most and {"0000.tar", "0999.tar"} <= found.keys()
    assert sum(length for _, length in asked) <= total and all(length == piece for _, length in asked)
    assert len(asked) <= (48 if remote else 512) and {start for start, _ in asked} >= {0, size - piece}
    asked.clear()
    content.of_files([files.File(f"{top}/one.tar", 10 << 30, "")])
    assert len(asked) == total // piece and {start for start, _ in asked} >= {0, (10 << 30) - piece}


def test_a_bucket_gives_the_digests_of_the_whole_small_files_too() -> None:
    system = fsspec.filesystem("memory")
    system.pipe("/digests/a/one.bin", b"1" * 5000)
    system.pipe("/digests/b/one.bin", b"1" * 4999 + b"2")
    urls = [f"memory://digests/{name}/one.bin" for name in "ab"]
    one, other = (content.of_files([files.look(url)]) for url in urls)
    assert one.keys() == other.keys() and one != other
