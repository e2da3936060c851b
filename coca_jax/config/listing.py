"""The configuration keys as text for `--help`, with the defaults and the comments of keys.py."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import io
import itertools
import textwrap
import tokenize
import typing
from collections.abc import Iterator

from coca_jax.config import keys
from coca_jax.config.keys import Config, ConfigError

_WIDTH = 100  # columns
_MEANING_AT = 34  # column in which the meaning of a key begins


@dataclasses.dataclass(frozen=True)
class _Key:
    path: str  # dotted, e.g. model.image.size
    default: str
    meaning: str

    @property
    def section(self) -> str:
        return self.path.rpartition(".")[0]


def list_keys(part: str = "") -> str:
    """Lists configuration keys by section, each with its default and its meaning.

    Args:
      part: A section (`model.image`), a key (`optimizer.peak_lr`) or its last name (`peak_lr`). Empty: all keys.

    Raises:
      ConfigError: There is no such key or section. The message names the nearest ones.
    """
    part = part.removeprefix("config.").rstrip(".")
    every = list(_keys(Config, ""))
    chosen = [key for key in every if not part or key.path == part or key.path.startswith(part + ".")]
    chosen = chosen or [key for key in every if key.path.rpartition(".")[2] == part]
    if not chosen:
        names = {key.path.rpartition(".")[2] for key in every} | {key.path for key in every} | _sections(every)
        near = difflib.get_close_matches(part, sorted(names), n=3, cutoff=0.4) or sorted(_sections(every))
        raise ConfigError(f"--help={part} is neither a configuration key nor a section; near it: {', '.join(near)}")
    described = dict(_section_meanings(Config, ""))
    lines = []
    for section, group in itertools.groupby(chosen, key=lambda key: key.section):
        title = f"{section}: {described[section]}" if described[section] else f"{section}:" if section else ""
        lines += ["", *textwrap.wrap(title, _WIDTH)]
        for key in group:
            lines += _described(key)
    return "\n".join(lines).strip("\n")


def _sections(every: list[_Key]) -> set[str]:
    return {key.section for key in every} - {""}


def _described(key: _Key) -> list[str]:
    name = f"  {key.path.rpartition('.')[2]}={key.default}"
    if len(name) >= _MEANING_AT:  # the meaning begins on the next line
        return [name, *_wrapped(key.meaning)] if key.meaning else [name]
    lines = _wrapped(key.meaning) or [""]
    return [(name.ljust(_MEANING_AT) + lines[0].lstrip()).rstrip(), *lines[1:]]


def _wrapped(text: str) -> list[str]:
    indent = " " * _MEANING_AT
    return textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=indent)


def _keys(cls: type, path: str) -> Iterator[_Key]:
    """The keys of a configuration class. Keys with values come before its sections."""
    hints = typing.get_type_hints(cls)
    meanings = _comments()[cls.__name__]
    for field in dataclasses.fields(cls):
        if not dataclasses.is_dataclass(hints[field.name]):
            yield _Key(path + field.name, _as_typed(field.default), meanings.get(field.name, ""))
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _keys(hints[field.name], f"{path}{field.name}.")


def _section_meanings(cls: type, path: str) -> Iterator[tuple[str, str]]:
    doc = "" if path == "" else (inspect.getdoc(cls) or "")
    # A dataclass without a docstring has its signature in the place of one.
    yield path.rstrip("."), "" if doc.startswith(f"{cls.__name__}(") else " ".join(doc.split())
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from _section_meanings(typing.cast(type, hint), f"{path}{name}.")


def _as_typed(value: object) -> str:
    """A default as it is written on a command line."""
    return value if isinstance(value, str) and value else repr(value)


@functools.cache
def _comments() -> dict[str, dict[str, str]]:
    """For each class of keys.py the comment of each field: the lines above it, or the end of its line."""
    source = inspect.getsource(keys)
    above: dict[int, str] = {}  # line number -> comment that has the line to itself
    behind: dict[int, str] = {}  # line number -> comment after code
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            (above if token.line.lstrip().startswith("#") else behind)[token.start[0]] = token.string.lstrip("# ")
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(source).body:
        for field in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(node, ast.ClassDef) and isinstance(field, ast.AnnAssign):
                lines = list(itertools.takewhile(above.__contains__, range(field.lineno - 1, 0, -1)))
                texts = [above[line] for line in reversed(lines)] + [behind.get(field.end_lineno or 0, "")]
                found.setdefault(node.name, {})[ast.unparse(field.target)] = " ".join(filter(None, texts))
    return found
