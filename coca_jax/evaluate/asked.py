"""What an evaluation is asked for, opened and looked at before a training begins: at its end it would be too late."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from coca_jax.config import Config, ConfigError, Evaluate
from coca_jax.data import images
from coca_jax.data.records import BadExample, Record, named_in
from coca_jax.data.sources import Source, open_source
from coca_jax.evaluate import pixels


def open_sources(evaluate: Evaluate) -> dict[str, Source]:
    """Each of `evaluate.splits` and `evaluate.zero_shot`, by that string. Raises DataError, naming the key."""
    opened: dict[str, Source] = {}
    for key, spec in (*(("splits", spec) for spec in evaluate.splits), ("zero_shot", evaluate.zero_shot)):
        if spec and spec not in opened:
            with named_in(f"evaluate.{key}", spec):
                opened[spec] = open_source(spec)
    return opened


def check(c: Config, sources: Mapping[str, Source], reference: Source | None) -> None:
    """Refuses a source without a usable picture, a zero-shot source without labels, and a style for the pixel baseline
    that the reference does not have.

    It reads as far as the first record that has them.

    Args:
      c: configuration.
      sources: of `open_sources`.
      reference: the training source; None: there is no pixel baseline.

    Raises:
      ConfigError: what `suite.run` would refuse.
    """
    spec, style = c.evaluate.zero_shot, c.evaluate.reference_style
    for key, named in (*(("splits", split) for split in c.evaluate.splits), ("zero_shot", spec)):
        if named and not any(map(_can_be_seen, _records(sources[named]))):
            raise ConfigError(none_usable(f"config.evaluate.{key}={named!r}", sources[named]))
    by_likelihood = c.loss.lambda_cap > 0 and c.evaluate.likelihood > 0
    if spec and (c.loss.lambda_con or by_likelihood) and not any(record.label for record in _records(sources[spec])):
        raise ConfigError(f"config.evaluate.zero_shot={spec!r} has no labels: name a labelled source, or none")
    if style and c.loss.lambda_con and c.evaluate.splits and reference is not None and len(reference) <= pixels.LIMIT:
        styles = set()
        for record in _records(reference):
            styles.add(record.style)
            if record.style == style:
                return
        raise ConfigError(pixels.no_such_style(style, reference, styles))


def none_usable(where: str, source: Source) -> str:
    """What is said of a source that there is nothing to measure on."""
    return (
        f"{where}: none of its {len(source)} records can be used; `python -m coca_jax.data.prepare describe` says why"
    )


def _can_be_seen(record: Record) -> bool:
    try:
        images.decode(record.image)
    except BadExample:
        return False
    return True


def _records(source: Source) -> Iterator[Record]:
    """Those that can be read."""
    for row in range(len(source)):
        with contextlib.suppress(BadExample):
            yield source[row]
