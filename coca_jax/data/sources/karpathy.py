"""COCO, Flickr30k and Flickr8k by the splits of Karpathy and Li 2015: dataset_coco.json, dataset_flickr30k.json.

The file is a JSON object whose `images` are a list of `{"filepath": "val2014", "filename": "COCO_val2014_..391895.jpg",
"split": "test", "sentences": [{"raw": "A man with a red helmet on a small moped."}, ...], "cocoid": 391895}`. Flickr's
have neither `filepath` nor `cocoid`. What else is in it (`tokens`, `sentids`, `imgid`) is not read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

from coca_jax.data.records import BadExample, DataError, Record
from coca_jax.data.sources import content, files
from coca_jax.data.sources.base import Spec, digest, one_line, texts

_LIMIT = 1 << 30  # bytes of the JSON; COCO's has 144 MB


class Karpathy:
    """The pictures of one or more splits, in the order of the file, each with its captions in theirs.

    Args:
      spec: location is the JSON file; options are `split` (one or more, with commas: `train,restval` is what COCO is
        trained on), `root` (the folder that `filepath/filename` is in; the JSON's own folder where it is left out), and
        `captions` (so many of each picture, the first; a few of COCO's have 6 or 7, and some papers keep 5).

    Raises:
      DataError: the file is missing or of another form, or it has no such split.
    """

    tokenizer_path = None
    attribution = ""
    class_names: Mapping[str, Sequence[str]] | None = None

    def __init__(self, spec: Spec):
        self.name = spec.text
        self._file = spec.location
        top = "/" if spec.location.startswith("/") else "."
        self._root = spec.get("root") or spec.location.rpartition("/")[0] or top
        limit = spec.get("captions")
        if limit and not (limit.isdecimal() and int(limit)):
            raise DataError(
                f"source {spec.text!r}: captions={limit}: write how many of each picture are kept, 1 or more"
            )
        wanted = spec.fields("split")
        images = _images(spec)
        there = dict.fromkeys(image["split"] for image in images)
        for split in wanted or ("",):
            if split not in there:
                raise DataError(
                    f"source {spec.text!r}: "
                    + (f"no split {split!r} in {self._file}" if split else "say which split: ?split=NAME")
                    + f"; there are {', '.join(there)}"
                )
        self._entries: list[tuple[str, tuple[str, ...]]] = []
        for number, image in enumerate(images):
            if image["split"] not in wanted:
                continue
            path = "/".join(part for part in (image.get("filepath", ""), image["filename"]) if part)
            files.inside(self._root, path, f"{self._file}: image {number}", links=False)
            captions = texts([sentence.get("raw") for sentence in image["sentences"] if isinstance(sentence, dict)])
            self._entries.append((path, captions[: int(limit)] if limit else captions))
        self._fingerprint = digest(["karpathy", len(self._entries), *map(repr, self._entries)])

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: SupportsIndex) -> Record:
        path, captions = self._entries[index]
        where = f"{self._file}: {path!r}"
        if not captions:
            raise BadExample("no_caption", f"{where} has no sentence")
        image = files.picture(self._root, path, where)
        return Record(path, image, tuple(caption.strip() for caption in captions))

    def __repr__(self) -> str:
        return f"Karpathy({self.name})"

    def fingerprint(self) -> str:
        """16 hexadecimal digits of names and captions."""
        return self._fingerprint

    def contents(self) -> dict[str, str]:
        """See Source."""
        described = {self._file.rpartition("/")[2]: self._fingerprint}
        return described | content.of_named(self._root, [path for path, _ in self._entries])


def _images(spec: Spec) -> list[dict[str, Any]]:
    where = f"source {spec.text!r}: {spec.location}"
    try:
        found = json.loads(files.read(spec.location, _LIMIT, "a file of splits"))
    except OSError as error:
        raise DataError(f"{where} cannot be read: {one_line(error)}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {one_line(error)}") from error
    images = found.get("images") if isinstance(found, dict) else None
    if not isinstance(images, list) or not images:
        raise DataError(f"{where} has no list `images`: name a file of Karpathy's splits, e.g. dataset_coco.json")
    for number, image in enumerate(images):
        fields = {"split": str, "filename": str, "sentences": list}
        wrong = [f for f, kind in fields.items() if not isinstance(image, dict) or not isinstance(image.get(f), kind)]
        if wrong or not isinstance(image.get("filepath", ""), str):
            raise DataError(f"{where}: image {number} has no usable `{(wrong or ['filepath'])[0]}`")
    return images


def open_karpathy(spec: Spec) -> Karpathy:
    """See `open_source`."""
    spec.check(("split", "root", "captions"))
    return Karpathy(spec)
