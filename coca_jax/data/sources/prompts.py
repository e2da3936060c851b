"""Labelled sets become text: every template filled with the name of the class, as CoCa's paper does with JFT."""

from __future__ import annotations

import functools
import importlib.resources
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, SupportsIndex

from etils import epath

from coca_jax.data import label_names, records
from coca_jax.data.records import BadExample, DataError, Record
from coca_jax.data.sources import files
from coca_jax.data.sources.base import Source, Spec, digest

OPTIONS = ("template", "templates", "classes")
DEFAULT_TEMPLATE = "a photo of a {}."


@functools.cache
def imagenet() -> dict[str, Any]:
    """CLIP's names of ImageNet's 1,000 classes by WordNet id, `classes`, its 80 `prompts`, and their `source`."""
    found: dict[str, Any] = json.loads(importlib.resources.files("coca_jax.data").joinpath("imagenet.json").read_text())
    return found


class Class(NamedTuple):
    """A class: what records of it carry as their label, and what it is called, one name or more."""

    label: str
    names: tuple[str, ...]


class Prompted:
    """A source whose labels are turned into captions.

    Args:
      source: what is read.
      templates: each with a {} for the name. Where some are given they make the captions of every record that has a
        label; where none are, records that have captions keep them, and the others get DEFAULT_TEMPLATE. A label that
        is no name (see `label_names.name_of`), and that nothing gives a name, makes no caption.
      classes: by what the source calls each; None where `label_names.name_of` makes the name.
    """

    def __init__(self, source: Source, templates: Sequence[str], classes: Mapping[str, Class] | None):
        self.source = source
        self._templates, self._classes = tuple(templates), classes
        self._by_name = _named(classes or {})
        self.name: str = source.name
        self.tokenizer_path: epath.Path | None = source.tokenizer_path
        self.attribution: str = source.attribution
        self.remarks: Sequence[str] = getattr(source, "remarks", ())
        self.class_names: Mapping[str, Sequence[str]] | None = source.class_names
        if classes is not None:
            self.class_names = {c.label: list(c.names) for c in classes.values()}
            self._check_labels(getattr(source, "labels", ()))

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: SupportsIndex) -> Record:
        record = self.source[index]
        if record.label:
            record = self._prompted(record, index)
        records.check_unicode((*record.captions, record.label), f"{self.name}: record {index}")
        return record

    def _prompted(self, record: Record, index: SupportsIndex) -> Record:
        label = record.label
        names: tuple[str, ...] = ()
        if self._classes is not None:
            found = self._class(label)
            if found is None:
                raise BadExample(
                    "no_caption",
                    f"{self.name}: record {index} has the label {record.label!r}, which ?classes= does not name",
                )
            label, names = found
        elif self.class_names is not None:
            names = tuple(self.class_names.get(label, ()))
        if not names and (name := label_names.name_of(label)):
            names = (name,)
        captions = record.captions
        if self._templates or not captions:
            # No str.format: templates and names are data.
            captions = tuple(t.replace("{}", n) for t in self._templates or (DEFAULT_TEMPLATE,) for n in names)
        return record._replace(captions=captions, label=label)

    def _check_labels(self, labels: Sequence[str]) -> None:
        """Raises DataError where classes are counted from 1 in the data, or the names are those of others."""
        unknown = [label for label in labels if self._class(label) is None]
        numbers = [int(label) for label in labels if re.fullmatch("[0-9]+", label)]
        if unknown and (len(unknown) == len(labels) or (numbers and min(numbers) == 1 and len(unknown) == 1)):
            raise DataError(
                f"{self.name}: ?classes= does not name {unknown[0]!r}: line n of a file is class n, counted from 0; "
                'where the data count from 1 write a first line for class 0, or JSON as {"1": "cat", "2": "dog"}'
            )

    def _class(self, label: str) -> Class | None:
        """The class that a label stands for: by itself, by the number in it (`007`, `7.0`), or by one of the names."""
        classes = self._classes or {}
        if label not in classes and re.fullmatch(r"[0-9]+(?:\.0+)?", label):
            return classes.get(str(int(label.partition(".")[0])))
        return classes.get(label) or self._by_name.get(_plain(label))

    def __repr__(self) -> str:
        return f"Prompted({self.source!r})"

    def fingerprint(self) -> str:
        """That of the source, and the templates and names."""
        if not self._templates and self._classes is None:
            return self.source.fingerprint()
        return digest([self.source.fingerprint(), self._templates, sorted((self._classes or {}).items())])

    def contents(self) -> dict[str, str]:
        """See Source."""
        found = dict(self.source.contents())
        if self._templates:
            found["?templates="] = digest(self._templates)
        if self._classes is not None:
            found["?classes="] = digest(sorted(self._classes.items()))
        return found


