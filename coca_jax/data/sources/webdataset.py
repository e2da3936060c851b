"""WebDataset's tar shards (img2dataset writes such), read at any place."""

from __future__ import annotations

import concurrent.futures
import functools
import json
import multiprocessing
import os
import random
import threading
from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np
import tqdm
from absl import logging

from coca_jax import parent
from coca_jax.data.records import BadExample, DataError, Record
from coca_jax.data.sources import content, files, tar_index, tar_samples, tar_walk
from coca_jax.data.sources.base import CAPTION_NAMES, MAX_BYTES, Spec, digest, one_line, texts
from coca_jax.data.sources.files import File
from coca_jax.data.sources.tar_index import Shard
from coca_jax.data.sources.tar_samples import CLASS, IMAGE, JSON, TEXT

# Fewer shards than this are indexed by threads: processes take seconds to start.
_PROCESSES_FROM = 128
# Members of a sample are read at once where no more than this many bytes lie between them.
_GAP = 64 << 10
_WHAT = {IMAGE: "picture", TEXT: "txt", JSON: "json", CLASS: "cls"}


class WebDataset:
    """Samples of tar shards: files whose names are alike up to the first dot; see tar_samples for what else is one.

    An image (of base.IMAGE_EXTENSIONS), and its caption in a `txt`, or in fields of a `json`; a label in a `cls`
    or in a field of the `json`. Other files are passed over, folders and links too. Nothing is unpacked.

    A random sample costs a read of 64 bytes of the shard's index and one of the sample; in a bucket one request.

    Args:
      spec: its options are `caption` (fields of the json, separated by commas) and `label` (`cls`, or a field).
      found: the shards, in order.

    Attributes:
      remarks: lines on images that are not read, and on samples that were put together.

    Raises:
      DataError: a shard cannot be read, is no tar file, or is packed.
    """

    tokenizer_path = None
    attribution = ""
    class_names: Mapping[str, Sequence[str]] | None = None

    def __init__(self, spec: Spec, found: Sequence[File]):
        self.name = spec.text
        self._captions, self._label = spec.fields("caption"), spec.get("label") or "cls"
        self._shards, self._names = _indexed(found), files.short_names(found)
        self._ends = np.cumsum([shard.count for shard in self._shards], dtype=np.int64)
        self._lock, self._seen = threading.Lock(), set[int]()
        for shard in self._shards:
            if shard.problem:
                logging.warning(
                    "%s is damaged: %s; %d samples before are whole. Download it again.",
                    *(shard.file.path, shard.problem, shard.whole),
                )
        self.remarks = tar_samples.remarks(shard.counts for shard in self._shards)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: SupportsIndex) -> Record:
        number = range(len(self))[index.__index__()]
        place = int(np.searchsorted(self._ends, number, side="right"))
        shard = self._shards[place]
        sample = number - (int(self._ends[place]) - shard.count)
        row = tar_index.row(shard, sample)
        where = f"{shard.file.path}: sample {sample}"
        state = row["header"].tolist()
        has_text = state[TEXT] != tar_samples.ABSENT or state[JSON] <= tar_samples.LARGE
        wanted = [IMAGE, TEXT if has_text and not self._captions else JSON, CLASS if self._label == "cls" else JSON]
        self._check(where, state, wanted)
        key, contents = self._contents(
            place, shard, row, [w for w in dict.fromkeys(wanted) if state[w] > tar_samples.LARGE]
        )
        where += f" ({key})"
        fields = _fields(contents[JSON], where) if JSON in contents else {}
        captions: tuple[str, ...]
        if self._captions:
            captions = tuple(text for field in self._captions for text in texts(fields.get(field)))
        elif TEXT in wanted:
            captions = texts(_decoded(contents.get(TEXT, b""), where).strip())  # editors end files with a line's end
        else:
            captions = next((found for name in CAPTION_NAMES if (found := texts(fields.get(name)))), ())
        if self._label == "cls":
            label = _decoded(contents.get(CLASS, b""), where).strip()
        else:
            value = fields.get(self._label)
            label = str(value).strip() if isinstance(value, str | int) else ""
        if not captions and not label:
            has = ", ".join(_WHAT[which] for which in range(4) if state[which] > tar_samples.LARGE)
            fix = "name fields of the json by ?caption=" if JSON in contents or state[JSON] else "a KEY.txt holds it"
            raise BadExample("no_caption", f"{where} has no caption: it has {has}; {fix}")
        return Record(f"{self._names[place]}:{key}", contents[IMAGE], captions, label)

    def __repr__(self) -> str:
        return f"WebDataset({self.name})"

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ("_lock", "_seen")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock, self._seen = threading.Lock(), set()

    def fingerprint(self) -> str:
        """16 hexadecimal digits of the shards' names, sizes and counts, and of what is read of them."""
        shards = (f"{shard.file.name} {shard.file.size} {shard.count}" for shard in self._shards)
        return digest(["webdataset", self._captions, self._label, *shards])

    def contents(self) -> dict[str, str]:
        """See Source."""
        return {content.LIST: self.fingerprint()} | content.of_files([shard.file for shard in self._shards])

    def _check(self, where: str, state: Sequence[int], wanted: Sequence[int]) -> None:
        for which in wanted:
            what = _WHAT[which]
            if state[which] == tar_samples.CUT:
                raise BadExample("truncated", f"{where}: the shard ends before the end of its {what}")
            if state[which] == tar_samples.LARGE:
                raise BadExample("unreadable", f"{where}: its {what} has more than {MAX_BYTES} bytes")
            if state[which] == tar_samples.ABSENT and which == IMAGE:
                raise BadExample("empty", f"{where} has no picture")

    def _contents(
        self, place: int, shard: Shard, row: np.ndarray, wanted: Sequence[int]
    ) -> tuple[str, dict[int, bytes]]:
        """Key of the sample, and the bytes of those members of it."""
        spans = []
        for which in wanted:
            offset, header, size = (int(row[field][which]) for field in ("offset", "header", "size"))
            spans.append((offset - header, offset + size))
        first, last = min(start for start, _ in spans), max(end for _, end in spans)
        changed = DataError(files.overwritten(shard.file.path))
        if any(start < 0 or not 0 <= end - start <= 2 * MAX_BYTES for start, end in spans):  # of a damaged index
            raise changed
        if last - first <= sum(end - start for start, end in spans) + _GAP:
            whole = self._bytes(place, shard, first, last)
            parts = [whole[start - first : end - first] for start, end in spans]
        else:
            parts = [self._bytes(place, shard, start, end) for start, end in spans]
        names, contents = {}, {}
        for which, part, (start, end) in zip(wanted, parts, spans, strict=True):
            header = int(row["header"][which])
            try:
                name, size = tar_walk.name_in(part[:header])
            except tar_walk.DamagedTar:
                raise changed from None
            if len(part) != end - start or size != len(part) - header:
                raise changed
            names[which] = name
            contents[which] = part[header:]
        if not (key := tar_samples.key_of(names)):
            raise changed
        return key.encode(errors="surrogateescape").decode(errors="replace"), contents

    def _bytes(self, place: int, shard: Shard, start: int, end: int) -> bytes:
        file = shard.file
        try:
            if not files.is_remote(file.path):
                return files.HANDLES.read(file.path, start, end - start, (file.size, file.version))
            with self._lock:
                seen = place in self._seen
            if not seen:  # once in each process: to ask at each read would double the requests
                if files.look(file.path) != file:
                    raise DataError(files.overwritten(file.path))
                with self._lock:
                    self._seen.add(place)
            system, inside = files.store(file.path)
            return system.cat_file(inside, start=start, end=end)
        except DataError:
            raise
        except Exception as error:  # whatever a store's library raises
            raise DataError(f"{file.path} cannot be read any more: {one_line(error)}; start the run again") from error


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadExample("encoding", f"{where}: its text is not UTF-8: {one_line(error)}") from None


