"""Random-access sources of records, opened by a specification `kind:location`.

A new kind is a function `location -> Source` in `KINDS`, nothing more. Sources are pickled into worker processes: what
cannot travel (an open file) is opened again there.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.resources
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, SupportsIndex

from etils import epath
from grain.sources import ArrayRecordDataSource

from coca_jax.data import emoji, records
from coca_jax.data.records import DataError, Record

__all__ = ["KINDS", "ArrayRecords", "DataError", "Record", "Source", "open_source"]


class Source(Protocol):
    """What the pipeline reads: a sequence of records with any of them at hand.

    Attributes:
      name: the specification it was opened by.
      tokenizer_path: a SentencePiece model that comes with the data; None where there is none.
      attribution: authors and licences of the pictures, for whoever shows them; empty where unknown.
      class_names: what captions call each label, one name or more; None where a label is its own name.
    """

    name: str
    tokenizer_path: epath.Path | None
    attribution: str
    class_names: Mapping[str, Sequence[str]] | None

    def __len__(self) -> int: ...

    def __getitem__(self, index: SupportsIndex) -> Record: ...

    def fingerprint(self) -> str:
        """Changes when the data do: a run must not resume on other records."""
        ...


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
      files: paths, or (path, start, stop) for a part of a file.
      tokenizer_path: see Source.
      attribution: see Source.
      class_names: see Source.
      version: goes into the fingerprint, e.g. checksums; sizes and names of the files always do.
    """

    def __init__(
        self,
        name: str,
        files: Sequence[str | tuple[str, int, int]],
        tokenizer_path: epath.Path | None = None,
        attribution: str = "",
        class_names: Mapping[str, Sequence[str]] | None = None,
        version: str = "",
    ):
        self.name = name
        self.tokenizer_path = tokenizer_path
        self.attribution = attribution
        self.class_names = class_names
        parts = [
            file if isinstance(file, str) else _Part(file[0], file[1], file[2] - file[1], file[2]) for file in files
        ]
        try:
            self._records = ArrayRecordDataSource(parts)
        except (RuntimeError, ValueError, OSError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{name}: not an ArrayRecord file: {reason}; write it again or leave it out") from error
        described = [version]
        for file in files:
            path = epath.Path(file if isinstance(file, str) else file[0])
            described.append(f"{path.name} {path.stat().length} {file[1:] if isinstance(file, tuple) else ''}")
        described.append(str(len(self._records)))
        self._fingerprint = hashlib.sha256("\n".join(described).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: SupportsIndex) -> Record:
        try:
            return records.unpack(self._records[index])
        except DataError as error:
            raise DataError(f"{self.name}: record {index}: {error}") from error
        except (RuntimeError, OSError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{self.name}: record {index} cannot be read: {reason}; write the file again") from error

    def __repr__(self) -> str:
        return f"ArrayRecords({self.name})"

    def fingerprint(self) -> str:
        """16 hexadecimal digits of names, sizes and counts, not of the bytes: terabytes must open in a second."""
        return self._fingerprint


def _open_emoji(location: str) -> Source:
    manifest = emoji.prepare()
    folder = epath.Path(emoji.default_folder())
    if location not in manifest["splits"]:
        raise DataError(f"emoji:{location}: no such split; there are {', '.join(manifest['splits'])}")
    part = manifest["splits"][location]
    file = os.fspath(folder / part["file"])
    return ArrayRecords(
        f"emoji:{location}",
        [(file, part["start"], part["stop"])],
        folder / emoji.TOKENIZER,
        manifest["attribution"],
        _emoji_class_names(),
        manifest["files"][part["file"]]["sha256"],
    )


@functools.cache
def _emoji_class_names() -> dict[str, list[str]]:
    text = importlib.resources.files("coca_jax.data").joinpath("emoji_classes.json").read_text(encoding="utf-8")
    return json.loads(text)["class_names"]


def _open_array_record(location: str) -> Source:
    path = epath.Path(location)
    # Up to the first wildcard it is a folder, from there on a pattern.
    depth = next((i for i, part in enumerate(path.parts) if any(c in part for c in "*?[")), len(path.parts) - 1)
    folder = epath.Path(*path.parts[:depth]) if depth else epath.Path(".")
    pattern = "/".join(path.parts[depth:])
    files = sorted(os.fspath(file) for file in folder.glob(pattern)) if pattern and folder.is_dir() else []
    if not files:
        raise DataError(f"array_record:{location}: no file matches; name files that exist, e.g. in config.data.train")
    return ArrayRecords(f"array_record:{location}", files)


KINDS: dict[str, Callable[[str], Source]] = {
    "emoji": _open_emoji,
    "array_record": _open_array_record,
}


def open_source(spec: str) -> Source:
    """Opens `kind:location`, e.g. `emoji:train` or `array_record:/data/laion-*.array_record`.

    Kinds:
      emoji: a split of the built-in set, which is prepared on first use.
      array_record: files (a bucket works) of records that `coca_jax.data.records.write` wrote; wildcards * ? [ ].

    Raises:
      DataError: an unknown kind, files that are missing or of another format, no records at all.
    """
    kind, colon, location = spec.partition(":")
    if not colon or not location or kind not in KINDS:
        raise DataError(
            f"source {spec!r}: write kind:location with kind one of {', '.join(KINDS)}, "
            "e.g. emoji:train (the built-in set) or array_record:/data/*.array_record"
        )
    source = KINDS[kind](location)
    if not len(source):
        raise DataError(f"{spec}: holds no records")
    return source
