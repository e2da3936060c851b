"""Many pictures through a model, for scripts: found, decoded ahead, computed in batches, written so that it can go on.

`coca_jax.caption` and `coca_jax.embed` are this with another function in the middle.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from absl import logging
from etils import epath
from tqdm import tqdm

from coca_jax.data import addresses, side_files
from coca_jax.data.alone import alone
from coca_jax.data.images import Preprocessor
from coca_jax.data.records import DataError
from coca_jax.data.sources.base import IMAGE_EXTENSIONS, READ_EXTENSIONS

SUFFIXES = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
STOPPED = "stopped: the same command goes on from here"
_AHEAD = 4  # batches that are decoded before they are asked for


def find(arguments: Sequence[str]) -> list[str]:
    """Paths of pictures: files as they are named, and of folders all that look like pictures, sorted, at any depth.

    Raises:
      DataError: an argument is neither, or a folder holds no picture.
    """
    found: list[str] = []
    for argument in arguments:
        addresses.check(argument)
        path = addresses.path(argument)
        if path.is_dir():
            inside = sorted(os.fspath(p) for p in _walk(path) if p.suffix.lower() in SUFFIXES)
            if not inside:
                raise DataError(f"{argument}: no picture in it, no file that ends in .{', .'.join(READ_EXTENSIONS)}")
            found += inside
        elif path.exists():
            found.append(argument)
        else:
            raise DataError(f"{argument}: no such file or folder")
    return list(dict.fromkeys(found))


def _walk(folder: epath.Path) -> Iterator[epath.Path]:
    folders = [folder]
    while folders:  # not by calls of itself: folders may lie in one another a thousand deep
        within = folders.pop()
        try:
            for path in within.iterdir():
                if not path.is_dir():
                    yield path
                elif not os.path.islink(path):  # which may lead back to where it is
                    folders.append(path)
        except OSError as error:
            if within == folder:
                raise DataError(f"{folder} cannot be listed: {error}") from error
            logging.warning("%s is passed over: %s", os.fspath(within)[:500], error.strerror)


class Rows(Protocol):
    """A file of results that grows. Rows are flat dictionaries; a key of theirs says what they are of."""

    def done(self) -> set[str]:
        """The keys' values in what it holds already. What a killed process left half-written is taken away."""
        ...

    def features(self) -> tuple[list[str], np.ndarray]:
        """The keys' values, and the rows' features, float32 `[n, d]`: what `embed` wrote.

        Raises:
          DataError: nothing is there, or something else.
        """
        ...

    def add(self, rows: list[dict[str, Any]]) -> None: ...


class Lines:
    """JSON lines. A line that a killed process left half-written is taken away.

    Args:
      path: of the file.
      key: see `Rows`.
      side: beside the results: what cannot be read of it is set aside, and not an error.
    """

    def __init__(self, path: pathlib.Path, key: str = "path", *, side: bool = False):
        self._path, self._key, self._side = path, key, side

    def done(self) -> set[str]:
        return {row[self._key] for row in self._rows(self._key)}

    def features(self) -> tuple[list[str], np.ndarray]:
        rows = self._rows(self._key, "feature")
        return [row[self._key] for row in rows], _matrix(self._path, [row["feature"] for row in rows])

    def _rows(self, *wanted: str) -> list[dict[str, Any]]:
        def take(row: dict[str, Any]) -> dict[str, Any] | None:
            return {name: row[name] for name in wanted} if all(name in row for name in wanted) else None

        path = addresses.path(self._path)
        if self._side:
            return side_files.take_lines(path, take)
        lines = side_files.read_lines(path, take)
        if lines.bad:
            raise DataError(
                f"{path}: {lines.bad} lines are not what was written here, the first is line {lines.first_bad}: remove "
                "them to have them computed again, or name another --output"
            )
        if not lines.ended:
            os.truncate(path, lines.size)
        return lines.objects

    def add(self, rows: list[dict[str, Any]]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(map(side_files.as_line, rows)))


