"""Files of captions: each row names an image and has its texts, whatever program wrote them."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from coca_jax.data import opening
from coca_jax.data.records import BadExample, DataError
from coca_jax.data.sources import delimited, files
from coca_jax.data.sources.base import (
    CAPTION_NAMES,
    IMAGE_NAMES,
    LABEL_NAMES,
    Spec,
    choose,
    named,
    one_line,
    plain,
    texts,
)
from coca_jax.data.sources.delimited import Delimited, Problem
from coca_jax.data.sources.parquet import _pyarrow

# Rows of one file: each takes 0.9 KB of memory.
MAX_ROWS = 10_000_000
_WHOLE = 4 << 30  # bytes of a JSON or Parquet file of captions, unpacked; COCO's has 144 MB
# What a file's ending promises to hold between its fields.
_SEPARATED = {".csv": ",", ".tsv": "\t", ".tab": "\t", ".txt": ",", ".token": "\t", ".psv": "|"}
ENDINGS = (*_SEPARATED, ".jsonl", ".ndjson", ".json", ".parquet")
_NUMBERS = ("image_id", "img_id", "id", "key")  # with images where these are called by them
_BLANK = b"\xef\xbb\xbf \t\r\n"  # before JSON
SPLIT_NAMES = ("split", "subset", "partition")


def is_image_column(column: str) -> bool:
    """Whether a column is one with images by its name; `*_file_name` and `*_file_names` are Hugging Face's."""
    name = plain(column)
    return name in IMAGE_NAMES or name.endswith(("file_name", "file_names"))


class Row(NamedTuple):
    """A line of a file of captions.

    Attributes:
      line: its number, from 1; of JSON and Parquet that of the element.
      images: one name, or those of a clip's frames.
      captions: undecodable bytes are surrogates in them.
      label: raw.
      problem: (reason, what is wrong) where the line cannot be used.
      split: what the file says of it.
    """

    line: int
    images: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()
    label: str = ""
    problem: Problem | None = None
    split: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """A file of captions.

    Attributes:
      path: of the file.
      rows: in its order.
      notes: what was found about its form.
    """

    path: str
    rows: list[Row]
    notes: tuple[str, ...]


def read_table(spec: Spec, path: str, exists: Callable[[str], bool], limit: int | None = None) -> Table:
    """Reads a file of captions.

    Args:
      spec: options `image`, `caption` (several with commas), `question` and `label` name columns.
      path: the file.
      exists: whether a text names an image that is there, by which columns and separators are told.
      limit: how many rows are read; None: all.

    Raises:
      DataError: the file cannot be read, is of no known form, or has no column with images, or none with texts.
    """
    ending = posixpath.splitext(path.lower())[1]
    form = Delimited()
    if ending not in ENDINGS:
        raise DataError(f"{path}: captions are read from {', '.join(ENDINGS[:-1])} and {ENDINGS[-1]} files")
    found: Iterable[tuple[int, Any]]
    try:
        if ending in (".jsonl", ".ndjson"):
            found = _json_lines(path)
        elif ending == ".json":
            found = _json(path)
        elif ending == ".parquet":
            found = _parquet(path)
        else:
            found = delimited.rows(files.parts(path), _SEPARATED[ending], _known(spec), exists, plain, form)
        rows = list(itertools.islice(found, MAX_ROWS + 1 if limit is None else limit))
    except files.UnusableFile:
        raise
    except OSError as error:
        raise DataError(f"{path} cannot be read: {one_line(error)}") from error
    if len(rows) > MAX_ROWS:
        raise DataError(
            f"{path} has more than {MAX_ROWS:,} rows, and memory holds them all: write tar shards or Parquet, "
            "or in several folders, each with its file"
        )
    there = form.columns or list(dict.fromkeys(name for _, row in rows if isinstance(row, dict) for name in row))
    if not there and any(isinstance(row, dict) for _, row in rows):
        raise DataError(f"{path}: its rows have no columns")
    image, captions, label = _choose_columns(spec, path, there, rows, exists)
    split = choose(spec, "", there, SPLIT_NAMES, path)
    return Table(path, [_row(line, row, image, captions, label, split) for line, row in rows], tuple(form.notes))


def _known(spec: Spec) -> frozenset[str]:
    return frozenset((*IMAGE_NAMES, *map(plain, spec.options.get("image", ()))))


