"""Parquet files with pictures, or with paths of pictures, in a column."""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, SupportsIndex

import numpy as np

from coca_jax.data import label_names
from coca_jax.data.records import BadExample, DataError, Record
from coca_jax.data.sources import columns, content, files, patience
from coca_jax.data.sources.base import MAX_BYTES, Spec, digest, one_line, texts
from coca_jax.data.sources.files import File

_KEPT = 2  # row groups that each thread keeps
# Bytes of what is read of a row group, unpacked, up to which it is read whole. A file of some KB can claim any size.
_WHOLE = 1 << 30
_PART = 256 << 20  # bytes of the parts in which larger ones are read, from their beginning on
_BUFFER = 1 << 20
_VALUES = 1 << 24  # of a column


class _Part(NamedTuple):
    """Rows of a row group, from `start` on."""

    start: int
    table: Any

    def holds(self, row: int) -> bool:
        return self.start <= row < self.start + int(self.table.num_rows)


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"Parquet files need pyarrow ({error}): pip install 'coca_jax[parquet]'") from error
    return pyarrow


class Parquet:
    """Rows of Parquet files, one file after the other.

    A row can only be had by reading the columns of its whole row group, which is then kept for the next rows: reading
    in order is fast, but a random row costs a row group, of which each thread holds two. Shuffled training from large
    row groups is slow and takes memory: convert such sets with `coca_jax.data.prepare`. Row groups that unpack to more
    than 1 GiB are read in parts, from their beginning on: a random row of one costs seconds, which is said.

    The image is bytes, a struct with `bytes` and `path` as Hugging Face writes it, or a path relative to the file or
    to `?root=`; a list of these are the frames of a clip. Numbers that Hugging Face's metadata name are labels by name.

    Args:
      spec: its options are `image`, `caption` (columns of texts, or of lists of texts), `label`, `root`; see `columns`.
      found: the files, in order.

    Raises:
      DataError: pyarrow is not installed, a file cannot be read, has no such columns, or has others than the first.
    """

    tokenizer_path = None
    attribution = ""
    class_names: Mapping[str, Sequence[str]] | None = None

    def __init__(self, spec: Spec, found: Sequence[File]):
        self.name = spec.text
        self._files, self._names, self._root = list(found), files.short_names(found), spec.get("root")
        _pyarrow()
        footers = files.each(_footer, self._files, "reading footers", "files")
        first, where = footers[0], self._files[0].path
        self._chosen = columns.choose_columns(spec, first.schema, where)
        self._columns = self._chosen.columns
        self.remarks = list(self._chosen.remarks)
        if (largest := max((footer.largest for footer in footers), default=0)) > _WHOLE:
            self.remarks.append(
                f"row groups unpack to {largest / 2**30:.1f} GiB: a random record costs seconds; to train, write "
                "smaller row groups (pyarrow: row_group_size), or convert with coca_jax.data.prepare"
            )
        # Left as numbers into the values that differ: one picture a million times over takes the memory of one.
        self._dictionaries = [leaf for leaf in first.texts if self._is_read(leaf)]
        if self._chosen.names:
            self.class_names = label_names.class_names_of(self._chosen.names) or None
        groups = []  # file, row group in it, rows
        for number, (file, footer) in enumerate(zip(self._files, footers, strict=True)):
            if missing := [column for column in self._columns if column not in footer.schema.names]:
                raise DataError(
                    f"{file.path}: no column {missing[0]!r}, which {where} has: open it as a source of its own"
                )
            if self._chosen.names and columns.names_of(footer.schema, self._chosen.label) != self._chosen.names:
                raise DataError(
                    f"{file.path}: its classes have other names than those of {where}: open it as a source of its own"
                )
            groups += [(number, group, count) for group, count in enumerate(footer.rows)]
        self._groups = np.array(groups, np.int64).reshape(-1, 3)
        self._ends = np.cumsum(self._groups[:, 2])
        self._local = threading.local()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: SupportsIndex) -> Record:
        number = range(len(self))[index.__index__()]
        place = int(np.searchsorted(self._ends, number, side="right"))
        file_number, group, count = self._groups[place].tolist()
        row = number - (int(self._ends[place]) - count)
        file = self._files[file_number]
        where = f"{file.path}: row {row} of row group {group}"
        table, at = self._table(place, row)
        try:
            found = {name: table.column(name)[at].as_py() for name in self._columns}
        except UnicodeDecodeError as error:
            raise BadExample("encoding", f"{where}: its text is not UTF-8: {one_line(error)}") from None
        written = [text for path in self._chosen.captions for text in columns.values(found[path[0]], path[1:])]
        captions = texts([_as_text(text, where) for text in written])
        label, many = self._label(found, where)
        if not captions and not label:
            problem = f"{many} labels and no caption: name a column with one by ?label=" if many > 1 else "no caption"
            raise BadExample("no_caption", f"{where} has {problem}")
        image, *frames = self._images(found[self._chosen.image], file, where)
        return Record(f"{self._names[file_number]}:{group}:{row}", image, captions, label, frames=tuple(frames))

    def _label(self, found: Mapping[str, Any], where: str) -> tuple[str, int]:
        """The label of a row, and how many there are; empty where that is not one."""
        if not (path := self._chosen.label):
            return "", 0
        labels = [_as_text(value, where) for value in columns.values(found[path[0]], path[1:])]
        if len(labels) != 1:
            return "", len(labels)
        label, names = labels[0], self._chosen.names
        if isinstance(label, float) and label.is_integer():  # what pandas makes of whole numbers, some of them missing
            label = int(label)
        if names and isinstance(label, int):
            return names[label].strip() if 0 <= label < len(names) else "", 1  # -1: it has none
        return str(label).strip() if isinstance(label, str | int) else "", 1

    def __repr__(self) -> str:
        return f"Parquet({self.name})"

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._local = threading.local()

    def fingerprint(self) -> str:
        """16 hexadecimal digits of the files' names and sizes, the rows of each row group, and the columns."""
        described = (f"{file.name} {file.size}" for file in self._files)
        chosen = self._chosen
        # As it was before one could name fields and several columns, where none are.
        more = [path for path in (*chosen.captions, chosen.label) if len(path) > 1] or len(chosen.captions) > 1
        parts = [chosen.captions, chosen.label] if more else []
        parts += [chosen.names] if chosen.names else []
        return digest(["parquet", self._columns, self._root, *described, self._groups.tolist(), *parts])

    def contents(self) -> dict[str, str]:
        """See Source."""
        return {content.LIST: self.fingerprint()} | content.of_files(self._files)

    def _is_read(self, leaf: str) -> bool:
        return any(leaf == column or leaf.startswith(column + ".") for column in self._columns)

    def _table(self, place: int, row: int) -> tuple[Any, int]:
        """A table with that row of a row group, and the row's number in it."""
        local = self._local
        if not hasattr(local, "kept"):
            local.kept, local.going, local.at = collections.OrderedDict(), None, -1
        kept: collections.OrderedDict[int, _Part] = local.kept
        number, group, _ = self._groups[place].tolist()
        file = self._files[number]
        if place in kept and kept[place].holds(row):
            kept.move_to_end(place)
            return kept[place].table, row - kept[place].start
        begun = local.at == place and place in kept and row >= kept[place].start
        kept.pop(place, None)
        while len(kept) >= _KEPT:  # before the next is read: only so many are held
            kept.popitem(last=False)
        try:
            if files.look(file.path) != file:
                raise DataError(files.overwritten(file.path))

            def read() -> _Part:
                nonlocal begun
                if not begun:
                    local.going, local.at = self._parts(file, group), place
                begun = False  # a store that failed is read from the beginning again
                return next(part for part in local.going if part.holds(row))

            kept[place] = _asked(file, read)
        except (OSError, StopIteration, _pyarrow().ArrowException) as error:
            raise BadExample(
                "unreadable", f"{file.path}: row group {group} cannot be read: {one_line(error)}"
            ) from error
        return kept[place].table, row - kept[place].start

    def _parts(self, file: File, group: int) -> Iterator[_Part]:
        """A row group, whole if it is small, else a part at a time."""
        with _opened(file, self._dictionaries) as parquet:
            metadata = parquet.metadata.row_group(group)
            size = self._unpacked(metadata, f"{file.path}: row group {group}")
            whole = None
            if size <= _WHOLE:
                # In this thread alone: the others read row groups of their own.
                whole = parquet.read_row_group(group, columns=self._columns, use_threads=False)
        if whole is not None:
            yield _Part(0, whole)
            return
        rows, start = max(1, _PART * metadata.num_rows // size), 0
        # Numbers into values are kept of all parts: of a column that is large itself they would be no less.
        chunks = [metadata.column(i) for i in range(metadata.num_columns)]
        large = {chunk.path_in_schema for chunk in chunks if chunk.total_uncompressed_size > _PART}
        with _opened(file, [leaf for leaf in self._dictionaries if leaf not in large], part=True) as parquet:
            options = {"columns": self._columns, "use_threads": False}
            for batch in parquet.iter_batches(rows, row_groups=[group], **options):
                yield _Part(start, _pyarrow().Table.from_batches([batch]))
                start += batch.num_rows

    def _unpacked(self, metadata: Any, where: str) -> int:
        """Bytes of what is read of a row group, unpacked. Raises BadExample where it claims too many values."""
        chunks = [metadata.column(i) for i in range(metadata.num_columns)]
        chunks = [chunk for chunk in chunks if self._is_read(chunk.path_in_schema)]
        if (values := max((chunk.num_values for chunk in chunks), default=0)) > _VALUES:
            problem = f"{where} has {values} values of a column, more than the {_VALUES} that are read"
            raise BadExample("unreadable", f"{problem}: write smaller row groups")
        return sum(chunk.total_uncompressed_size for chunk in chunks)

    def _images(self, value: Any, file: File, where: str) -> list[bytes]:
        """The image of a row; of a list of images all, the frames of a clip."""
        if not isinstance(value, list):
            return [self._picture(value, file, where)]
        if not value:
            raise BadExample("empty", f"{where} has no picture")
        return [self._picture(one, file, where) for one in value]

    def _picture(self, value: Any, file: File, where: str) -> bytes:
        path = value
        if isinstance(value, dict):
            value, path = value.get("bytes"), value.get("path")
        if isinstance(value, bytes):
            if len(value) > MAX_BYTES:
                raise BadExample("unreadable", f"{where}: its image has more than {MAX_BYTES} bytes")
            return value
        if not isinstance(path, str) or not path:
            raise BadExample("empty", f"{where} has no picture")
        root = self._root or file.path.rpartition("/")[0] or ("/" if file.path.startswith("/") else ".")
        return files.picture(root, path, where)


def _as_text(value: Any, where: str) -> Any:
    """A value in which bytes, as some writers leave texts, are text. Raises BadExample."""
    if isinstance(value, list):
        return [_as_text(one, where) for one in value]
    try:
        return value.decode("utf-8") if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        raise BadExample("encoding", f"{where}: its text is not UTF-8: {one_line(error)}") from None


@contextlib.contextmanager
def _opened(file: File, dictionaries: Sequence[str] = (), *, part: bool = False) -> Iterator[Any]:
    """A ParquetFile; of those columns (by their paths) it gives numbers into the values that differ.

    Args:
      file: on a disk or in a store.
      dictionaries: paths of columns.
      part: its columns are read a little at a time, where they are large.
    """
    parquet = _pyarrow().parquet
    options = {"page_checksum_verification": True, "read_dictionary": list(dictionaries)}
    options |= {"buffer_size": _BUFFER} if part else {}
    if not files.is_remote(file.path):
        files.look(file.path)  # what is no regular file is not opened
        with parquet.ParquetFile(file.path, **options) as opened:
            yield opened
        return
    system, inside = files.store(file.path)
    with (
        system.open(inside, "rb") as stream,
        parquet.ParquetFile(stream, pre_buffer=not part, **options) as opened,
    ):
        yield opened


def _asked(file: File, read: Callable[[], Any]) -> Any:
    """What is read from a file: of a store patiently, as its streams do not ask again by themselves."""
    return patience.patiently(read, file.path) if files.is_remote(file.path) else read()


class _Footer(NamedTuple):
    """What is at the end of a file.

    Attributes:
      schema: pyarrow's.
      rows: of each row group.
      texts: paths of what holds bytes or texts.
      largest: bytes of the largest row group, unpacked.
    """

    schema: Any
    rows: list[int]
    texts: list[str]
    largest: int


def _footer(file: File) -> _Footer:
    def read() -> _Footer:
        with _opened(file) as parquet:
            metadata = parquet.metadata
            groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
            leaves = [parquet.schema.column(i) for i in range(len(parquet.schema))]
            texts = [x.path for x in leaves if x.physical_type == "BYTE_ARRAY"]
            largest = max((group.total_byte_size for group in groups), default=0)
            return _Footer(parquet.schema_arrow, [group.num_rows for group in groups], texts, largest)

    try:
        return _asked(file, read)
    except (OSError, _pyarrow().ArrowException) as error:
        raise DataError(f"{file.path} is no Parquet file: {one_line(error)}; write it again or leave it out") from error


def open_parquet(spec: Spec) -> Parquet:
    """See `open_source`."""
    spec.check(("image", "caption", "label", "root", "template", "templates", "classes"), ("template",))
    return Parquet(spec, files.expand(spec.location, spec.text))
