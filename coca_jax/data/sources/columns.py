"""What the columns of a Parquet file hold: images, captions and labels, by their types and by Hugging Face's metadata.

Hugging Face's datasets keep a JSON text in the schema's metadata, under `huggingface`: `{"info": {"features": {...}}}`
(datasets/features/features.py, Features.arrow_schema). A ClassLabel there holds the `names` of the numbers in a column.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from coca_jax.data.records import DataError
from coca_jax.data.sources.base import CAPTION_NAMES, IMAGE_NAMES, LABEL_NAMES, Spec, choose

# Looked for after the names that every source looks for.
_IMAGES = (*IMAGE_NAMES, "images", "frames")
_CAPTIONS = (*CAPTION_NAMES, "sentences", "sentence", "description", "raw")
_LABELS = (*LABEL_NAMES, "labels", "fine_label", "coarse_label")
_NUMBERED = re.compile(r"(?:captions?|texts?|sentences?)_?\d+", re.IGNORECASE)

_NUMBER = re.compile(r"u?int|float|double|halffloat|bool|decimal")

# A column, and the fields inside of it.
Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Columns:
    """What is read.

    Attributes:
      image: column.
      captions: where the captions are, one path or more.
      label: where the label is; empty where there is none.
      names: of the numbers that are labels; empty where the labels are their own names.
      remarks: lines on what was chosen.
    """

    image: str
    captions: tuple[Path, ...]
    label: Path
    names: tuple[str, ...]
    remarks: tuple[str, ...]

    @property
    def columns(self) -> list[str]:
        """Names of all columns that are read."""
        return list(dict.fromkeys([self.image, *(path[0] for path in (*self.captions, self.label) if path)]))


def choose_columns(spec: Spec, schema: Any, where: str) -> Columns:
    """The columns that options name, or that are called or typed as such.

    Args:
      spec: its options are `image`, `caption` (one or more, with commas; `column.field` in a struct) and `label`.
      schema: pyarrow's of the file.
      where: the file, for messages.

    Raises:
      DataError: there are none, or a column that is named does not hold such values.
    """
    types = {field.name: field.type for field in schema}
    there, features = list(types), _features(schema)
    image = choose(spec, "image", there, _IMAGES, where) or _only_image(types)
    captions, refused = _captions(spec, types, where)
    label, remarks = _label(spec, types, features, where)
    if not image or not (captions or label):
        lettered = [name for name in there if name.lower().startswith(("caption", "text")) and _holds_text(types[name])]
        likely = ",".join(lettered) if image else ""
        raise DataError(
            refused
            or f"{where}: no column of {'captions or labels' if image else 'pictures'}; there are {', '.join(there)}: "
            f"name them by {'' if image else '?image= and '}?caption={likely} (or ?label=)"
        )
    if _NUMBER.match(kind := str(_inside(types[image], ()))):
        raise DataError(
            f"{where}: the column {image!r} holds {kind}, which is no image: write the bytes of files (JPEG, PNG) "
            "or their paths, or name another by ?image="
        )
    names = () if spec.get("classes") else names_of(schema, label)  # a file of names is by number
    return Columns(image, captions, label, names, tuple(remarks))


def names_of(schema: Any, label: Path) -> tuple[str, ...]:
    """The names that Hugging Face's metadata give to the numbers of a column; empty where there are none."""
    return tuple(map(str, _names(_feature(_features(schema), label))))


def values(value: Any, path: Path) -> list[Any]:
    """All values at a path in what a column holds, lists of any depth and maps by their keys taken apart."""
    if isinstance(value, dict):
        return values(value.get(path[0]), path[1:]) if path else []
    if isinstance(value, list):
        if path and value and all(isinstance(one, tuple) and len(one) == 2 for one in value):  # a map
            return [found for key, one in value if key == path[0] for found in values(one, path[1:])]
        return [found for one in value for found in values(one, path)]
    return [] if value is None or path else [value]


# ---------------------------------------------------------------------------------------------------------------------


def _captions(spec: Spec, types: Mapping[str, Any], where: str) -> tuple[tuple[Path, ...], str]:
    """Where captions are; and if nowhere, why the column that is called so has none."""
    if wanted := spec.fields("caption"):
        return tuple(_caption(_path(name, types, "caption", where), types, where) for name in wanted), ""
    lower = {name.lower(): name for name in reversed(list(types))}
    refused = ""
    for name in (lower[usual] for usual in _CAPTIONS if usual in lower):
        try:
            return (_caption((name,), types, where),), ""
        except DataError as error:  # another column may hold them
            refused = refused or str(error)
    numbered = [name for name in types if _NUMBERED.fullmatch(name) and _holds_text(types[name])]
    return tuple((name,) for name in numbered), refused