def read_templates(spec: Spec) -> tuple[str, ...]:
    """The templates of `?template=` and of the lines of the file `?templates=`. Raises DataError for one without {}."""
    templates = list(spec.options.get("template", ()))
    if path := spec.path("templates"):
        lines = files.read_settings(path, spec.text).splitlines()
        templates += [line.strip() for line in lines if line.strip()]
        if not templates:
            raise DataError(f"source {spec.text!r}: {path} holds no template: write one a line, with {{}} for the name")
    for template in templates:
        if "{}" not in template:
            raise DataError(f"source {spec.text!r}: the template {template!r} has no {{}} for the name of the class")
    return tuple(templates)


def read_classes(spec: Spec) -> dict[str, Class] | None:
    """The classes of the file `?classes=`, by what the data call each; None without the option.

    `?classes=imagenet` are ImageNet's with CLIP's names, by number (0 to 999) and by WordNet id (n01440764), which is
    their label: two of the names, missile and sunglasses, are those of two classes.

    A JSON file maps the data's numbers or words to a name or a list of names (or, as `label2id`, names to numbers), or
    lists names by number; of any other file line n (from 0) is the name of class n. `_` in a name becomes a blank. A
    label may also be one of the names.

    Raises:
      DataError: the file is missing or of another form, a class has no name, or two have the same.
    """
    if not (path := spec.path("classes")):
        return None
    if path == "imagenet":
        known = [Class(wordnet, (name,)) for wordnet, name in imagenet()["classes"].items()]
        return {key: c for number, c in enumerate(known) for key in (c.label, str(number))}
    text = files.read_settings(path, spec.text)
    if path.endswith(".json"):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} is not JSON: {error}") from None
        pairs = list(enumerate(found)) if isinstance(found, list) else _pairs(found)
    else:
        pairs = list(enumerate(text.splitlines()))
        while pairs and not pairs[-1][1].strip():
            pairs.pop()
    classes: dict[str, Class] = {}
    owner: dict[str, str] = {}
    for key, value in pairs:
        written = [n.strip() for n in (value if isinstance(value, list) else [value]) if isinstance(n, str)]
        written = [n for n in written if n and not (len(written) > 1 and label_names.is_wordnet(n))]
        names = tuple(dict.fromkeys(map(label_names.words_of, written)))
        if not names:
            raise DataError(f"{path}: class {key} has no name: write one, or a list of them")
        if (other := owner.setdefault(names[0], str(key))) != str(key):
            raise DataError(f"{path}: the classes {other} and {key} are both named {names[0]!r}: tell them apart")
        classes[str(key)] = Class(names[0], names)
    if not classes:
        raise DataError(f"{path} names no classes: write a name a line, or a JSON object of them")
    return classes


def _pairs(found: Any) -> list[tuple[Any, Any]]:
    """Labels and names of a JSON object; Hugging Face's config.json has them as `id2label`, others as name: number."""
    if not isinstance(found, dict):
        return []
    if isinstance(found.get("id2label"), dict):
        found = found["id2label"]
    numbers = list(found.values())
    if all(type(n) is int for n in numbers) and sorted(numbers) == list(range(len(numbers))):
        return [(number, name) for name, number in found.items()]
    return list(found.items())


def _named(classes: Mapping[str, Class]) -> dict[str, Class]:
    """The classes by those of their names that no other class has."""
    owners: dict[str, dict[str, Class]] = {}
    for found in classes.values():
        for name in found.names:
            owners.setdefault(_plain(name), {})[found.label] = found
    return {name: next(iter(found.values())) for name, found in owners.items() if len(found) == 1}


def _plain(name: str) -> str:
    """What two spellings of a class have in common."""
    return (label_names.name_of(name) or name).casefold()
