"""Sets of TensorFlow Datasets by name, without TensorFlow: prepared as ArrayRecord, decoded here."""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, SupportsIndex

from etils import epath

from coca_jax.data import addresses, label_names, opening
from coca_jax.data.records import BadExample, DataError, Record
from coca_jax.data.sources import content, files, prompts
from coca_jax.data.sources.base import CAPTION_NAMES, IMAGE_NAMES, LABEL_NAMES, Spec, choose, digest, one_line

_CLASS = re.compile(r"tensorflow_datasets\.core\.features\.\w+(\.\w+)?\Z")


class Tfds:
    """A split of a prepared set.

    Args:
      spec: location is `name`, `name/config`, `name:version` or both; options are `split` (needed, e.g. `train[:90%]`),
        `data_dir`, and `image`, `caption`, `label`, which name features (`a/b` for one inside another).
      numbered: give the class's number for a label even where the set names its classes.

    Raises:
      DataError: the set is not there, or not as ArrayRecord; no such split; no feature of the kind that is needed.
    """

    tokenizer_path = None
    attribution = ""
    class_names: Mapping[str, Sequence[str]] | None = None

    def __init__(self, spec: Spec, numbered: bool = False):
        self.name = spec.text
        self._spec, self._numbered = spec, numbered
        self._lock = threading.Lock()
        self._source: Any = None
        self._labels: list[str] | None = None
        self._image = self._caption = self._label = ""
        source = self._open()
        info = source.dataset_info
        split = info.splits[spec.get("split")]
        shards = [(i.filename.rpartition("/")[2], i.skip, i.take, i.examples_in_shard) for i in split.file_instructions]
        self._records = len(source)
        features = (self._image, self._caption, self._label)
        self._paths = list(dict.fromkeys(os.fspath(i.filename) for i in split.file_instructions))
        self._fingerprint = digest(["tfds", info.full_name, split.num_bytes, features, numbered, *shards])

    def __len__(self) -> int:
        return self._records

    def __getitem__(self, index: SupportsIndex) -> Record:
        number = range(self._records)[index.__index__()]
        with self._lock:
            if self._source is None:  # in another process
                self._open()
        where = f"{self.name}: record {number}"
        try:
            example = self._source[number]
        except (RuntimeError, ValueError, OSError, KeyError) as error:
            raise BadExample("unreadable", f"{where} cannot be read: {one_line(error)}") from error
        image = _value(example, self._image)
        if not isinstance(image, bytes):
            raise BadExample("empty", f"{where} has no picture")
        captions = []
        for text in _flat(_value(example, self._caption)) if self._caption else ():
            try:
                captions.append(text.decode("utf-8") if isinstance(text, bytes) else str(text))
            except UnicodeDecodeError as error:
                raise BadExample("encoding", f"{where}: its caption is not UTF-8: {one_line(error)}") from None
        label = ""
        if self._label:
            value = next(iter(_flat(_value(example, self._label))), None)  # the first of several
            if isinstance(value, bytes):
                label = value.decode("utf-8", "replace").strip()
            elif value is not None and int(value) >= 0:  # -1 where the set hides it
                if self._labels and int(value) >= len(self._labels):
                    raise BadExample("unreadable", f"{where}: its class {int(value)} is not one of {len(self._labels)}")
                label = self._labels[int(value)] if self._labels else str(int(value))
        return Record(f"{number}", image, tuple(text for text in captions if text.strip()), label)

    def __repr__(self) -> str:
        return f"Tfds({self.name})"

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_lock": None, "_source": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = threading.Lock()

    def fingerprint(self) -> str:
        """16 hexadecimal digits of name, version, split, names and counts of its files, and the features read."""
        return self._fingerprint

    def contents(self) -> dict[str, str]:
        """See Source."""
        try:
            found = [files.look(path) for path in self._paths]
        except OSError as error:
            raise DataError(f"{self.name}: {one_line(error)}; prepare it again") from error
        listed = digest([self._fingerprint, self._labels])
        return {content.LIST: listed} | content.of_files(found)

    def _open(self) -> Any:
        import tensorflow_datasets as tfds  # costs a second, and is needed here alone
        from tensorflow_datasets.core import naming
        from tensorflow_datasets.core.utils import file_utils

        spec = self._spec
        how = f"tfds.builder({spec.location!r}).download_and_prepare(file_format='array_record')"
        # Not as text, in which TFDS would look for patterns.
        data_dir = addresses.absolute(spec.get("data_dir")) if spec.get("data_dir") else None
        # With a version, any will do, TFDS looks at prepared files before it looks for the set's code, which may be
        # registered nowhere here, or need TensorFlow.
        name = spec.location if ":" in spec.location else f"{spec.location}:*.*.*"
        try:
            folder = naming.parse_builder_name_kwargs(name)[0].name  # `Mine` is read from `mine`
            _check_classes([addresses.path(top) / folder for top in file_utils.list_data_dirs(data_dir)], spec)
            builder = tfds.builder(name, data_dir=data_dir)
        except DataError:
            raise
        except Exception as error:  # whatever a builder's own code raises
            raise DataError(f"{spec.text}: no such set: {_first_line(error)}; prepare it by {how}") from error
        splits = list(builder.info.splits)
        if not splits:
            raise DataError(f"{spec.text}: not prepared in {builder.data_dir}; prepare it by {how}, or set ?data_dir=")
        if not spec.get("split"):
            raise DataError(
                f"{spec.text}: which split? Add ?split=, one of {', '.join(splits)}, or a part: train[:90%]"
            )
        self._choose(tfds, builder.info.features)
        decoders: Any = tfds.decode.SkipDecoding()
        for part in reversed(self._image.split("/")):
            decoders = {part: decoders}
        try:
            self._source = source = builder.as_data_source(spec.get("split"), decoders=decoders)
        except NotImplementedError as error:
            raise DataError(
                f"{spec.text}: prepared as {builder.info.file_format.value}, which cannot be read at any place without "
                f"TensorFlow; prepare it in another folder by {how}"
            ) from error
        except (ValueError, KeyError, AssertionError) as error:
            raise DataError(
                f"{spec.text}: no split {spec.get('split')!r} ({_first_line(error)}); there are {', '.join(splits)}, "
                "and parts of them: train[:90%]"
            ) from error
        return source

    def _choose(self, tfds: Any, features: Any) -> None:
        """Which features hold picture, captions and label: those named, else by their types."""
        by_type: dict[str, list[str]] = {"image": [], "caption": [], "label": []}
        named: dict[str, Any] = {}
        for path, feature in _features(tfds, features):
            named[path] = feature
            if isinstance(feature, tfds.features.Image):
                by_type["image"].append(path)
            elif isinstance(feature, tfds.features.Text):
                by_type["caption"].append(path)
            elif isinstance(feature, tfds.features.ClassLabel):
                by_type["label"].append(path)
        usual = {"image": IMAGE_NAMES, "caption": CAPTION_NAMES, "label": LABEL_NAMES}
        chosen = {}
        for what, there in by_type.items():
            if self._spec.get(what):
                choose(self._spec, what, list(named), (), self.name)  # says what there is where it is not there
                chosen[what] = self._spec.get(what)
                continue
            ends = {path.rpartition("/")[2]: path for path in reversed(there)}
            ends |= {path.rpartition("/")[0]: path for path in reversed(there) if path.endswith("/text")}
            found = choose(self._spec, what, list(ends), usual[what], self.name)
            # A text that is not called a caption is an id or a file's name.
            chosen[what] = ends[found] if found else there[0] if there and what != "caption" else ""
        self._image, self._caption, self._label = chosen["image"], chosen["caption"], chosen["label"]
        if not self._image or not (self._caption or self._label):
            raise DataError(
                f"{self.name}: no feature of {'captions or labels' if self._image else 'pictures'}; there are "
                f"{', '.join(named)}: name them by ?image= and ?caption= (or ?label=)"
            )
        if not isinstance(named[self._image], tfds.features.Image):
            raise DataError(f"{self.name}: the feature {self._image!r} is no picture; name one by ?image=")
        label = named.get(self._label)
        if isinstance(label, tfds.features.ClassLabel) and label.names and not self._numbered:
            self._labels = list(label.names)
            self.class_names = label_names.class_names_of(self._labels) or None