def _caption(path: Path, types: Mapping[str, Any], where: str) -> Path:
    """The path to texts that one begins; of a struct the field that is called as captions are."""
    kind = _inside(types[path[0]], path[1:])
    name = ".".join(path)
    if _is(kind, "struct"):
        fields = {field.name: field.type for field in kind}
        texts = [field for field in fields if _holds_text(fields[field])]
        usual = [field for field in ("raw", *CAPTION_NAMES) if field in texts]
        if usual or len(texts) == 1:
            return _caption((*path, usual[0] if usual else texts[0]), types, where)
        fix = " or ".join(f"?caption={name}.{field}" for field in texts) + ", or several with commas"
        raise DataError(
            f"{where}: the column {name!r} has {'several texts' if texts else 'no text'} in it ({', '.join(fields)}): "
            + (fix if texts else "name another by ?caption=")
        )
    if _is(kind, "map") and _holds_text(kind.item_type):
        raise DataError(f"{where}: the column {name!r} holds texts by key: write ?caption={name}.KEY")
    if not _holds_text(kind):
        raise DataError(
            f"{where}: the column {name!r} holds {kind}, which is no caption: name one with texts by ?caption="
        )
    return path


def _label(spec: Spec, types: Mapping[str, Any], features: Mapping[str, Any], where: str) -> tuple[Path, list[str]]:
    """Where the label is, and a remark where there were several to choose from."""
    if wanted := spec.get("label"):
        path = _path(wanted, types, "label", where)
        if _is(_inside(types[path[0]], path[1:]), "struct"):
            fields = ", ".join(f"?label={wanted}.{field.name}" for field in _inside(types[path[0]], path[1:]))
            raise DataError(f"{where}: {wanted!r} is a struct: name a field of it, {fields}")
        return path, []
    classes = {name: _names(feature) for name, feature in features.items() if name in types}
    classes = {name: names for name, names in classes.items() if names}
    lower = {name.lower(): name for name in reversed(list(types))}
    usual = [lower[name] for name in _LABELS if name in lower and not _is(_inside(types[lower[name]], ()), "struct")]
    # Of several the one with a usual name, else the one with the most classes, the first of these.
    found = usual or sorted(classes, key=lambda name: -len(classes[name]))
    others = [name for name in dict.fromkeys([*found, *classes]) if name != found[0]] if found else []
    if not others:
        return ((found[0],) if found else ()), []
    return (found[0],), [f"labels are read from the column {found[0]}; there are also {', '.join(others)}: ?label="]


def _names(feature: Any) -> list[str]:
    """The names of a ClassLabel, also where it lies in lists; none of other features."""
    found = _element(feature)
    names = found.get("names") if isinstance(found, dict) and found.get("_type") == "ClassLabel" else None
    return names if isinstance(names, list) else []


def _path(name: str, types: Mapping[str, Any], option: str, where: str) -> Path:
    """The column, or the field inside of one, that an option names."""
    if name in types:  # a column may have a dot in its name
        return (name,)
    for column, kind in types.items():
        if name.startswith(column + "."):
            fields = tuple(name[len(column) + 1 :].split("."))
            if _inside(kind, fields) is not None:
                return (column, *fields)
    raise DataError(f"{where}: no {name!r} for ?{option}=; there are {', '.join(_leaves(types))}")


def _leaves(types: Mapping[str, Any], before: str = "") -> Iterator[str]:
    for name, kind in types.items():
        inner = _inside(kind, ())
        if _is(inner, "struct") and {field.name for field in inner} != {"bytes", "path"}:
            yield from _leaves({field.name: field.type for field in inner}, f"{before}{name}.")
        else:
            yield before + name


def _inside(kind: Any, fields: Sequence[str]) -> Any:
    """The type of a field inside of a type, lists taken apart; None where there is no such field."""
    while _is(kind, "list"):
        kind = kind.value_type
    if not fields:
        return kind
    if _is(kind, "struct") and kind.get_field_index(fields[0]) >= 0:
        return _inside(kind.field(fields[0]).type, fields[1:])
    if _is(kind, "map"):
        return _inside(kind.item_type, fields[1:])
    return None


def _is(kind: Any, what: str) -> bool:
    """Whether a type of pyarrow is a struct, a map, ...; of lists all kinds count."""
    found = re.match("[a-z_]*", str(kind))
    name = found[0] if found else ""
    return (re.sub("^(large|fixed_size)_|_view$", "", name) if what == "list" else name) == what


def _holds_text(kind: Any) -> bool:
    kind = _inside(kind, ())
    if _is(kind, "dictionary"):
        kind = kind.value_type
    if _is(kind, "struct"):
        return False
    kind = getattr(kind, "storage_type", kind)
    return str(kind).removeprefix("large_").removesuffix("_view") in ("string", "binary", "null")


def _only_image(types: Mapping[str, Any]) -> str:
    """The one column that is an image as Hugging Face writes it."""
    found = [
        name
        for name, kind in types.items()
        if _is(inner := _inside(kind, ()), "struct") and {field.name for field in inner} == {"bytes", "path"}
    ]
    return found[0] if len(found) == 1 else ""


def _features(schema: Any) -> dict[str, Any]:
    """Hugging Face's features by column; empty where there are none, or none that can be read."""
    try:
        found = json.loads((schema.metadata or {}).get(b"huggingface", b"null"))
        features = found["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _element(feature: Any) -> Any:
    """The feature inside of lists: `[x]`, Sequence, List and LargeList."""
    while True:
        if isinstance(feature, list) and len(feature) == 1:
            feature = feature[0]
        elif isinstance(feature, dict) and feature.get("_type") in ("Sequence", "List", "LargeList"):
            feature = feature.get("feature")
        else:
            return feature


def _feature(features: Any, path: Path) -> Any:
    found = features if path else None
    for name in path:
        found = _element(found.get(name)) if isinstance(found, dict) else None
    return found