def _fields(content: bytes, where: str) -> dict[str, Any]:
    text = _decoded(content, where)
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadExample("unreadable", f"{where}: its json cannot be read: {one_line(error)}") from None
    return fields if isinstance(fields, dict) else {}


def _indexed(found: Sequence[File]) -> list[Shard]:
    """The shards with their indices; those that have none are indexed, in parallel."""
    shards = dict(zip(found, files.each(tar_index.find, found, "looking at shards", "shards"), strict=True))
    missing = [file for file, shard in shards.items() if shard is None]
    # Each process in an order of its own: hosts that share a disk share the work, since each finds what others made.
    random.Random(f"{os.uname().nodename} {os.getpid()}").shuffle(missing)
    if missing:
        count = os.cpu_count() or 1
        pool: concurrent.futures.Executor
        if count > 1 and len(missing) >= _PROCESSES_FROM:
            context = multiprocessing.get_context("spawn")
            pool = concurrent.futures.ProcessPoolExecutor(min(count, len(missing) // 16), context, parent.follow)
        else:
            pool = concurrent.futures.ThreadPoolExecutor(min(32, 4 * count))
        with pool:
            made = pool.map(tar_index.build, missing, **({"chunksize": 4} if count > 1 else {}))
            bar = functools.partial(tqdm.tqdm, desc="indexing shards", total=len(missing), unit=" shards", leave=False)
            shards |= dict(zip(missing, bar(made, disable=len(missing) < 8), strict=True))
    return [shard for shard in shards.values() if shard is not None]


def open_webdataset(spec: Spec) -> WebDataset:
    """See `open_source`."""
    spec.check(("caption", "label", "template", "templates", "classes"), ("template",))
    found = files.expand(spec.location, spec.text, skip=lambda name: name.endswith(tar_index.SUFFIX))
    return WebDataset(spec, found)
