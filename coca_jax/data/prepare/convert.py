"""A source of any kind -> ArrayRecord shards with a manifest: plan, process each shard, put the notes together."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import tqdm
from etils import epath

from coca_jax.data import addresses
from coca_jax.data.alone import alone
from coca_jax.data.mixture import Mixture
from coca_jax.data.prepare import beam, files, local, shards
from coca_jax.data.prepare.checking import QUALITY, Dropped
from coca_jax.data.prepare.inputs import check_writable
from coca_jax.data.prepare.plan import LATE, WORK, Plan, make
from coca_jax.data.prepare.shards import DROP, Part
from coca_jax.data.prepare.statistics import Statistics, token_statistics
from coca_jax.data.records import REASONS, DataError
from coca_jax.data.sources.base import one_line
from coca_jax.data.tokenizer import Tokenizer

MANIFEST, DROPPED, TOKENIZER = "manifest.json", "dropped.jsonl", "tokenizer.model"
SETTINGS = "settings.json"  # in the work folder
FORMAT = "coca_jax.data.prepare"
SHARD_SIZE = 512 << 20
_EXAMPLES = 20  # of duplicate keys


def convert(
    source: str,
    out: str | os.PathLike[str],
    *,
    name: str = "",
    records_per_shard: int = 0,
    shard_size: int = SHARD_SIZE,
    max_side: int = 0,
    quality: int = QUALITY,
    shuffle: bool = False,
    seed: int = 0,
    vocab_size: int = 0,
    tokenizer_sample: int = 1_000_000,
    tokenizer: str = "",
    length: int = 64,
    bad: str = DROP,
    max_bad: float = 0.1,
    workers: int = 0,
    runner: str = "",
    beam_args: str = "",
    progress: bool = True,
) -> dict[str, Any]:
    """Converts a source into a folder that training reads as `array_record:FOLDER/*.array_record`.

    Interrupted at any moment, the same call goes on: shards that are finished are kept after a look at their SHA-256,
    and the folder comes out the same to the byte. So it does with any number of workers, and on Beam.

    On a disk the shards appear when all of them are finished; in a bucket, where moving is copying, each when it is,
    and the manifest comes last.

    Args:
      source: see inputs.open_inputs.
      out: folder, on a disk or in a bucket; new, empty, or what an interrupted conversion left.
      name: of the shards; empty: that of the folder.
      records_per_shard: of the source; 0: as many as make about `shard_size`.
      shard_size: bytes, judged by some of the records.
      max_side, quality: see checking.check.
      shuffle, seed: writes the records in another order, which the seed decides; for readers that cannot shuffle.
      vocab_size: trains a SentencePiece vocabulary of so many pieces into tokenizer.model; 0: trains none.
      tokenizer_sample: records, evenly over all, whose captions train it and are counted in tokens.
      tokenizer: of the token statistics where none is trained; empty: that of the source, if it brings one.
      length: tokens that the model will read, for the share of captions that are cut off.
      bad: "drop" leaves records out that cannot be used, "stop" ends at one.
      max_bad: share of records, 0..1; if more cannot be used, it ends.
      workers: cores to use, see local.run; 0: all. They decide nothing about the result.
      runner, beam_args: see beam.run; an empty runner stands for processes of this machine.
      progress: shows a bar.

    Returns:
      The manifest, which also lies in the folder.

    Raises:
      DataError: the source cannot be opened or is damaged, the folder holds something else, or cannot be written.
    """
    addresses.check(out)
    folder = addresses.absolute(out)
    for named in (os.fspath(folder), name, tokenizer):
        check_writable(named)
    plan = make(
        source,
        os.fspath(folder),
        name=name or folder.name,
        records_per_shard=records_per_shard,
        shard_size=shard_size,
        max_side=max_side,
        quality=quality,
        shuffle=shuffle,
        seed=seed,
        vocab_size=vocab_size,
        sample=tokenizer_sample,
        tokenizer=tokenizer,
        length=length,
    )
    _begin(plan)
    try:
        with alone(plan.work / "lock", f"{folder}: another conversion is writing there: wait for it, or stop it"):
            if (manifest := _read_json(folder / MANIFEST)) is None:
                files.sweep(plan.work)
                files.write_json(plan.work / SETTINGS, plan.settings(), plan.work)
                _process(plan, bad, max_bad, workers or os.cpu_count() or 1, runner, beam_args, progress)
                manifest = _finish(plan, max_bad, progress)
            else:
                verify(folder)
            plan.work.rmtree()
    except OSError as error:
        raise DataError(f"{error.filename or folder}: {error.strerror or one_line(error)}") from error
    return manifest


def verify(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a converted folder, whose files are compared with it by size and SHA-256.

    Raises:
      DataError: no manifest, or a file that is missing or differs.
    """
    path = addresses.path(folder)
    manifest = _read_json(path / MANIFEST)
    if manifest is None or manifest.get("format") != FORMAT:
        raise DataError(f"{path}: no converted data set: python -m coca_jax.data.prepare convert --out={path}")
    for name, wanted in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise DataError(f"{file} is missing: copy it again, or convert into another folder")
        if file.stat().length != wanted["bytes"] or files.sha256(file) != wanted["sha256"]:
            raise DataError(f"{file} is not the file that the manifest describes: copy it again, or convert anew")
    return manifest


