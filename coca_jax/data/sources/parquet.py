"""Parquet files with pictures, or with paths of pictures, in a column."""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np

from coca_jax.data import opening
from coca_jax.data.records import BadExample, DataError, Record
from coca_jax.data.sources import files, patience
from coca_jax.data.sources.base import CAPTION_NAMES, IMAGE_NAMES, LABEL_NAMES, Spec, choose, digest, one_line, texts
from coca_jax.data.sources.files import File

_KEPT = 2  # row groups that each thread keeps
# Of what is read of a row group, which is unpacked as a whole: a file of some KB can claim any size.
_LARGEST = 4 << 30  # bytes, unpacked
_VALUES = 1 << 24  # of a column


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
    row groups is slow and takes memory: convert such sets with `coca_jax.data.prepare`.

    The picture is bytes, a struct with `bytes` and `path` as Hugging Face writes it, or a path relative to the file or
    to `?root=`.

    Args:
      spec: its options are `image`, `caption` (a column of texts, or of lists of texts), `label`, `root`.
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
        schema = footers[0][0]
        where = self._files[0].path
        self._image = choose(spec, "image", list(schema), IMAGE_NAMES, where)
        self._caption = choose(spec, "caption", list(schema), CAPTION_NAMES, where)
        self._label = choose(spec, "label", list(schema), LABEL_NAMES, where)
        if not self._image or not (self._caption or self._label):
            raise DataError(
                f"{where}: no column of {'captions or labels' if self._image else 'pictures'}; there are "
                f"{', '.join(schema)}: name them by ?image= and ?caption= (or ?label=)"
            )
        self._columns = [column for column in (self._image, self._caption, self._label) if column]
        # Left as numbers into the values that differ: one picture a million times over takes the memory of one.
        self._dictionaries = [leaf for leaf in footers[0][2] if leaf.partition(".")[0] in self._columns]
        groups = []  # file, row group in it, rows
        for number, (file, (columns, rows, _)) in enumerate(zip(self._files, footers, strict=True)):
            if missing := [column for column in self._columns if column not in columns]:
                raise DataError(
                    f"{file.path}: no column {missing[0]!r}, which {where} has: open it as a source of its own"
                )
            groups += [(number, group, count) for group, count in enumerate(rows)]
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
        table = self._table(place)
        try:
            values = {name: table.column(name)[row].as_py() for name in self._columns}
        except UnicodeDecodeError as error:
            raise BadExample("encoding", f"{where}: its text is not UTF-8: {one_line(error)}") from None
        captions = texts(_as_text(values.get(self._caption), where))
        label = _as_text(values.get(self._label), where)
        if isinstance(label, float) and label.is_integer():  # what pandas makes of whole numbers, some of them missing
            label = int(label)
        label = str(label).strip() if isinstance(label, str | int) else ""
        if not captions and not label:
            raise BadExample("no_caption", f"{where} has no caption")
        image = self._picture(values[self._image], file, where)
        return Record(f"{self._names[file_number]}:{group}:{row}", image, captions, label)

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
        return digest(["parquet", self._columns, self._root, *described, self._groups.tolist()])

    def _table(self, place: int) -> Any:
        kept: collections.OrderedDict[int, Any] | None = getattr(self._local, "kept", None)
        if kept is None:
            kept = self._local.kept = collections.OrderedDict()
        if place in kept:
            kept.move_to_end(place)
            return kept[place]
        number, group, _ = self._groups[place].tolist()
        file = self._files[number]
        while len(kept) >= _KEPT:  # before the next is read: only so many are held
            kept.popitem(last=False)
        try:
            if files.look(file.path) != file:
                raise DataError(files.overwritten(file.path))
            kept[place] = _asked(file, lambda: self._row_group(file, group))
        except (OSError, _pyarrow().ArrowException) as error:
            raise BadExample(
                "unreadable", f"{file.path}: row group {group} cannot be read: {one_line(error)}"
            ) from error
        return kept[place]

    def _row_group(self, file: File, group: int) -> Any:
        with _opened(file, self._dictionaries) as parquet:
            self._check(parquet.metadata.row_group(group), f"{file.path}: row group {group}")
            # In this thread alone: the others read row groups of their own.
            return parquet.read_row_group(group, columns=self._columns, use_threads=False)

    def _check(self, metadata: Any, where: str) -> None:
        chunks = [metadata.column(i) for i in range(metadata.num_columns)]
        chunks = [chunk for chunk in chunks if chunk.path_in_schema.partition(".")[0] in self._columns]
        size = sum(chunk.total_uncompressed_size for chunk in chunks)
        values = max((chunk.num_values for chunk in chunks), default=0)
        if size > _LARGEST or values > _VALUES:
            raise BadExample(
                "unreadable",
                f"{where} unpacks to {size} bytes, and {values} values of a column: more than the {_LARGEST} and "
                f"{_VALUES} that are read at once; write smaller row groups",
            )

    def _picture(self, value: Any, file: File, where: str) -> bytes:
        path = value
        if isinstance(value, dict):
            value, path = value.get("bytes"), value.get("path")
        if isinstance(value, bytes):
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
def _opened(file: File, dictionaries: Sequence[str] = ()) -> Iterator[Any]:
    """A ParquetFile; of those columns (by their paths) it gives numbers into the values that differ."""
    parquet = _pyarrow().parquet
    options = {"page_checksum_verification": True, "read_dictionary": list(dictionaries)}
    if not files.is_remote(file.path):
        with opening.open_file(file.path) as stream, parquet.ParquetFile(stream, **options) as opened:
            yield opened
        return
    system, inside = files.store(file.path)
    with (
        system.open(inside, "rb") as stream,
        parquet.ParquetFile(stream, pre_buffer=True, **options) as opened,
    ):
        yield opened


def _asked(file: File, read: Callable[[], Any]) -> Any:
    """What is read from a file: of a store patiently, as its streams do not ask again by themselves."""
    return patience.patiently(read, file.path) if files.is_remote(file.path) else read()


def _footer(file: File) -> tuple[list[str], list[int], list[str]]:
    """Names of the columns, rows of each row group, and paths of what holds bytes or texts."""

    def read() -> tuple[list[str], list[int], list[str]]:
        with _opened(file) as parquet:
            metadata = parquet.metadata
            rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
            leaves = [parquet.schema.column(i) for i in range(len(parquet.schema))]
            return parquet.schema_arrow.names, rows, [x.path for x in leaves if x.physical_type == "BYTE_ARRAY"]

    try:
        return _asked(file, read)
    except (OSError, _pyarrow().ArrowException) as error:
        raise DataError(f"{file.path} is no Parquet file: {one_line(error)}; write it again or leave it out") from error


def open_parquet(spec: Spec) -> Parquet:
    """See `open_source`."""
    spec.check(("image", "caption", "label", "root", "template", "templates", "classes"), ("template",))
    return Parquet(spec, files.expand(spec.location, spec.text))
