"""What a source is, and the specification `kind:location?option=value` that opens one."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
import re
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, SupportsIndex

from etils import epath

from coca_jax.config import printing
from coca_jax.data import opening
from coca_jax.data.records import DataError, Record

MAX_BYTES = opening.EXAMPLE_BYTES

# Endings of file names, in lower case, of the kinds in kinds.READ. What a file is, its bytes say.
READ_EXTENSIONS = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "heif", "hif"),
    *("jif", "jfi", "pjpeg", "pjp", "jpg_large", "jpg_orig", "apng", "dib", "avifs", "heics", "heifs"),
)
# All that look like an image: none is dropped without being counted. What is not read is a bad example with its kind.
IMAGE_EXTENSIONS = (
    *READ_EXTENSIONS,
    *("jxl", "svg", "svgz", "jp2", "j2k", "j2c", "jpc", "jpf", "jpx", "jpm", "jls", "jxr", "wdp", "hdp", "bpg", "flif"),
    *("psd", "psb", "xcf", "ico", "cur", "icns", "eps", "emf", "wmf", "tga", "dds", "exr", "hdr", "qoi", "pcx", "sgi"),
    *("pnm", "ppm", "pgm", "pbm", "pam", "pfm", "xbm", "xpm", "mng", "jng", "djvu", "dcm", "fits"),
    *("raw", "dng", "cr2", "cr3", "crw", "nef", "nrw", "arw", "srf", "sr2", "orf", "rw2", "raf", "pef", "srw", "x3f"),
    *("3fr", "dcr", "kdc", "mrw", "erf", "iiq", "mos", "rwl"),
)
# Columns and fields that are looked for, in this order, where no option names one.
IMAGE_NAMES = (
    *("image", "file_name", "filename", "file", "image_path", "path", "filepath", "img", "jpg", "png"),
    *("image_name", "image_file", "image_filename", "img_path", "img_name", "file_path", "url"),
)
CAPTION_NAMES = (
    *("caption", "captions", "text", "texts", "txt", "title", "alt_text"),
    *("sentence", "sentences", "raw", "comment", "description", "alt", "caption_text", "caption_str"),
)
# What is written in the place of a text that is missing.
_MISSING = frozenset(("", "[]", "nan", "NaN", "None", "<NA>", "null", "NULL", "N/A", "n/a", "NA", "#N/A", "\\N"))
# A list of texts as JSON, Python or NumPy print it: what is left of one in a CSV.
_QUOTATION = r"""(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')"""
_LIST = re.compile(rf"\[\s*{_QUOTATION}(?:[\s,]+{_QUOTATION})*[\s,]*\]", re.DOTALL)
LABEL_NAMES = ("label", "class", "class_name", "category", "cls")


class Source(Protocol):
    """What the pipeline reads: a sequence of records with any of them at hand.

    A source is sent to worker processes: what cannot travel (an open file) is opened again there. Reading a record
    raises BadExample where that record alone cannot be used, and DataError where the source as a whole is not to be
    trusted any more.

    Attributes:
      name: the specification it was opened by.
      tokenizer_path: a SentencePiece model that comes with the data; None where there is none.
      attribution: authors and licences of the pictures, for whoever shows them; empty where unknown.
      class_names: what captions call each label, one name or more; None where a label is its own name.
      remarks: lines for whoever looks at the data, on files that are not read; a source need not have it.
    """

    name: str
    tokenizer_path: epath.Path | None
    attribution: str
    class_names: Mapping[str, Sequence[str]] | None

    def __len__(self) -> int: ...

    def __getitem__(self, index: SupportsIndex) -> Record: ...

    def fingerprint(self) -> str:
        """Changes when names, sizes or counts of the data do: a run must not resume on other records."""
        ...

    def contents(self) -> Mapping[str, str]:
        """Digests of a bounded part of what is read, by what each is of: see content.py."""
        ...


@dataclasses.dataclass(frozen=True)
class Spec:
    """A specification taken apart.

    Attributes:
      text: all of it, for messages.
      kind: what stands before the colon.
      location: what stands between the colon and the options, as it was written: wildcards may be in it.
      options: values by name, percent-encoding undone; a name may be given several times.
    """

    text: str
    kind: str
    location: str
    options: Mapping[str, tuple[str, ...]]

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Takes `kind:location?option=value&option=value` apart.

        Options begin at the first `?` that a name and a `=` follow, since `?` is a wildcard too. In values `%26` stands
        for `&` and `%25` for `%`; a `+` is a plus.
        """
        kind, _, rest = text.partition(":")
        location, options = rest, ""
        if found := re.search(r"\?(?=[A-Za-z_]+=)", rest):
            location, options = rest[: found.start()], rest[found.end() :]
        values: dict[str, tuple[str, ...]] = {}
        for option in options.split("&") if options else []:
            name, equals, value = option.partition("=")
            if not equals or not name or not value:
                raise DataError(
                    f"source {text!r}: {option!r} is no option: write name=value, and %26 for a & in a value"
                )
            values[name] = (*values.get(name, ()), urllib.parse.unquote(value))
        return cls(text, kind, home(location), values)

    def check(self, known: Iterable[str], repeatable: Iterable[str] = ()) -> None:
        """Raises DataError where an option is not among those known, or is given twice and may not be."""
        known = tuple(known)
        for name, values in self.options.items():
            if name not in known:
                close = difflib.get_close_matches(name, known, 1)
                meant = f"did you mean {close[0]}? " if close else ""
                has = f"{self.kind} has {', '.join(known)}" if known else f"{self.kind} has no options"
                raise DataError(f"source {self.text!r}: no option {name!r}; {meant}{has}")
            if len(values) > 1 and name not in repeatable:
                raise DataError(f"source {self.text!r}: option {name!r} is given {len(values)} times: give it once")

    def get(self, name: str) -> str:
        """The value of an option that is given once or not at all; then it is empty."""
        return self.options.get(name, ("",))[0]

    def path(self, name: str) -> str:
        """The value of an option that is a path, with `~` as a shell has it."""
        return home(self.get(name))

    def fields(self, name: str) -> tuple[str, ...]:
        """The value of an option as the names that commas separate in it."""
        return tuple(field for field in self.get(name).split(",") if field)


def home(paths: str) -> str:
    """Paths with commas between, with `~` and `~user` at their beginning as a shell has them."""
    return re.sub(r"(?:(?<=^)|(?<=,))~[^/,]*(?=[/,]|$)", lambda found: os.path.expanduser(found[0]), paths)


def choose(spec: Spec, option: str, there: Sequence[str], usual: Sequence[str], where: str) -> str:
    """The column that an option names, else the first usual name that is there (in any case), else an empty string."""
    if wanted := spec.get(option):
        return named(wanted, option, there, where)
    known = {plain(name): name for name in reversed(there)}
    return next((known[name] for name in usual if name in known), "")


def named(wanted: str, option: str, there: Sequence[str], where: str) -> str:
    """The column that a user names, in any case. Raises DataError where there is none."""
    same = [name for name in there if name == wanted] or [name for name in there if plain(name) == plain(wanted)]
    if not same:
        raise DataError(f"{where}: no {wanted!r} for ?{option}=; there are {', '.join(there)}")
    return same[0]


def plain(column: str) -> str:
    """A column's name as it is compared: `File Name` is `file_name`."""
    return re.sub(r"[ -]+", "_", column.strip().lower())


def digest(parts: Iterable[object]) -> str:
    """16 hexadecimal digits of the parts' texts, for fingerprints."""
    found = hashlib.sha256()
    for part in parts:
        found.update(f"{part}\n".encode(errors="surrogateescape"))
    return found.hexdigest()[:16]


def texts(value: object) -> tuple[str, ...]:
    """The captions in a value that a text or a list of texts was expected in; whatever else it holds is left out.

    A text that is a list of texts in print, `["one", "two"]`, is those.
    """
    values = value if isinstance(value, list | tuple) else [value]
    if (
        len(values) == 1
        and isinstance(text := values[0], str)
        and text.lstrip()[:1] == "["
        and _LIST.fullmatch(text.strip())
    ):
        values = [_unquoted(quoted) for quoted in re.findall(_QUOTATION, text, re.DOTALL)]
    return tuple(text for text in values if isinstance(text, str) and text.strip() not in _MISSING)


def _unquoted(text: str) -> str:
    """What a quotation of JSON or Python says."""
    inside = text[1:-1]
    if text[0] == "'":
        inside = inside.replace("\\'", "'").replace('"', '\\"')
    try:
        return str(json.loads('"' + re.sub(r"(?<!\\)\\x(?=[0-9a-f]{2})", r"\\u00", inside) + '"', strict=False))
    except ValueError:
        return inside


def one_line(error: BaseException) -> str:
    """What an error of another library says, on one line."""
    return printing.one_line(error)