def _read_json(path: epath.Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {one_line(error)}; remove it and convert again") from error


def _begin(plan: Plan) -> None:
    """Makes the folder, or sees that what lies in it is of the same conversion."""
    folder = addresses.path(plan.out)
    try:
        if folder.exists() and not folder.is_dir():
            raise DataError(f"{folder} is a file: name a folder by --out")
        there = {file.name for file in folder.iterdir()} if folder.exists() else set()
        manifest = _read_json(folder / MANIFEST)
        if manifest is not None and manifest.get("format") != FORMAT:
            raise DataError(f"{folder} holds something else: name an empty folder by --out")
        if manifest is not None:
            _compare(folder, manifest["settings"], plan.settings())
        elif (begun := _read_json(plan.work / SETTINGS)) is not None:
            _compare(folder, begun, {name: value for name, value in plan.settings().items() if name not in LATE})
        elif there - {WORK}:
            raise DataError(f"{folder} holds something else: name an empty folder by --out")
        plan.work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {one_line(error)}; name another --out") from error


def _compare(folder: epath.Path, earlier: dict[str, Any], now: dict[str, Any]) -> None:
    other = [name for name in now if earlier.get(name) != now[name]]
    if other:
        differences = "; ".join(f"{name}: {earlier.get(name)!r} there, {now[name]!r} now" for name in other)
        raise DataError(
            f"{folder} is another conversion's ({differences}): name another --out, or give the same settings"
        )


def _process(plan: Plan, bad: str, max_bad: float, workers: int, runner: str, beam_args: str, progress: bool) -> None:
    if runner:
        print(f"{plan.records} records in {plan.shards} shard(s) on {runner}", file=sys.stderr)
        beam.run(plan, bad, runner, beam_args)
        return
    total = 0

    def dropped(count: int) -> None:
        nonlocal total
        total += count
        if total > max_bad * plan.records:
            raise _too_many(plan, max_bad)

    with tqdm.tqdm(total=plan.records, desc=plan.name, unit=" records", disable=not progress) as bar:
        local.run(plan, bad, workers, bar.update, dropped)


def _too_many(plan: Plan, max_bad: float) -> DataError:
    statistics = Statistics()
    first: Dropped | None = None
    for shard in range(plan.shards):
        if part := shards.read_note(plan, shard):
            statistics.merge(part.statistics)
            first = first or next(iter(part.dropped), None)
    seen = statistics.records + statistics.bad
    reasons = statistics.counts["dropped"]
    tally = ", ".join(f"{reasons[reason]} {reason} ({REASONS[reason]})" for reason in REASONS if reasons[reason])
    example = f"; e.g. {first.message}" if first else ""
    return DataError(
        f"{statistics.bad} of {seen} records cannot be used, of {plan.records} in {plan.source}: more than "
        f"--max_bad={max_bad:g}: {tally}{example}; mend the source, or raise --max_bad and run it again"
    )


# ---------------------------------------------------------------------------------------------------------------------


def _finish(plan: Plan, max_bad: float, progress: bool) -> dict[str, Any]:
    """Puts the notes of all shards together; the manifest comes last."""
    folder = addresses.path(plan.out)
    statistics = Statistics()
    described: dict[str, dict[str, Any]] = {}
    for shard, part in _parts(plan):
        statistics.merge(part.statistics)
        described[plan.path(shard).name] = {"records": part.records, "bytes": part.bytes, "sha256": part.sha256}
    if statistics.bad > max_bad * plan.records:
        raise _too_many(plan, max_bad)
    if not statistics.records:
        raise DataError(f"{plan.source}: none of its {plan.records} records can be used")
    with files.whole(folder / DROPPED, plan.work) as temporary, temporary.open("w", encoding="utf-8") as out:
        for _, part in _parts(plan):
            for dropped in part.dropped:
                out.write(json.dumps(dataclasses.asdict(dropped), ensure_ascii=False) + "\n")
    source = plan.open()
    tokenizer: Tokenizer | None = None
    if plan.vocab_size:
        if progress:
            print(f"training a vocabulary of {plan.vocab_size} pieces", file=sys.stderr)
        tokenizer = Tokenizer.train(_captions(plan), vocab_size=plan.vocab_size)
        files.write(folder / TOKENIZER, tokenizer.to_bytes(), plan.work)
        if progress and tokenizer.vocab_size < plan.vocab_size:
            print(f"the captions fill {tokenizer.vocab_size} pieces of {plan.vocab_size}", file=sys.stderr)
    elif plan.tokenizer or source.tokenizer_path:
        tokenizer = Tokenizer(plan.tokenizer or source.tokenizer_path or "")
    summary = statistics.summary()
    if tokenizer is not None:
        summary["captions"]["tokens"] = token_statistics(_captions(plan), tokenizer, plan.length)
        summary["vocab_size"] = tokenizer.vocab_size
    for extra in (DROPPED, TOKENIZER) if plan.vocab_size else (DROPPED,):
        file = folder / extra
        described[extra] = {"bytes": file.stat().length, "sha256": files.sha256(file)}
    manifest = {
        "format": FORMAT,
        "settings": plan.settings(),
        **summary,
        "duplicate_keys": _duplicates(plan, source, statistics.records),
        "attribution": source.attribution,
        "class_names": dict(source.class_names) if source.class_names else None,
        "files": described,
    }
    for shard in range(plan.shards):
        if plan.staged(shard) != plan.path(shard) and plan.staged(shard).is_file():
            plan.staged(shard).replace(plan.path(shard))
    files.write_json(folder / MANIFEST, manifest, plan.work, indent=2)
    return manifest


def _parts(plan: Plan) -> Iterator[tuple[int, Part]]:
    for shard in range(plan.shards):
        part = shards.read_note(plan, shard)
        if part is None:
            raise DataError(f"{plan.path(shard)} was not finished: run the same command again")
        yield shard, part


def _captions(plan: Plan) -> Iterator[str]:
    for _, part in _parts(plan):
        yield from part.captions


def _duplicates(plan: Plan, source: Mixture, records: int) -> dict[str, Any]:
    """How many records have the key of one before them, and some of those keys. It takes 8 bytes a record."""
    keys = np.empty(records, np.uint64)
    filled = 0
    for _, part in _parts(plan):
        keys[filled : filled + part.records] = part.keys
        filled += part.records
    keys.sort()
    again = keys[1:][keys[1:] == keys[:-1]]
    number = len(again)
    again = np.unique(again)
    examples: set[str] = set()
    for _, part in _parts(plan) if number else ():
        for index in part.indices[np.isin(part.keys, again)][: _EXAMPLES - len(examples)].tolist():
            examples.add(source[index].key)
        if len(examples) >= _EXAMPLES:
            break
    return {"number": number, "examples": sorted(examples)}