def _check_classes(folders: Iterable[epath.Path], spec: Spec) -> None:
    """Raises DataError where a set names Python classes that are not TFDS's own: it would import their modules.

    A set's features.json names the class of every feature, and what is imported runs: a module of that name in the
    current folder, which may be the set's, too.
    """
    for folder in folders:
        for file in _feature_files(folder, 2):
            try:
                foreign = next(
                    (name for name in _classes(json.loads(opening.read(file))) if not _CLASS.match(name)), ""
                )
            except (OSError, ValueError, RecursionError) as error:
                raise DataError(f"{spec.text}: {file} cannot be read: {one_line(error)}; prepare it again") from error
            if foreign:
                raise DataError(
                    f"{spec.text}: {file} asks for the Python class {foreign[:200]!r}, which is not one of TFDS's own "
                    "and is not run: prepare the set with tfds.features alone"
                )


def _feature_files(folder: epath.Path, depth: int) -> Iterator[epath.Path]:
    """Every features.json in a folder and so many below it, hidden ones too. No name is taken for a pattern."""
    if (file := folder / "features.json").exists():
        yield file
    for inner in sorted(folder.iterdir()) if depth and folder.is_dir() else ():
        yield from _feature_files(inner, depth - 1)


def _classes(values: Any) -> Iterator[str]:
    """All names of classes in a features.json; parts of it are JSON inside of a text."""
    if isinstance(values, list):
        for value in values:
            yield from _classes(value)
    elif isinstance(values, dict):
        for key, value in values.items():
            if key in ("pythonClassName", "python_class_name", "type") and isinstance(value, str) and "." in value:
                yield value
            if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
                with contextlib.suppress(ValueError):
                    value = json.loads(value)
            yield from _classes(value)


def _features(tfds: Any, feature: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Features that hold no others, by path; a list of something counts as that."""
    if isinstance(feature, tfds.features.Sequence):
        feature = feature.feature
    if isinstance(feature, tfds.features.FeaturesDict):
        for name, inner in feature.items():
            yield from _features(tfds, inner, f"{path}/{name}" if path else name)
    else:
        yield path, feature


def _value(example: Any, path: str) -> Any:
    for part in path.split("/"):
        example = [one[part] for one in example] if isinstance(example, list | tuple) else example[part]
    return example


def _flat(value: Any) -> list[Any]:
    """The values in a scalar, an array or a list."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return list(value) if isinstance(value, list | tuple) else [value]


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def open_tfds(spec: Spec) -> Tfds:
    """See `open_source`."""
    spec.check(
        ("split", "data_dir", "image", "caption", "label", "template", "templates", "classes"),
        ("template",),
    )
    classes = prompts.read_classes(spec)
    return Tfds(spec, numbered=classes is not None and "0" in classes)
