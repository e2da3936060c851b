"""ArrayRecord files, which `coca_jax.data.prepare` writes: the fastest to read at random, in buckets too."""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np
from array_record.python import array_record_module
from etils import epath
from grain.sources import ArrayRecordDataSource

from coca_jax.data import records
from coca_jax.data.records import BadExample, DataError, Record
from coca_jax.data.sources import content, files
from coca_jax.data.sources.base import Spec, one_line

_COUNTING = "readahead_buffer_size:0"  # the footer alone is read


@dataclasses.dataclass(frozen=True)
class _Part:
    """Records skip .. skip + take of a file: the FileInstruction that ArrayRecordDataSource asks for."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class ArrayRecords:
    """Records in ArrayRecord files, one after the other in the order given.

    Args:
      name: for messages.
      paths: of files, or (path, start, stop) for a part of a file.
      tokenizer_path: see Source.
      attribution: see Source.
      class_names: see Source.
      version: goes into the fingerprint, e.g. checksums; sizes and names of the files always do.

    Raises:
      DataError: a file is missing or of another format.
    """

    def __init__(
        self,
        name: str,
        paths: Sequence[str | tuple[str, int, int]],
        tokenizer_path: epath.Path | None = None,
        attribution: str = "",
        class_names: Mapping[str, Sequence[str]] | None = None,
        version: str = "",
    ):
        self.name = name
        self.tokenizer_path = tokenizer_path
        self.attribution = attribution
        self.class_names = class_names
        whole = [path for path in paths if isinstance(path, str)]
        counts = dict(zip(whole, files.each(_count, whole, "counting records", "files"), strict=True))
        parts = [
            _Part(p, 0, counts[p], counts[p]) if isinstance(p, str) else _Part(p[0], p[1], p[2] - p[1], p[2])
            for p in paths
        ]
        try:
            self._files = [files.look(part.filename) for part in parts]
            self._records = ArrayRecordDataSource(parts)
        except (RuntimeError, ValueError, OSError) as error:
            raise DataError(f"{name}: {one_line(error)}; write it again or leave it out") from error
        self._starts = np.cumsum([0, *(part.take for part in parts)]).tolist()
        self._unchanged: set[int] = set()  # files that this process has looked at again before it read from them
        described = [version]
        for file, given in zip(self._files, paths, strict=True):
            described.append(f"{file.name} {file.size} {given[1:] if isinstance(given, tuple) else ''}")
        described.append(str(len(self._records)))
        self._fingerprint = hashlib.sha256("\n".join(described).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: SupportsIndex) -> Record:
        number = range(len(self))[index.__index__()]
        place = bisect.bisect_right(self._starts, number) - 1
        if place not in self._unchanged:  # its reader is opened now; before it was only counted
            self._check(place)
            self._unchanged.add(place)
        try:
            return records.unpack(self._records[number])
        except (DataError, RuntimeError, OSError) as error:
            self._check(place)
            where = f"{self._files[place].path}: record {number - self._starts[place]}"
            if isinstance(error, DataError):
                raise BadExample("unreadable", f"{where}: {error}") from error
            raise BadExample(
                "unreadable", f"{where} cannot be read: {one_line(error)}; write the file again"
            ) from error

    def _check(self, place: int) -> None:
        file = self._files[place]
        try:
            changed = files.look(file.path) != file
        except OSError as error:
            raise DataError(f"{file.path} cannot be read any more: {one_line(error)}; start the run again") from error
        if changed:
            raise DataError(files.overwritten(file.path))

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_unchanged": set()}

    def __repr__(self) -> str:
        return f"ArrayRecords({self.name})"

    def fingerprint(self) -> str:
        """16 hexadecimal digits of names, sizes and counts, not of the bytes: terabytes must open in a second."""
        return self._fingerprint

    def contents(self) -> dict[str, str]:
        """See Source."""
        return {content.LIST: self._fingerprint} | content.of_files(self._files)


def _count(path: str) -> int:
    try:
        reader = array_record_module.ArrayRecordReader(path, options=_COUNTING, file_reader_buffer_size=32768)
        try:
            return reader.num_records()
        finally:
            reader.close()
    except (RuntimeError, ValueError, OSError) as error:
        raise DataError(
            f"{path}: not an ArrayRecord file: {one_line(error)}; write it again or leave it out"
        ) from error


def open_array_record(spec: Spec) -> ArrayRecords:
    """See `open_source`."""
    spec.check(("template", "templates", "classes"), ("template",))
    return ArrayRecords(spec.text, [file.path for file in files.expand(spec.location, spec.text)])
