"""Labelled sets become text: every template filled with the name of the class, as CoCa's paper does with JFT."""

from __future__ import annotations

import functools
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, SupportsIndex

from etils import epath

from coca_jax.data import records
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
        label; where none are, records that have captions keep them, and the others get DEFAULT_TEMPLATE.
      classes: by what the source calls each; None where that is the name.
    """

    def __init__(self, source: Source, templates: Sequence[str], classes: Mapping[str, Class] | None):
        self.source = source
        self._templates, self._classes = tuple(templates), classes
        self.name: str = source.name
        self.tokenizer_path: epath.Path | None = source.tokenizer_path
        self.attribution: str = source.attribution
        self.class_names: Mapping[str, Sequence[str]] | None = source.class_names
        if classes is not None:
            self.class_names = {c.label: list(c.names) for c in classes.values()}

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
        names: tuple[str, ...] = (record.label,)
        if self._classes is not None:
            if record.label not in self._classes:
                raise BadExample(
                    "no_caption",
                    f"{self.name}: record {index} has the label {record.label!r}, which ?classes= does not name",
                )
            label, names = self._classes[record.label]
        elif self.class_names is not None:
            names = tuple(self.class_names.get(record.label, names))
        captions = record.captions
        if self._templates or not captions:
            # No str.format: templates and names are data.
            captions = tuple(t.replace("{}", n) for t in self._templates or (DEFAULT_TEMPLATE,) for n in names)
        return record._replace(captions=captions, label=label)

    def __repr__(self) -> str:
        return f"Prompted({self.source!r})"

    def fingerprint(self) -> str:
        """That of the source, and the templates and names."""
        if not self._templates and self._classes is None:
            return self.source.fingerprint()
        return digest([self.source.fingerprint(), self._templates, sorted((self._classes or {}).items())])


def read_templates(spec: Spec) -> tuple[str, ...]:
    """The templates of `?template=` and of the lines of the file `?templates=`. Raises DataError for one without {}."""
    templates = list(spec.options.get("template", ()))
    if path := spec.get("templates"):
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

    A JSON file maps the data's numbers or words to a name or a list of names, or lists names by number; of any other
    file line n (from 0) is the name of class n.

    Raises:
      DataError: the file is missing or of another form, a class has no name, or two have the same.
    """
    if not (path := spec.get("classes")):
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
        pairs = list(enumerate(found)) if isinstance(found, list) else list(getattr(found, "items", list)())
    else:
        pairs = list(enumerate(text.splitlines()))
        while pairs and not pairs[-1][1].strip():
            pairs.pop()
    classes: dict[str, Class] = {}
    owner: dict[str, str] = {}
    for key, value in pairs:
        names = tuple(
            n.strip() for n in (value if isinstance(value, list) else [value]) if isinstance(n, str) and n.strip()
        )
        if not names:
            raise DataError(f"{path}: class {key} has no name: write one, or a list of them")
        if (other := owner.setdefault(names[0], str(key))) != str(key):
            raise DataError(f"{path}: the classes {other} and {key} are both named {names[0]!r}: tell them apart")
        classes[str(key)] = Class(names[0], names)
    if not classes:
        raise DataError(f"{path} names no classes: write a name a line, or a JSON object of them")
    return classes