def _choose_columns(
    spec: Spec, path: str, there: Sequence[str], rows: Sequence[tuple[int, Any]], exists: Callable[[str], bool]
) -> tuple[str, tuple[str, ...], str]:
    """The columns of images, of captions and of labels."""
    image = choose(spec, "image", there, (), path) if spec.get("image") else ""
    if not image:
        usual = [name for known in IMAGE_NAMES for name in there if plain(name) == known]
        usual += [name for name in there if is_image_column(name) and name not in usual]
        sample = [row for _, row in rows[:200] if isinstance(row, dict)]
        usual += [name for name in there if plain(name) in _NUMBERS and any(exists(str(r.get(name))) for r in sample)]
        real = (name for name in usual if any(exists(str(row.get(name)).strip()) for row in sample))
        image = next(real, usual[0] if usual else "")
    option = "question" if spec.get("question") else "caption"
    wanted = spec.get(option)
    if wanted:
        asked = (wanted,) if wanted in there else spec.fields(option)
        captions = tuple(named(name, option, there, path) for name in asked)
    else:
        one = choose(spec, "", there, CAPTION_NAMES, path)
        numbered = [name for name in there if re.fullmatch(r"(caption|sentence|text)s?_?\d+", plain(name))]
        captions = (one,) if one else tuple(numbered)
    label = choose(spec, "label", there, LABEL_NAMES, path)
    if there and not (image and (any(captions) or label)):
        raise DataError(
            f"{path}: no column of {'captions or labels' if image else 'pictures'}; there are "
            f"{', '.join(there)}: name them by ?image= and ?caption= (or ?label=)"
        )
    return image, captions, label


def _row(line: int, row: Any, image: str, captions: Sequence[str], label: str, split: str) -> Row:
    if isinstance(row, tuple):
        return Row(line, problem=row)
    called, said = row.get(image), row.get(label)
    if isinstance(said, list) or (isinstance(said, str) and said.startswith("[")):
        said = labels[0] if len(labels := texts(said)) == 1 else labels
    if type(called) is str and (called := called.strip()) and len(captions) == 1 and not label and not split:
        return Row(line, (called,), _texts(row.get(captions[0])))
    if isinstance(called, dict):  # Hugging Face's image: {"bytes": None, "path": "a.jpg"}
        called = called.get("path")
    images = tuple(name.strip() for name in called if isinstance(name, str)) if isinstance(called, list) else ()
    if isinstance(called, list) and (len(images) < len(called) or not all(images)):
        images = ()
    elif isinstance(called, str | int) and str(called).strip():
        images = (str(called).strip(),)
    if not images:
        return Row(line, problem=("unreadable", "the line names no picture"))
    found = tuple(text for column in captions for text in _texts(row.get(column)))
    text = str(said).strip() if isinstance(said, str | int) else ""
    if isinstance(said, tuple) and len(said) > 1 and not found:
        many = f"it has {len(said)} labels and no caption: name a column with one by ?label="
        return Row(line, problem=("no_caption", many))
    return Row(line, images, found, text, split=str(row.get(split) or "").strip())


def _texts(value: Any) -> tuple[str, ...]:
    """Captions in a value: a text, a list of texts, or of objects with one, as COCO and Karpathy write them."""
    if isinstance(value, dict):
        return next((found for name in CAPTION_NAMES if (found := texts(value.get(name)))), ())
    if isinstance(value, list) and any(isinstance(one, dict) for one in value):
        return tuple(text for one in value for text in _texts(one))
    return texts(value)


# ---------------------------------------------------------------------------------------------------------------------
# JSON and Parquet


def _json_lines(path: str) -> Iterator[tuple[int, Any]]:
    """Line number and fields of each line; (reason, what is wrong) in their place where it cannot be read.

    A list of objects, whatever the file is called, is read as such.
    """
    if next(files.parts(path), b"").lstrip(_BLANK)[:1] == b"[":
        yield from _json(path)
        return
    for line, data in enumerate(opening.lines(delimited.utf8(files.parts(path))), 1):
        if data is None:
            yield line, ("unreadable", "the line is too long")
            continue
        if not data.strip():
            continue
        try:
            row = json.loads(data.decode("utf-8"))
        except UnicodeDecodeError as error:
            yield line, ("encoding", f"it is not UTF-8: {one_line(error)}")
        except (ValueError, RecursionError) as error:
            yield line, ("unreadable", f"it is not JSON: {one_line(error)}")
        else:
            yield line, row if isinstance(row, dict) else ("unreadable", "it is no JSON object")


