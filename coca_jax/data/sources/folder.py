"""A folder of pictures, with a file of captions or with one folder for each class."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, SupportsIndex

from absl import logging

from coca_jax.data.records import BadExample, DataError, Record
from coca_jax.data.sources import files
from coca_jax.data.sources.base import (
    CAPTION_NAMES,
    IMAGE_EXTENSIONS,
    IMAGE_NAMES,
    LABEL_NAMES,
    READ_EXTENSIONS,
    Spec,
    choose,
    digest,
    one_line,
    texts,
)

# Looked for in this order; metadata.* are Hugging Face's.
CAPTION_FILES = tuple(f"{stem}.{end}" for stem in ("captions", "metadata") for end in ("csv", "tsv", "jsonl"))


@dataclasses.dataclass
class _Entry:
    """A picture, or a line that names none.

    Attributes:
      path: relative to the folder; empty where `problem` says why there is none. Of a clip that of its first frame.
      line: where it is first named; 0 where no file names it.
      captions: undecodable bytes are surrogates in them.
      label: raw.
      problem: (reason, what is wrong) with the line.
      frames: paths of a clip's frames after the first.
    """

    path: str
    line: int
    captions: list[str]
    label: str = ""
    problem: tuple[str, str] | None = None
    frames: tuple[str, ...] = ()


class Folder:
    """Pictures under a folder. A random one costs the opening of its file.

    With a file of captions its lines are the records, in their order; several lines with one picture are one record
    with several captions. In a .jsonl the picture may be a list of them, the frames of a clip in order. Without, the
    records are the pictures in the order of their paths, and the first folder on
    the path is the label.

    Args:
      spec: location is the folder; options are `captions` (a file, relative to the folder unless absolute), and
        `image`, `caption`, `label`, which name its columns; `question` names one like `caption`, and every line is then
        a record, whose label is the answer.

    Raises:
      DataError: no such folder or file, no column with the pictures, a picture's path that leaves the folder.
    """

    tokenizer_path = None
    attribution = ""
    class_names: Mapping[str, Sequence[str]] | None = None

    def __init__(self, spec: Spec):
        self.name = spec.text
        self._root = spec.location.rstrip("/") or "/"
        self._asks = bool(spec.get("question"))
        self._captions = _captions_file(spec, self._root)
        if self._captions:
            try:
                content = files.read(self._captions, limit=1 << 40)
            except OSError as error:
                raise DataError(f"{self._captions} cannot be read: {one_line(error)}") from error
            self._entries = _listed(spec, self._root, self._captions, content)
            self._fingerprint = digest(["folder", len(content), len(self._entries), *_described(self._entries)])
        else:
            sizes = _pictures(self._root)
            if not sizes:
                raise DataError(f"{spec.text}: no {', '.join(READ_EXTENSIONS)} file in {self._root}")
            if not any("/" in path for path in sizes):
                names = ", ".join(CAPTION_FILES)
                raise DataError(
                    f"{spec.text}: the pictures in {self._root} have neither captions ({names}, or ?captions=FILE) "
                    "nor a folder for each class"
                )
            self._entries = [_Entry(path, 0, [], path.partition("/")[0] if "/" in path else "") for path in sizes]
            self._fingerprint = digest(["folder", len(sizes), *(f"{path} {size}" for path, size in sizes.items())])

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: SupportsIndex) -> Record:
        entry = self._entries[index]
        where = f"{self._captions} line {entry.line}" if entry.line else f"{self._root}: {entry.path!r}"
        if entry.problem:
            raise BadExample(entry.problem[0], f"{where}: {entry.problem[1]}")
        captions = tuple(caption for caption in entry.captions if caption.strip())
        if any("\udc80" <= char <= "\udcff" for text in (*captions, entry.label) for char in text):
            raise BadExample("encoding", f"{where}: the text of {entry.path!r} is not UTF-8")
        if not captions and not entry.label:
            raise BadExample("no_caption", f"{where}: {entry.path!r} has no caption")
        image = files.picture(self._root, entry.path, where)
        frames = tuple(files.picture(self._root, frame, where) for frame in entry.frames)
        key = f"{entry.path}:{entry.line}" if self._asks else entry.path
        return Record(key, image, captions, entry.label, frames=frames)

    def __repr__(self) -> str:
        return f"Folder({self.name})"

    def fingerprint(self) -> str:
        """16 hexadecimal digits of names, captions and labels; without a file of captions, of names and sizes."""
        return self._fingerprint


def _described(entries: Sequence[_Entry]) -> Iterator[str]:
    for entry in entries:
        yield repr((entry.path, entry.captions, entry.label, *([entry.frames] if entry.frames else [])))


def _captions_file(spec: Spec, root: str) -> str:
    """The file of captions; empty where the folder has none."""
    if not files.is_remote(root) and not os.path.isdir(root):
        raise DataError(f"{spec.text}: no folder {root}; write folder:PATH with the pictures in it")
    if name := spec.get("captions"):
        path = name if files.is_remote(name) or os.path.isabs(name) else f"{root}/{name}"
        try:
            return files.look(path).path
        except files.UnusableFile:
            raise
        except OSError:
            raise DataError(
                f"{spec.text}: no file {path}; ?captions= is a path in the folder, or an absolute one"
            ) from None
    for name in CAPTION_FILES:
        try:
            return files.look(f"{root}/{name}").path
        except OSError:
            continue
    if unused := [name for name in ("image", "caption", "question", "label") if spec.get(name)]:
        raise DataError(
            f"{spec.text}: ?{unused[0]}= names a column, and there is no {', '.join(CAPTION_FILES)} in {root}; "
            "name the file by ?captions=FILE"
        )
    return ""


def _pictures(root: str) -> dict[str, int]:
    """Sizes of the pictures under a folder, by their paths relative to it, in the order of those."""
    found: dict[str, int] = {}
    if files.is_remote(root):
        files.forget_listings(root)
        system, top = files.store(root)
        try:
            listed = system.find(top, detail=True)
        except OSError as error:
            raise DataError(f"{root} cannot be listed: {one_line(error)}") from error
        for path, info in listed.items():
            found[path.removeprefix(top).lstrip("/")] = int(info["size"])
    else:
        folders = [""]
        while folders:
            folder = folders.pop()
            with os.scandir(os.path.join(root, folder)) as entries:
                for entry in entries:
                    path = f"{folder}/{entry.name}" if folder else entry.name
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(path)
                    elif entry.is_dir():  # it may leave the folder, or lead back to where it is
                        text = "%s is a link to a folder, which is not followed: move or mount the pictures there"
                        logging.warning(text, entry.path)
                    elif entry.is_file():
                        found[path] = entry.stat().st_size
    ends = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
    return {
        path: found[path]
        for path in sorted(found)
        if path.lower().endswith(ends) and not path.rpartition("/")[2].startswith(".")
    }


# ---------------------------------------------------------------------------------------------------------------------
# Files of captions


def _listed(spec: Spec, root: str, path: str, content: bytes) -> list[_Entry]:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path} is UTF-16: save it as UTF-8")
    content = content.removeprefix(b"\xef\xbb\xbf")
    lower = path.lower()
    if lower.endswith((".jsonl", ".ndjson")):
        rows: Iterable[tuple[int, Any]] = _json_lines(content)
    elif lower.endswith((".csv", ".tsv")):
        rows = _table(path, content, "\t" if lower.endswith(".tsv") else ",")
    else:
        raise DataError(f"{path}: captions are read from .csv, .tsv and .jsonl files")
    rows = list(rows)
    there = list(dict.fromkeys(column for _, row in rows if isinstance(row, dict) for column in row))
    image_column = choose(spec, "image", there, IMAGE_NAMES, path)
    text_columns = [
        choose(spec, "question", there, (), path) or choose(spec, "caption", there, CAPTION_NAMES, path),
        choose(spec, "label", there, LABEL_NAMES, path),
    ]
    if there and not (image_column and any(text_columns)):
        raise DataError(
            f"{path}: no column of {'captions or labels' if image_column else 'pictures'}; there are "
            f"{', '.join(there)}: name them by ?image= and ?caption= (or ?label=)"
        )
    entries: dict[Any, _Entry] = {}
    for line, row in rows:
        if isinstance(row, tuple):
            entries[line] = _Entry("", line, [], problem=row)
            continue
        image, captions, label = (row.get(column) for column in (image_column, *text_columns))
        frames: tuple[str, ...] = ()
        if isinstance(image, list) and all(isinstance(frame, str) and frame.strip() for frame in image):
            image, *rest = image or [""]
            frames = tuple(frame.strip() for frame in rest)
            for frame in frames:
                files.inside(root, frame, f"{path} line {line}", links=False)
        if not isinstance(image, str) or not image.strip():
            entries[line] = _Entry("", line, [], problem=("unreadable", "the line names no picture"))
            continue
        image = image.strip()
        try:
            os.fsencode(image)
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold
            entries[line] = _Entry("", line, [], problem=("unreadable", f"{image[:40]!r} cannot be a file's name"))
            continue
        files.inside(root, image, f"{path} line {line}", links=False)  # links at reading: there may be millions
        key = line if spec.get("question") else (image, *frames)  # each question has an answer of its own
        entry = entries.setdefault(key, _Entry(image, line, [], frames=frames))
        entry.captions += texts(captions)
        if isinstance(label, str | int) and not entry.label:
            entry.label = str(label).strip()
    return list(entries.values())


def _table(path: str, content: bytes, delimiter: str) -> Iterator[tuple[int, Any]]:
    """Line number and columns of each row. Bytes that are not UTF-8 become surrogates, which reading then meets."""
    reader = csv.reader(io.StringIO(content.decode("utf-8", "surrogateescape"), newline=""), delimiter=delimiter)
    try:
        header = [name.strip() for name in next(reader, [])]
        line = reader.line_num + 1
        for row in reader:
            if row:
                yield line, dict(zip(header, row, strict=False))
            line = reader.line_num + 1  # a row may have line ends in it
    except csv.Error as error:
        raise DataError(f"{path} line {reader.line_num}: {one_line(error)}; is a quotation mark left open?") from None


def _json_lines(content: bytes) -> Iterator[tuple[int, Any]]:
    """Line number and fields of each line; (reason, what is wrong) in their place where it cannot be read."""
    for line, data in enumerate(content.split(b"\n"), 1):
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


def open_folder(spec: Spec) -> Folder:
    """See `open_source`."""
    known = ("captions", "image", "caption", "question", "label", "template", "templates", "classes")
    spec.check(known, ("template",))
    return Folder(spec)