class Parts:
    """A folder of Parquet files, `part-00000.parquet` and on, as pandas, pyarrow and Spark read it in one."""

    def __init__(self, folder: pathlib.Path, key: str = "path"):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise DataError(
                f'--output={folder}: pyarrow is not installed, which writes it: pip install "coca_jax[parquet]"'
            ) from error
        self._arrow, self._folder, self._key = pyarrow, folder, key
        if folder.exists() and not folder.is_dir():
            raise DataError(f"{folder} is a file: Parquet is written as a folder of parts; name another --output")
        parts = list(folder.glob("part-*.parquet"))
        if other := next((part for part in parts if not re.fullmatch(r"part-[0-9]+\.parquet", part.name)), None):
            raise DataError(f"{other} was not written here: name another --output")
        self._next = 1 + max((int(part.stem.removeprefix("part-")) for part in parts), default=-1)

    def done(self) -> set[str]:
        for left in self._folder.glob("*.partial"):
            left.unlink()
        return {value for table in self._tables(self._key) for value in table[self._key].to_pylist()}

    def features(self) -> tuple[list[str], np.ndarray]:
        names: list[str] = []
        parts: list[np.ndarray] = []
        for table in self._tables(self._key, "feature"):
            names += table[self._key].to_pylist()
            parts += [_matrix(self._folder, chunk.to_numpy(zero_copy_only=False)) for chunk in table["feature"].chunks]
        if len({part.shape[1] for part in parts}) != 1:
            raise DataError(f"{self._folder} has no features, or of several lengths: it is not what embed writes")
        return names, np.concatenate(parts)

    def _tables(self, *columns: str) -> Iterator[Any]:
        for file in sorted(self._folder.glob("part-*.parquet")):
            if not file.is_file():
                raise DataError(f"{file} is not a file: remove it, or name another --output")
            try:
                table = self._arrow.parquet.read_table(file, columns=list(columns)).select(list(columns))
            except (OSError, KeyError, self._arrow.ArrowException) as error:
                raise DataError(
                    f"{file} is damaged, or not what was written here ({' '.join(str(error).split())[:200]}): remove "
                    "it to compute it again, or name another --output"
                ) from error
            yield table

    def add(self, rows: list[dict[str, Any]]) -> None:
        if not rows:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        file = self._folder / f"part-{self._next:05}.parquet"
        partial = file.with_suffix(".partial")
        arrays = {name: self._array(values) for name, values in columns.items()}
        self._arrow.parquet.write_table(self._arrow.table(arrays), partial)
        partial.replace(file)
        self._next += 1

    def _array(self, values: list[Any]) -> Any:
        if isinstance(values[0], np.ndarray):
            flat = self._arrow.array(np.concatenate(values).astype(np.float32))
            return self._arrow.FixedSizeListArray.from_arrays(flat, len(values[0]))
        return self._arrow.array(values)


def _matrix(path: pathlib.Path, rows: Sequence[Any]) -> np.ndarray:
    """float32 `[n, d]` of n lists of d numbers. Raises DataError where they are not that."""
    try:
        matrix = np.array([np.asarray(row, np.float32) for row in rows], np.float32)
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} has features that are not lists of numbers, all of a length: {error}") from error
    if matrix.ndim != 2 or not np.isfinite(matrix).all():
        raise DataError(f"{path} has no features, or such as are not finite numbers: it is not what embed writes")
    return matrix


def open_rows(output: str, key: str = "path") -> Rows:
    """The file or folder of results, by its ending. Raises DataError for another ending."""
    if output.endswith(".jsonl"):
        return Lines(pathlib.Path(output), key)
    if output.endswith(".parquet"):
        return Parts(pathlib.Path(output), key)
    raise DataError(f"--output={output} must end in .jsonl or .parquet")


def keep_settings(output: str, settings: dict[str, Any]) -> None:
    """Writes what the results depend on beside them; where they are begun already, it must be the same.

    Args:
      output: of `open_rows`.
      settings: flags by name, and `model`, the digest of what --checkpoint held.

    Raises:
      DataError: naming the first setting that differs.
    """
    path = addresses.path(output + ".settings.json")
    settings = json.loads(json.dumps(settings))
    if side_files.is_there(path) and pathlib.Path(output).exists():
        try:
            before = dict(side_files.read_json(path) or {})
        except (ValueError, TypeError) as error:  # Unreadable is a ValueError
            raise DataError(
                f"{path} is damaged ({error}): remove it if {output} was begun with these settings, or name another "
                "--output"
            ) from error
        before.setdefault("model", settings.get("model"))  # of versions that did not keep it
        for key in settings:
            if key == "model" and before[key] != settings[key]:
                raise DataError(
                    f"{output} was begun with another model than --checkpoint={settings.get('checkpoint')} is now: "
                    f"remove {output}, or name another --output"
                )
            if before.get(key) != settings[key]:
                raise DataError(
                    f"{output} was begun with --{key}={before.get(key)!r}, not {settings[key]!r}: put it back, or name "
                    "another --output"
                )
    path.parent.mkdir(parents=True, exist_ok=True)
    side_files.write_text(path, json.dumps(settings, indent=2) + "\n")


@contextlib.contextmanager
def begun(output: str, checkpoint: str, coca: Encoder, **settings: Any) -> Iterator[None]:
    """Around all that is done with an output, `open_rows` of what is written included: one process at a time.

    Args:
      output: of `open_rows`.
      checkpoint: what the model was loaded from.
      coca: the model.
      **settings: flags by name; they, the checkpoint and the model are kept, see `keep_settings`.

    Raises:
      DataError: another process is at work there, or it was begun with other settings.
    """
    pathlib.Path(output).parent.mkdir(parents=True, exist_ok=True)
    with alone(f"{output}.lock", f"{output}: another process is writing there: wait for it, or name another --output"):
        model = {"checkpoint": checkpoint, "step": coca.step, "model": coca.digest()}
        keep_settings(output, model | settings)
        yield