def _json(path: str) -> Iterator[tuple[int, Any]]:
    """The rows of a JSON file: COCO's own, a list of objects, an object of columns, or of captions by image.

    Raises:
      DataError: it is none of them.
    """
    data = files.read(path, _WHOLE, "such a file")
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        first = data.lstrip(_BLANK).partition(b"\n")[0]
        if first[:1] == b"{" and first.rstrip()[-1:] == b"}":  # lines of JSON, whatever the file is called
            yield from _json_lines(path)
            return
        raise DataError(f"{path} is not JSON: {one_line(error)}") from error
    if isinstance(found, dict) and isinstance(found.get("images"), list):
        if isinstance(found.get("annotations"), list):
            found = _coco(path, found)
        elif any(isinstance(image, dict) and "sentences" in image for image in found["images"][:10]):
            raise DataError(f"{path} has Karpathy's splits: write karpathy:{path}?split=train and ?root= of the images")
    if isinstance(found, dict):
        lists = [value for value in found.values() if isinstance(value, list)]
        columns = any(map(is_image_column, found)) and len(lists) == len(found) > 1
        if columns and len(set(map(len, lists))) == 1:
            found = [dict(zip(found, values, strict=True)) for values in zip(*lists, strict=True)]
        elif len(objects := [rows for rows in lists if rows and isinstance(rows[0], dict)]) == 1:
            found = objects[0]
        elif not lists or not any(map(is_image_column, found)):
            found = [
                {"image": name, **value} if isinstance(value, dict) else {"image": name, "caption": value}
                for name, value in found.items()
            ]
    if not isinstance(found, list) or not any(isinstance(row, dict) for row in found):
        raise DataError(
            f'{path} is no file of captions: it must be a list of {{"image": ..., "caption": ...}}, captions by image, '
            "or COCO's with `images` and `annotations`"
        )
    for number, row in enumerate(found, 1):
        yield number, row if isinstance(row, dict) else ("unreadable", "it is no JSON object")


def _coco(path: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each of COCO's `images`, with the captions of its `annotations`."""
    captions: dict[Any, list[str]] = {}
    for one in found["annotations"]:
        if isinstance(one, dict) and isinstance(one.get("image_id"), int | str):
            captions.setdefault(one["image_id"], []).extend(texts(one.get("caption")))
    if not any(captions.values()):
        raise DataError(f"{path}: none of its annotations has a `caption`: name COCO's captions_*.json")
    images = [image for image in found["images"] if isinstance(image, dict)]
    rows = [{**image, "caption": captions.get(image.get("id"), [])} for image in images]
    return [{name: row[name] for name in ("file_name", "caption", "split") if name in row} for row in rows]


def _parquet(path: str) -> Iterator[tuple[int, Any]]:
    pyarrow = _pyarrow()
    data = files.read(path, _WHOLE, "such a file")
    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(data))
        groups = [file.metadata.row_group(n).total_byte_size for n in range(file.metadata.num_row_groups)]
        if sum(groups) > _WHOLE:
            raise DataError(f"{path} unpacks to {sum(groups):,} bytes, more than {_WHOLE:,}: write it in several files")
        number = 0
        for batch in file.iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.lib.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {one_line(error)}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Texts beside images


def read_sidecar(root: str, path: str, where: str) -> tuple[str, ...]:
    """The captions in a file beside an image: all of a text, or a JSON object's caption.

    Raises:
      BadExample: it cannot be read.
      DataError: it leads out of the folder.
    """
    data = files.picture(root, path, where)
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        data = data.decode("utf-16", "replace").encode()
    try:
        text = data.decode("utf-8-sig").replace("\0", "").strip()
        found = json.loads(text) if path.lower().endswith(".json") else text
    except UnicodeDecodeError as error:
        raise BadExample("encoding", f"{where}: {path} is not UTF-8: {one_line(error)}") from error
    except (ValueError, RecursionError) as error:
        raise BadExample("unreadable", f"{where}: {path} is not JSON: {one_line(error)}") from error
    return _texts(found)
