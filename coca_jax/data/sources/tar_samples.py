"""Which members of a tar shard make a sample: by WebDataset's rule, and where that gives no image, by the last dot.

WebDataset's rule (webdataset.tariterators.base_plus_ext): a sample's key is the path up to the first dot of the last
part, what follows is the extension, and a sample's members follow one another. `photo 2.0 final.jpg` then has the
extension `0 final.jpg`, which is no image; and of a shard with all images first, every sample is half a sample. Samples
that the rule makes whole stay as they are. The others are put together here:

- without an image, but with members such as `0 final.jpg`: cut at the last dot where that gives an image a text;
  else (`a.input.jpg`, `a.output.txt`) the one image and the texts are the sample's;
- an image without a text and a text without an image, with the same key: one sample, at the image's place.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping

import numpy as np

from coca_jax.data.sources.base import IMAGE_EXTENSIONS, MAX_BYTES, READ_EXTENSIONS
from coca_jax.data.sources.tar_walk import Member

# The members of a sample. Of each: offset of its bytes, their number, and how many bytes of header precede them.
IMAGE, TEXT, JSON, CLASS = range(4)
ROW = np.dtype([("offset", "<u8", 4), ("size", "<u4", 4), ("header", "<u4", 4)])
# In place of a header's size: the member is not there; it is there and cut off, or too large.
ABSENT, CUT, LARGE = 0, 1, 2

TEXT_EXTENSIONS = ("txt", "caption", "cap", "text")
_KINDS = {
    **dict.fromkeys(IMAGE_EXTENSIONS, IMAGE),
    **dict.fromkeys(TEXT_EXTENSIONS, TEXT),
    **{"json": JSON, "cls": CLASS},
}
# Of several of a kind the one of the lowest rank is read, of these the first: an image that needs no package of its
# own before one that does, before one that is not read; a `txt` before other texts.
_PACKAGES = ("heic", "heif", "hif", "heics", "heifs", "jxl")
_RANKS = {name: rank for rank, name in enumerate(TEXT_EXTENSIONS)} | {
    name: 2 if name not in READ_EXTENSIONS else int(name in _PACKAGES) for name in IMAGE_EXTENSIONS
}
_FIRST = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)", re.DOTALL)
_LAST = re.compile(r"((?:.*/)?[^/.][^/]*)\.([^/.]+)", re.DOTALL)
_EXAMPLE = 160  # letters of a name that is kept as an example

# Why an image is not read, and what is said of it.
BESIDE, LINK, HIDDEN = "beside", "link", "hidden"
_REASONS = {
    BESIDE: "beside the image of their sample, which alone is read",
    LINK: "links or sparse files, which are not read: write them as plain files (tar --hard-dereference -h)",
    HIDDEN: "hidden files (._*, __MACOSX), which are not read",
}
# What was done to put samples together, and what is said of it.
DOTTED, JOINED = "dotted", "joined"
_DONE = {
    DOTTED: "have dots in their names: their extension is what follows the last dot, as WebDataset's rule (the first "
    "dot) gives no image with a text",
    JOINED: "are not in one place: image and text are joined by their key (tar --sort=name keeps them together, and "
    "reads faster)",
}

Counts = Mapping[str, tuple[int, str]]


class Row:
    """A sample: its members' places, and what it is called.

    Attributes:
      offset, size, header: by kind, see ROW.
      rank: by kind, of the member that is read.
      key: up to the dot that it is cut at.
      first: up to the first dot.
      pending: it has texts alone that no rule makes a sample: left out where no image without a text has its key.
    """

    __slots__ = ("first", "header", "key", "offset", "pending", "rank", "size")

    def __init__(self, key: str, first: str, *, pending: bool = False) -> None:
        self.offset, self.size, self.header, self.rank = [0] * 4, [0] * 4, [ABSENT] * 4, [9] * 4
        self.key, self.first, self.pending = key, first, pending

    def has(self, which: int) -> bool:
        return self.header[which] != ABSENT

    @property
    def described(self) -> bool:
        """Whether it has anything beside an image."""
        return any(map(self.has, (TEXT, JSON, CLASS)))

    def take(self, other: Row, which: int) -> None:
        for name in ("offset", "size", "header", "rank"):
            getattr(self, name)[which] = getattr(other, name)[which]


@dataclasses.dataclass
class _Group:
    """Members that follow one another with the same path up to the first dot.

    Attributes:
      row: of those whose extension has no dot.
      extensions: of those.
      dotted: extension and member of the others that look like a part of a sample.
    """

    row: Row
    extensions: set[str] = dataclasses.field(default_factory=set)
    dotted: list[tuple[str, Member]] = dataclasses.field(default_factory=list)


def split_name(name: str) -> tuple[str, str]:
    """Key up to the first dot and extension (in lower case) of a member's name; empty where it is part of no sample."""
    found = _FIRST.fullmatch(name)
    return (found[1], found[2].lower()) if found else ("", "")