class Encoder(Protocol):
    """What is needed of a model here, as `coca_jax.load` opens it."""

    preprocessor: Preprocessor
    step: int

    def digest(self) -> str: ...

    def encode_pixels(self, pixels: np.ndarray, *, batch_size: int) -> np.ndarray: ...

    def encode_text(self, texts: Sequence[str], *, batch_size: int) -> np.ndarray: ...


def embed(paths: Sequence[str], coca: Encoder, output: str, *, batch_size: int) -> str:
    """`run` with the features of the pictures, `[n, d]` of unit length, in the column `feature`."""

    def compute(pixels: np.ndarray, _: list[int]) -> list[dict[str, Any]]:
        return as_rows(coca.encode_pixels(pixels, batch_size=batch_size), output)

    return run(paths, coca.preprocessor, compute, output, batch_size=batch_size, description="features")


def embed_texts(texts: Sequence[str], coca: Encoder, output: str, *, batch_size: int) -> str:
    """The same of texts, all different, in the columns `text` and `feature`: what is not there yet."""
    rows = open_rows(output, "text")
    known = rows.done()
    new = [text for text in texts if text not in known]
    done = len(texts) - len(new)
    with tqdm(total=len(texts), initial=done, desc="features", unit="text", disable=None) as bar:
        for start in range(0, len(new), batch_size):
            part = new[start : start + batch_size]
            kept = as_rows(coca.encode_text(part, batch_size=batch_size), output)
            rows.add([{"text": text} | row for text, row in zip(part, kept, strict=True)])
            bar.update(len(part))
    return f"{len(new)} texts{f', {done} were there already' if done else ''}: {output}"


def as_rows(features: np.ndarray, output: str) -> list[dict[str, Any]]:
    """Features `[n, d]` as the output's kind writes them."""
    return [{"feature": x if output.endswith(".parquet") else x.tolist()} for x in features]


def run(
    paths: Sequence[str],
    preprocessor: Preprocessor,
    compute: Callable[[np.ndarray, list[int]], Iterable[dict[str, Any]]],
    output: str,
    *,
    batch_size: int,
    description: str,
) -> str:
    """Computes what is not there yet. Pictures that cannot be read go into OUTPUT.bad.jsonl, with the reason.

    Those are not tried again while they stand there.

    Args:
      paths: of pictures.
      preprocessor: of the model.
      compute: uint8 pictures `[b, s, s, 3]` and their numbers among all -> a row for each, without `path`.
      output: ends in .jsonl or .parquet.
      batch_size: pictures that are computed at a time.
      description: of the progress bar.

    Returns:
      A line that says what was done.
    """
    rows, bad = open_rows(output), Lines(pathlib.Path(output + ".bad.jsonl"), side=True)
    done, unreadable = rows.done(), bad.done()
    numbers = [at for at, path in enumerate(paths) if path not in done and path not in unreadable]
    there = sum(path in done for path in paths)
    made, failed = 0, len(paths) - there - len(numbers)  # what an earlier run could not read is not there either

    def read(at: int) -> np.ndarray | DataError:
        try:
            paths[at].encode()
            pixels: np.ndarray = preprocessor.pixels([paths[at]])[0]
            return pixels
        except UnicodeEncodeError:
            return DataError(f"{paths[at]!r}: the name is not UTF-8: rename the file")
        except (DataError, OSError) as error:
            return error if isinstance(error, DataError) else DataError(f"{paths[at]}: {error}")

    with (
        tqdm(
            total=len(paths), initial=len(paths) - len(numbers), desc=description, unit="picture", disable=None
        ) as bar,
        concurrent.futures.ThreadPoolExecutor(min(32, 2 * (os.cpu_count() or 1))) as pool,
    ):
        # Batches stay in order and whole, so that a run in pieces computes what a run in one does.
        batches = [numbers[start : start + batch_size] for start in range(0, len(numbers), batch_size)]
        ahead = iter(batches)
        waiting = [[pool.submit(read, at) for at in batch] for batch in itertools.islice(ahead, _AHEAD)]
        for batch in batches:
            found = [future.result() for future in waiting.pop(0)]
            waiting += [[pool.submit(read, at) for at in more] for more in itertools.islice(ahead, 1)]
            good = [(at, x) for at, x in zip(batch, found, strict=True) if isinstance(x, np.ndarray)]
            if good:
                results = compute(np.stack([x for _, x in good]), [at for at, _ in good])
                rows.add([{"path": paths[at]} | row for (at, _), row in zip(good, results, strict=True)])
                made += len(good)
            if len(good) < len(batch):
                pairs = zip(batch, found, strict=True)
                bad.add([{"path": paths[at], "error": str(x)} for at, x in pairs if isinstance(x, DataError)])
                failed += len(batch) - len(good)
            bar.update(len(batch))
    skipped = f", {there} were there already" if there else ""
    unread = f"; {failed} could not be read, see {output}.bad.jsonl" if failed else ""
    return f"{made} pictures{skipped}{unread}: {output}"
