"""Rows of text with separators, as people and programs write them: CSV, TSV, Flickr's, with or without a header."""

from __future__ import annotations

import codecs
import collections
import dataclasses
import re
from collections.abc import Callable, Collection, Iterator, Sequence

from coca_jax.data import opening
from coca_jax.data.sources.listing import count_text, is_image

SEPARATORS = {"\t": "tab", ",": "comma", ";": "semicolon", "|": "pipe"}
_SAMPLE = 50  # rows from which the separator is told
_LINES = 100  # of one quoted field at most
_QUOTED = re.compile(r' *"([^"]*(?:""[^"]*)*)"(?!")')
_CLOSING = re.compile(r'[^"]*(?:""[^"]*)*"(?!")')  # the rest of a quotation
Problem = tuple[str, str]


@dataclasses.dataclass
class Delimited:
    """A file taken apart.

    Attributes:
      columns: names; of a file without a header `image`, `caption` and `column N`.
      notes: what was found about its form.
      counts: rows of another number of fields, by what was done; their lines.
    """

    columns: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    counts: dict[str, list[int]] = dataclasses.field(default_factory=lambda: collections.defaultdict(list))


def utf8(parts: Iterator[bytes]) -> Iterator[bytes]:
    r"""The parts of a text file as UTF-8 with `\n` at the ends of lines, whatever Unicode and line ends it is in.

    Bytes that are not UTF-8 stay as they are. NUL bytes are left out.
    """
    first = next(parts, b"")
    decoder: codecs.IncrementalDecoder | None = None
    if first.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        decoder = codecs.getincrementaldecoder("utf-32")("replace")
    elif first.startswith((b"\xff\xfe", b"\xfe\xff")):
        decoder = codecs.getincrementaldecoder("utf-16")("replace")
    elif len(first) > 3 and min(first[:200:2].count(0), 100) > 0.4 * len(first[:200:2]):
        decoder = codecs.getincrementaldecoder("utf-16-be")("replace")
    elif len(first) > 3 and first[1:200:2].count(0) > 0.4 * len(first[1:200:2]):
        decoder = codecs.getincrementaldecoder("utf-16-le")("replace")
    ends = b""  # a `\r` at the end of a part may be the half of a line's end
    for part in _chain(first.removeprefix(codecs.BOM_UTF8), parts):
        data = decoder.decode(part).encode(errors="replace") if decoder else part
        data = ends + data.replace(b"\0", b"")
        ends = b"\r" if data.endswith(b"\r") else b""
        yield data[: len(data) - len(ends)].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if ends:
        yield b"\n"