def split_last(name: str) -> tuple[str, str]:
    """The same up to the last dot."""
    found = _LAST.fullmatch(name)
    return (found[1], found[2].lower()) if found else ("", "")


def kind_of(extension: str) -> int | None:
    """IMAGE, TEXT, JSON or CLASS, by what follows the last dot; None where it is of another kind."""
    return _KINDS.get(extension.rpartition(".")[2])


def key_of(names: Mapping[int, str]) -> str:
    """What members that are read together are called, by kind; empty where they do not belong together."""
    if any(kind_of(split_last(name)[1]) != which for which, name in names.items()):
        return ""
    firsts = {split_name(name)[0] for name in names.values()}
    lasts = {split_last(name)[0] for name in names.values()}
    keys = lasts if len(lasts) == 1 else firsts
    return keys.pop() if len(keys) == 1 else ""


class Samples:
    """Collects the members of one shard; `finish` gives its rows.

    Args:
      size: of the shard, bytes: members that reach past it are cut off.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._found: list[Row | _Group] = []
        self._group: _Group | None = None
        self._beside: set[str] = set()  # extensions with dots of images that lie beside a sample's
        self._counts: dict[str, list[tuple[int, str]]] = {}
        self.counts: dict[str, tuple[int, str]] = {}

    def add(self, member: Member) -> None:
        """Takes the next member of the shard."""
        first, extension = split_name(member.name)
        if dotted := (which := _KINDS.get(extension)) is None and "." in extension:
            which = kind_of(extension)
        if which is None or "__MACOSX/" in first:
            if kind_of(member.name.lower()) == IMAGE:
                self._count(HIDDEN, member.name)
            return
        group = self._group
        # A name that comes again begins another sample: shards that were joined may repeat their keys.
        if group is None or first != group.row.first or (not dotted and extension in group.extensions):
            self._close()
            group = self._group = _Group(Row(first, first))
        if dotted:
            group.dotted.append((extension, member))
        else:
            group.extensions.add(extension)
            self._place(group.row, which, extension, member)

    def pass_over(self, name: str) -> None:
        """Takes the name of a link or of a sparse file."""
        if kind_of(name.lower()) == IMAGE:
            self._count(LINK, name)

    def finish(self) -> list[Row]:
        """The samples in order. `counts` then tells what is not read, and what was put together."""
        self._close()
        rows: list[Row] = []
        for found in self._found:
            rows += [found] if isinstance(found, Row) else self._resolved(found)
        return self._joined(rows)

    # -----------------------------------------------------------------------------------------------------------------

    def _close(self) -> None:
        group, self._group = self._group, None
        if group is None:
            return
        if not group.dotted:
            self._found.append(group.row)
        elif group.row.has(IMAGE):
            self._found.append(group.row)
            for extension, member in group.dotted:
                if kind_of(extension) == IMAGE:
                    self._beside.add(extension)
                    self._count(BESIDE, member.name)
            texts = [(extension, member) for extension, member in group.dotted if kind_of(extension) == TEXT]
            if len(texts) == 1 and not group.row.described:  # `a.jpg` and `a.caption.txt`
                self._place(group.row, TEXT, "txt", texts[0][1])
                self._count(DOTTED, texts[0][1].name)
        else:  # what the others of the shard have is known at its end
            self._found.append(group)

    def _resolved(self, group: _Group) -> list[Row]:
        """The samples of a group in which the rule finds no image."""
        row, dotted = group.row, []
        for extension, member in group.dotted:
            if extension in self._beside and kind_of(extension) == IMAGE:
                self._count(BESIDE, member.name)  # a mask, or such: the image is missing
            else:
                dotted.append((extension, member))
        images = sum(kind_of(extension) == IMAGE for extension, _ in dotted)
        parts: dict[str, Row] = {}
        for extension, member in dotted:
            key = split_last(member.name)[0]
            part = parts.setdefault(key, Row(key, row.first))
            which = kind_of(extension)
            assert which is not None
            self._place(part, which, extension.rpartition(".")[2], member)
        pictured = [part for part in parts.values() if part.has(IMAGE)]
        described = any(part.described for part in pictured)
        if images and not described and (len(pictured) == 1 or row.described):
            row.take(pictured[0], IMAGE)
            for part in parts.values():
                for which in (TEXT, JSON, CLASS):
                    if not row.has(which):
                        row.take(part, which)
            for part in pictured[1:]:
                self._count(BESIDE, part.key)
            self._count(DOTTED, dotted[0][1].name)
            return [row]
        for part in parts.values():
            part.pending = not part.has(IMAGE)
            if not part.pending:
                self._count(DOTTED, part.key)
        return [row, *parts.values()] if group.extensions else list(parts.values())

    def _joined(self, rows: list[Row]) -> list[Row]:
        """The rows; an image without a text and a text without an image of the same key are one of them."""
        texts: dict[str, list[Row]] = {}
        for row in rows:
            if not row.has(IMAGE) and row.described:
                for key in {row.key, row.first}:
                    texts.setdefault(key, []).append(row)
        if not texts:
            return rows
        taken = set[int]()
        for row in rows:
            if not row.has(IMAGE) or row.described:
                continue
            for key in dict.fromkeys((row.key, row.first)):
                if (text := next((text for text in texts.get(key, ()) if id(text) not in taken), None)) is not None:
                    taken.add(id(text))
                    for which in (TEXT, JSON, CLASS):
                        row.take(text, which)
                    self._count(JOINED, row.key)
                    break
        return [row for row in rows if id(row) not in taken and not row.pending]

    def _place(self, row: Row, which: int, extension: str, member: Member) -> None:
        rank = _RANKS.get(extension, 0)
        if which == IMAGE and row.has(IMAGE):
            self._count(BESIDE, member.name)
        if rank >= row.rank[which]:  # the first of several images is the sample's
            return
        row.rank[which] = rank
        if member.offset + member.size > self._size:
            row.header[which] = CUT
        elif member.size > MAX_BYTES:
            row.header[which] = LARGE
        else:
            row.offset[which], row.size[which] = member.offset, member.size
            row.header[which] = member.offset - member.header

    def _count(self, what: str, name: str) -> None:
        count, example = self.counts.get(what, (0, name[:_EXAMPLE]))
        self.counts[what] = (count + 1, example)


def array(rows: Iterable[Row]) -> np.ndarray:
    """The rows as ROW."""
    return np.array([(row.offset, row.size, row.header) for row in rows], ROW)


def lost(rows: list[Row]) -> bool:
    """Whether the last sample of a file that has no end lacks what the one before has; marks that as cut off."""
    last = rows[-1]
    usual = [which for which in range(4) if rows[-2].has(which)] if len(rows) > 1 else [IMAGE, TEXT]
    for which in usual:
        if not last.has(which):
            last.header[which] = CUT
    return CUT in last.header


def remarks(shards: Iterable[Counts]) -> list[str]:
    """A line for each thing that was found in shards, by how often, with an example."""
    total: dict[str, tuple[int, str]] = {}
    for counts in shards:
        for what, (count, example) in counts.items():
            before, name = total.get(what, (0, example))
            total[what] = (before + count, name)
    said = {what: f"samples {text}" for what, text in _DONE.items()}
    said |= {what: f"files that look like images are {text}" for what, text in _REASONS.items()}
    return [f"{total[what][0]} {text}; e.g. {total[what][1]!r}" for what, text in said.items() if what in total]
