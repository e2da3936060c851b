"""What a run has read when a checkpoint was saved, as digests in it, compared when the run goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from absl import logging
from etils import epath

from coca_jax.config import ConfigError
from coca_jax.data import addresses, classes, side_files
from coca_jax.data.records import DataError
from coca_jax.data.sources import Source, content
from coca_jax.data.sources.base import digest
from coca_jax.data.tokenizer import Tokenizer
from coca_jax.distributed import is_first
from coca_jax.train.checkpoint import TOKENIZER_FILE, CheckpointError

KEY = "contents"  # in a checkpoint's place in the data
ACCEPT = "--config.data.accept_changes=True"
_NAMED = 3  # changes that a message names

Contents = dict[str, Any]


def of_run(
    tokenizer: Tokenizer, labels: tuple[str, ...], train: Iterable[Source], held_out: Iterable[Source]
) -> Contents:
    """Digests of all that decides what the model sees, in plain values.

    Raises:
      DataError: a file of a source cannot be read.
    """
    return {
        "tokenizer": of_tokenizer(tokenizer),
        "classes": of_labels(labels),
        "train": {source.name: content.of_source(source) for source in train},
        "evaluate": {source.name: content.of_source(source) for source in held_out},
    }


def in_short(of_run: Contents) -> dict[str, str]:
    """One digest for the tokenizer, the classes and each source, by their names."""
    sources = {spec: found for key in ("train", "evaluate") for spec, found in of_run[key].items()}
    return {"the tokenizer": of_run["tokenizer"], "the classes": of_run["classes"]} | {
        spec: digest(sorted(found.items())) for spec, found in sources.items()
    }


def of_tokenizer(tokenizer: Tokenizer) -> str:
    return hashlib.sha256(tokenizer.to_bytes()).hexdigest()[:16]


def of_labels(labels: tuple[str, ...]) -> str:
    return hashlib.sha256("\n".join(labels).encode(errors="surrogateescape")).hexdigest()[:16] if labels else ""


def check(place: Mapping[str, Any], now: Contents, *, accept: bool) -> None:
    """Refuses training data that are not what the run has read so far; other evaluation data are reported.

    Args:
      place: of `saved_place`; what it does not say, as of an earlier version, is not compared.
      now: of `of_run`.
      accept: report what has changed, and go on.

    Raises:
      ConfigError: naming the source, what of it has changed, and the ways out.
    """
    before = _dict(place.get(KEY))
    for key, words in (("evaluate", "measured"), ("train", "trained")):
        for spec, contents in now[key].items():
            changes = _changes(_dict(_dict(before.get(key)).get(spec)), contents)
            if not changes:
                continue
            more = f", and {len(changes) - _NAMED} more" if len(changes) > _NAMED else ""
            said = f"config.data.train: {spec}" if key == "train" else f"config.evaluate: {spec}"
            said += f" is not what this run has {words} on so far: {'; '.join(changes[:_NAMED])}{more}"
            if key == "train" and not accept:
                raise ConfigError(
                    f"{said}: put it back as it was, start in another --workdir, or go on with the data as they are "
                    f"now by {ACCEPT}"
                )
            if is_first():
                logging.warning("%s; the run goes on with it as it is now", said)


def _changes(before: Mapping[str, Any], now: Mapping[str, str]) -> list[str]:
    if not before:
        return []
    return [
        f"{name} (digest {before.get(name, 'none')}, now {now.get(name, 'none')})"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


# ---------------------------------------------------------------------------------------------------------------------
# What a workdir keeps of its own: the vocabulary, the classes


def own_tokenizer(
    workdir: epath.Path, given: Tokenizer, name: str, place: Mapping[str, Any], *, accept: bool
) -> Tokenizer:
    """The vocabulary that a run goes on with: that of its workdir is never replaced by another one.

    Args:
      workdir: of the run.
      given: the one that the configuration names.
      name: what names it, for messages.
      place: of `saved_place`.
      accept: go on with the workdir's where the given one is another.

    Raises:
      ConfigError: the given one is another, or the workdir's is damaged and the given one is not what it was.
    """
    path, wanted, new = workdir / TOKENIZER_FILE, _saved(place, "tokenizer"), of_tokenizer(given)
    own, problem = None, f"{path} is missing"
    if side_files.is_there(path):
        try:
            own = Tokenizer(path)
        except (DataError, OSError) as error:
            problem = f"{path} is damaged ({' '.join(str(error).split())})"
    old = of_tokenizer(own) if own else ""
    if new == (wanted or old):
        return given  # where the workdir's is damaged, it is set aside and written anew
    if own is None or old != (wanted or old):
        if wanted or (place and side_files.is_there(path)):
            problem = problem if own is None else f"{path} is not the vocabulary that the run was trained with"
            raise ConfigError(
                f"{problem}, and {name} is another (digest {new}, the run's {wanted or 'not known'}): put a "
                "copy of the run's there, or start in another --workdir"
            )
        return given
    if not accept:
        raise ConfigError(
            f"{name} is another vocabulary (digest {new}) than {path} (digest {old}), with which this run began: put "
            f"it back (cp {path} there), start in another --workdir, or go on with the workdir's by {ACCEPT}"
        )
    if is_first():
        logging.warning("%s is another vocabulary than %s: the run goes on with the latter", name, path)
    return own


def own_labels(
    workdir: epath.Path,
    named: str,
    found: Callable[[], tuple[str, ...]],
    place: Mapping[str, Any],
    *,
    accept: bool,
) -> tuple[str, ...]:
    """The classes that a run goes on with, by the rules of `own_tokenizer`.

    Args:
      workdir: of the run.
      named: file of them in the configuration; empty: the training source has them.
      found: gives the source's.
      place, accept: as of `own_tokenizer`.

    Raises:
      ConfigError: as `own_tokenizer`.
      DataError: there are none, or their file cannot be read.
    """
    path, wanted = workdir / classes.FILE, _saved(place, "classes")
    own: tuple[str, ...] = ()
    problem = f"{path} is missing"
    if side_files.is_there(path):
        try:
            own, problem = classes.read(path), f"{path} has other classes than the run was trained with"
        except (DataError, OSError) as error:
            problem = f"{path} is damaged ({' '.join(str(error).split())})"
    if own and wanted in ("", of_labels(own)):
        if named and addresses.path(named).is_file() and (given := classes.read(named)) != own:
            said = f"config.data.classes={named!r} has other classes ({len(given)}) than {path} ({len(own)})"
            if not accept:
                raise ConfigError(
                    f"{said}, with which this run began: put it back (cp {path} there), start in another --workdir, or "
                    f"go on with the workdir's by {ACCEPT}"
                )
            if is_first():
                logging.warning("%s: the run goes on with the latter", said)
        return own
    given = classes.read(named) if named else found()
    if wanted and of_labels(given) != wanted:
        raise ConfigError(f"{problem}: put a copy of the run's there, or start in another --workdir")
    if not wanted and place and side_files.is_there(path):
        raise ConfigError(f"{problem}: put a copy there, or remove it where the classes are what they were")
    return given


def check_own(place: Mapping[str, Any], tokenizer: Tokenizer, labels: tuple[str, ...], workdir: epath.Path) -> None:
    """Raises CheckpointError where a workdir's files are not those that the checkpoint of `place` was trained with."""
    found = {"tokenizer": (TOKENIZER_FILE, of_tokenizer(tokenizer)), "classes": (classes.FILE, of_labels(labels))}
    for key, (name, now) in found.items():
        if (wanted := _saved(place, key)) and now != wanted:
            raise CheckpointError(
                f"{workdir / name} is not what the checkpoint was trained with (digest {wanted}, now {now}): put "
                "a copy of the run's there"
            )


def keep(path: epath.Path, content: bytes) -> None:
    """Writes a file that a workdir keeps, where it is not there as it should be; what is there is set aside.

    Raises:
      OSError: it cannot be written.
    """
    try:
        before = side_files.read(path)
    except side_files.Unreadable:
        before = None
    if before != content:
        aside = f"{path} is not what this run began with"
        side_files.write_whole(path, lambda partial: partial.write_bytes(content), aside=aside)


def _saved(place: Mapping[str, Any], name: str) -> str:
    return str(_dict(place.get(KEY)).get(name) or "")
