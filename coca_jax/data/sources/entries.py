"""What is read of a folder of images: an entry for each record, and how the folder was understood."""

from __future__ import annotations

import dataclasses

# Looked for in this order, at any depth; metadata.* are Hugging Face's.
CAPTION_FILES = tuple(
    f"{stem}.{end}" for stem in ("captions", "metadata") for end in ("csv", "tsv", "jsonl", "parquet", "txt", "json")
)
# The endings of texts beside images, the first that is there is read.
SIDECARS = (".txt", ".caption", ".captions", ".json")


@dataclasses.dataclass(slots=True)
class Entry:
    """An image, or a line that names none.

    Attributes:
      path: relative to the folder; empty where `problem` says why there is none. Of a clip that of its first frame.
      line: where it is first named; 0 where no file names it.
      captions: undecodable bytes are surrogates in them.
      label: raw.
      problem: (reason, what is wrong) with the line.
      frames: paths of a clip's frames after the first.
      texts: path of the text beside it.
      table: the file that names it.
    """

    path: str
    line: int
    captions: list[str]
    label: str = ""
    problem: tuple[str, str] | None = None
    frames: tuple[str, ...] = ()
    texts: str = ""
    table: str = ""


@dataclasses.dataclass(frozen=True)
class Layout:
    """What is read of a folder.

    Attributes:
      root: where the images are.
      entries: in their order.
      notes: how it was understood, and what was found but is not read.
      fingerprint: of names, captions and labels; of files without a captions file, of names and sizes.
      labels: of class folders; empty where the entries have other labels, or none.
    """

    root: str
    entries: list[Entry]
    notes: tuple[str, ...]
    fingerprint: str
    labels: tuple[str, ...] = ()
