"""The built-in set of emoji as a source."""

from __future__ import annotations

import functools
import importlib.resources
import json
import os

from coca_jax.data import addresses, emoji
from coca_jax.data.records import DataError
from coca_jax.data.sources.array_record import ArrayRecords
from coca_jax.data.sources.base import Spec, one_line


def open_emoji(spec: Spec) -> ArrayRecords:
    """See `open_source`."""
    spec.check(("template", "templates"), ("template",))
    folder = addresses.path(emoji.default_folder())
    try:
        manifest = emoji.prepare()
    except OSError as error:
        raise DataError(
            f"{spec.text}: cannot be prepared in {folder}: {one_line(error)}; set COCA_JAX_CACHE to a folder that can "
            "be written"
        ) from error
    if spec.location not in manifest["splits"]:
        raise DataError(f"emoji:{spec.location}: no such split; there are {', '.join(manifest['splits'])}")
    part = manifest["splits"][spec.location]
    file = os.fspath(folder / part["file"])
    return ArrayRecords(
        spec.text,
        [(file, part["start"], part["stop"])],
        folder / emoji.TOKENIZER,
        manifest["attribution"],
        class_names(),
        manifest["files"][part["file"]]["sha256"],
    )


@functools.cache
def class_names() -> dict[str, list[str]]:
    """What captions call each of Unicode's subcategories."""
    text = importlib.resources.files("coca_jax.data").joinpath("emoji_classes.json").read_text(encoding="utf-8")
    return json.loads(text)["class_names"]
