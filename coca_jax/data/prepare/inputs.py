"""What is converted or described: one source or several, one after the other."""

from __future__ import annotations

import functools
import re

from coca_jax.data.mixture import Mixture
from coca_jax.data.records import DataError
from coca_jax.data.sources import Source, open_source
from coca_jax.data.sources.base import Spec


@functools.lru_cache(maxsize=4)
def open_inputs(spec: str) -> Mixture:
    """Opens `A + B + ...`, each what training reads (see open_source) or `tfrecord:PATTERN`; all of A comes first.

    It is kept: a process that converts many shards opens their source once.

    Raises:
      DataError: as open_source, or a source has a weight, or is there twice, or its name is not UTF-8.
    """
    check_writable(spec)
    parts = [part.strip() for part in re.split(r"\s\+\s", spec.strip())]
    for part in parts:
        if re.match(r"\S+\s*\*\s", part):
            raise DataError(f"source {part!r} has a weight: every record is read once here; weights are for training")
    if double := next((part for part in parts if parts.count(part) > 1), ""):
        raise DataError(f"source {double!r} is there twice: name it once")
    return Mixture([_open(part) for part in parts], [1 / len(parts)] * len(parts))


def check_writable(name: str) -> None:
    """Raises DataError for a name that no manifest can hold: files may be named by bytes that are no text."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{name!r} is not UTF-8, as a manifest is: rename it") from error


def is_sequential(inputs: Mixture) -> bool:
    """Whether some of it can only be read well in its own order."""
    return any(getattr(source, "sequential", False) for source in inputs.sources)


def _open(spec: str) -> Source:
    if not spec.startswith("tfrecord:"):
        return open_source(spec)
    from coca_jax.data.prepare.tfrecord import TFRecords  # needs protobuf, which the other kinds do not load

    source = TFRecords(Spec.parse(spec))
    if not len(source):
        raise DataError(f"{spec}: holds no records")
    return source