def _chain(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest


class _Lines:
    """Numbered lines that can be looked at before they are taken; None in the place of one that is too long."""

    def __init__(self, lines: Iterator[bytes | None]):
        self._lines, self._ahead, self.taken = lines, collections.deque[str | None](), 0

    def peek(self, count: int) -> list[str | None]:
        while len(self._ahead) < count:
            try:
                line = next(self._lines)
            except StopIteration:
                break
            self._ahead.append(None if line is None else line.decode("utf-8", "surrogateescape").rstrip("\n"))
        return [self._ahead[i] for i in range(min(count, len(self._ahead)))]

    def __iter__(self) -> Iterator[str | None]:
        """Takes each line."""
        while self._ahead or self.peek(1):
            self.taken += 1
            yield self._ahead.popleft()

    def take(self, count: int) -> None:
        for _ in range(count):
            self._ahead.popleft()
        self.taken += count


def split(text: str, separator: str) -> tuple[list[str], bool]:
    """The fields of a row, and whether a quotation in it is left open.

    A quotation is one where it begins its field, ends it, and has its own quotation marks twice. All other marks are
    text: `"Stop" sign`, `5" screen`.
    """
    if '"' not in text:
        return text.split(separator), False
    fields, at, is_open = [], 0, False
    while True:
        found = _QUOTED.match(text, at)
        end = _blanks(text, found.end()) if found else -1
        if found and (end == len(text) or text[end] == separator):
            fields.append(found[1].replace('""', '"'))
        else:
            is_open = is_open or (not found and text.startswith('"', _blanks(text, at)))
            end = text.find(separator, at)
            end = len(text) if end < 0 else end
            fields.append(text[at:end])
        if end >= len(text):
            return fields, is_open
        at = end + 1


def _blanks(text: str, at: int) -> int:
    """Where the blanks end that begin at a place."""
    while text.startswith(" ", at):
        at += 1
    return at


def rows(
    parts: Iterator[bytes],
    default: str,
    known: Collection[str],
    exists: Callable[[str], bool],
    plain: Callable[[str], str],
    found: Delimited,
) -> Iterator[tuple[int, dict[str, str | list[str]] | Problem]]:
    """Line number and columns of each row; (reason, what is wrong) in the place of one that cannot be read.

    Args:
      parts: the file's bytes.
      default: separator that its name promises.
      known: names of columns with images, as `plain` gives them.
      exists: whether a field names an image that is there.
      plain: the name of a column without case and blanks.
      found: is filled in.
    """
    lines = _Lines(opening.lines(utf8(parts)))
    if (ahead := lines.peek(1)) and ahead[0] and re.fullmatch(r'"?sep=."?[,;\t|]*', ahead[0], re.IGNORECASE):
        lines.take(1)  # Excel's, which the rows themselves tell
    sample = [line for line in lines.peek(_SAMPLE) if line and line.strip()]
    separator, header = _form(sample, default, known, exists, plain)
    if separator != default:
        found.notes.append(f"its separator is a {SEPARATORS[separator]}")
    if header:
        names = []
        for line in lines:
            if line and line.strip():
                names = [name.strip() for name in split(line, separator)[0]]
                break
    else:
        names = _columns([split(line, separator)[0] for line in sample], exists)
        if names:
            say = ", ".join(f"column {n + 1} is the {name}" for n, name in enumerate(names) if "column" not in name)
            found.notes.append(f"it has no header: {say}")
    same: dict[str, str] = {}  # `Caption` and `caption` are one column
    names = [same.setdefault(plain(name), name) for name in names]
    found.columns = list(dict.fromkeys(names))
    texts = {name for name in names if plain(name) not in known}
    for line in lines:
        number = lines.taken
        if line is None:
            yield number, ("unreadable", f"the line is longer than {opening.LINE_BYTES >> 20} MiB")
            continue
        fields, is_open = split(line, separator)
        if is_open and (more := _continued(line, lines, separator, exists)):
            fields = split("\n".join([line, *map(str, lines.peek(more))]), separator)[0]
            lines.take(more)
        if not line or line.isspace():
            continue
        if len(fields) > len(names) and not any(field.strip() for field in fields[len(names) :]):
            fields = fields[: len(names)]  # spreadsheets end rows with separators
        if len(fields) > len(names):
            if names[-1] not in texts:
                found.counts["with too many fields"].append(number)
                yield number, ("unreadable", f"it has {len(fields)} fields where there are {len(names)} columns")
                continue
            found.counts[f"with too many fields, whose rest is read as text of {names[-1]!r}"].append(number)
            fields = [*fields[: len(names) - 1], separator.join(fields[len(names) - 1 :])]
        elif len(fields) < len(names):
            found.counts["with too few fields"].append(number)
        if separator == "|":  # Flickr30k's has blanks around it
            fields = [field.strip() for field in fields]
        yield number, _row(names, fields)
    found.notes += [f"{count_text(len(at), 'row')} {what}, e.g. line {at[0]}" for what, at in found.counts.items()]


def _row(names: Sequence[str], fields: Sequence[str]) -> dict[str, str | list[str]]:
    """Values by name; a list of a name that comes several times."""
    row: dict[str, str | list[str]] = {}
    for name, field in zip(names, fields, strict=False):
        before = row.get(name)
        row[name] = field if before is None else [*([before] if isinstance(before, str) else before), field]
    return row


def _continued(first: str, lines: _Lines, separator: str, exists: Callable[[str], bool]) -> int:
    """How many lines a row goes on for whose quotation is open in its first; 0: it is not a quotation."""

    def names_image(field: str) -> bool:
        plain = field.strip(' "')
        return exists(plain) or is_image(plain)

    for count in range(1, _LINES):
        if len(ahead := lines.peek(count)) < count:
            return 0
        line = ahead[-1]
        if line is None or any(map(names_image, line.split(separator)[:8])):
            return 0  # another row
        if '"' in line.replace('""', ""):
            closing = _CLOSING.match(line)
            after = line[closing.end() :].lstrip(" ") if closing else "-"
            whole = "\n".join([first, *map(str, ahead)])
            return 0 if after[:1] not in ("", separator) or split(whole, separator)[1] else count
    return 0


def _form(
    sample: Sequence[str],
    default: str,
    known: Collection[str],
    exists: Callable[[str], bool],
    plain: Callable[[str], str],
) -> tuple[str, bool]:
    """The separator, and whether the first row is a header: told by names of columns, and by images that are there."""
    best, chosen = (-1.0, 0), (default, True)
    for separator in dict.fromkeys((default, *SEPARATORS)):
        apart = [split(line, separator)[0] for line in sample]
        if not apart or len(apart[0]) < 2:
            continue
        first = [field.strip() for field in apart[0]]
        named = any(plain(name) in known for name in first) and not any(map(exists, first))
        header = named or not any(exists(field) or is_image(re.sub(r"#\d+$", "", field)) for field in first)
        images = sum(any(exists(field.strip()) for field in row) for row in apart) / len(apart)
        score = (2 * named + images, -abs(len(apart[0]) - len(apart[-1])))
        if score > best:
            best, chosen = score, (separator, header)
    return chosen


def _columns(sample: Sequence[Sequence[str]], exists: Callable[[str], bool]) -> list[str]:
    """Names of the columns of a file without a header: the image, and the one with the most letters is the caption."""
    if not sample:
        return []
    image = next((n for n, field in enumerate(sample[0]) if exists(field.strip())), None)
    if image is None:
        image = next((n for n, field in enumerate(sample[0]) if is_image(re.sub(r"#\d+$", "", field.strip()))), 0)
    letters = [0] * len(sample[0])
    for row in sample:
        for n, field in enumerate(row[: len(letters)]):
            letters[n] += 0 if n == image or exists(field.strip()) else sum(map(str.isalpha, field))
    names = [f"column {n + 1}" for n in range(len(letters))]
    if any(letters):
        names[letters.index(max(letters))] = "caption"
    names[image] = "image"
    return names
