"""The reader processes of `data.workers`: each shows what it does, ends with the run, and is named where it fails.

A reader that is stopped, that hangs, or that the system has killed cannot say so itself. Each therefore keeps a page of
a shared file up to date: its process, the batches it has made, the record it is at.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import multiprocessing
import os
import pathlib
import re
import signal
import struct
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

import grain
from absl import flags, logging

from coca_jax import config, parent
from coca_jax.data.records import DataError

_PAGE = struct.Struct("qqdd400s")  # process, batches, time of its last act, since when it reads, what it reads
_START = 120.0  # seconds that a reader has for its first batch, at least: it imports and opens
_STATES = {"T": "stopped", "t": "held by a debugger", "D": "waiting for a disk or the network", "Z": "ended"}
_STATES |= {"S": "waiting", "R": "running"}


class ReaderLost(DataError):
    """A reader process was killed, crashed or hangs: nothing is wrong with the data, and a new start goes on."""


class _Page:
    """A reader's side of the shared file. Several of its threads read records at a time."""

    def __init__(self, path: str, number: int) -> None:
        with open(path, "r+b") as file:
            self._memory, self._at = mmap.mmap(file.fileno(), 0), number * _PAGE.size
        self._lock, self._batches, self._reading = threading.Lock(), 0, dict[int, tuple[float, str]]()
        self.write()

    def write(self, batches: int = 0, begun: str = "", done: bool = False) -> None:
        with self._lock:
            now, thread = time.monotonic(), threading.get_ident()
            self._batches += batches
            if begun:
                self._reading[thread] = now, begun
            if done:
                self._reading.pop(thread, None)
            since, what = min(self._reading.values(), default=(0.0, ""))
            _PAGE.pack_into(self._memory, self._at, os.getpid(), self._batches, now, since, what.encode()[:400])


_page: _Page | None = None  # of this process, where it is a reader


def _begin(path: str, number: int, _: int) -> None:
    """A reader starts."""
    global _page

    def end() -> None:
        pathlib.Path(path).unlink(missing_ok=True)
        os._exit(1)

    parent.follow(end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the first one acts
    _page = _Page(path, number)


@contextlib.contextmanager
def reading(name: str, index: int) -> Iterator[None]:
    """Around the reading of a record, so that a reader that hangs in it can be told what it reads."""
    if _page is None:
        yield
        return
    _page.write(begun=f"{name}: record {index}")
    try:
        yield
    finally:
        _page.write(done=True)


def _count(batch: Any) -> Any:
    if _page is not None:
        _page.write(batches=1)
    return batch


def in_processes(loader: grain.IterDataset, data: config.Data) -> grain.IterDataset:
    """The same batches, made by `data.workers` processes.

    Raises, from its iterators:
      ReaderLost: a reader has ended, or has answered nothing for `data.worker_timeout` seconds.
      DataError: what else is wrong in a reader, in a line; its traceback is logged at -v=1.
    """
    return _Watched(loader, data)


class _Watched(grain.IterDataset):
    def __init__(self, loader: grain.IterDataset, data: config.Data) -> None:
        super().__init__(loader)
        self._loader, self._data = loader, data

    def __iter__(self) -> grain.DatasetIterator:
        return _WatchedIterator(self._loader, self._data)


class _WatchedIterator(grain.DatasetIterator):
    def __init__(self, loader: grain.IterDataset, data: config.Data) -> None:
        self._count, self._timeout = data.workers, data.worker_timeout
        with tempfile.NamedTemporaryFile(prefix="coca_jax_readers_", delete=False) as file:
            file.write(bytes(self._count * _PAGE.size))
            file.flush()
            self._memory, self._path = mmap.mmap(file.fileno(), 0), file.name
        if not flags.FLAGS.is_parsed():  # Grain reads its flags when it starts workers, also where no absl.app runs
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=data.workers, per_worker_buffer_size=2)
        begin = functools.partial(_begin, self._path)
        self._batches = iter(loader.map(_count).mp_prefetch(options, worker_init_fn=begin))
        super().__init__(self._batches)
        self._waiting_since, self._verdict = 0.0, ""
        self._ended = threading.Event()
        if self._timeout:
            threading.Thread(target=self._watch, name="watch readers", daemon=True).start()

    def __next__(self) -> Any:
        self._waiting_since = time.monotonic()
        try:
            return next(self._batches)
        except (StopIteration, ReaderLost):
            raise
        except Exception as error:
            raise self._told(error) from error
        finally:
            self._waiting_since = 0.0

    def get_state(self) -> Any:
        return self._batches.get_state()

    def set_state(self, state: Any) -> None:
        self._batches.set_state(state)

    def close(self) -> None:
        self._ended.set()
        self._batches.close()
        pathlib.Path(self._path).unlink(missing_ok=True)

    def _pages(self) -> list[tuple[int, int, float, float, str]]:
        pages = [_PAGE.unpack_from(self._memory, number * _PAGE.size) for number in range(self._count)]
        return [(*page[:4], page[4].rstrip(b"\0").decode(errors="replace")) for page in pages]

    def _watch(self) -> None:
        """Kills the reader that is waited for and does nothing: Grain then comes back from waiting for it."""
        often, looked = min(1.0, self._timeout / 4), time.monotonic()
        while not self._ended.wait(often):
            now, since = time.monotonic(), self._waiting_since
            if now - looked > often + 5 and since:  # this process stood still itself, and its readers may have, too
                self._waiting_since = since = now
            looked = now
            if not since:
                continue
            pages = self._pages()
            # They take turns: the one whose turn it is has made the fewest batches, and is the first of those.
            number = min(range(self._count), key=lambda n: pages[n][1])
            process, batches, acted, *_ = pages[number]
            silent = now - max(since, acted)
            if silent > (self._timeout if batches else max(self._timeout, _START)):
                known = [page[0] for page in pages]
                # One that has not come so far as to name itself is among those that have not.
                silent_ones = [
                    child
                    for child in multiprocessing.active_children()
                    if child.pid == process or (not process and child.pid not in known and "grain" in child.name)
                ]
                if silent_ones:
                    self._verdict = self._silent(number, pages, silent)
                    for child in silent_ones:
                        child.kill()
                    return

    def _silent(self, number: int, pages: list[tuple[int, int, float, float, str]], silent: float) -> str:
        process, _, _, reading_since, what = pages[number]
        since = time.strftime("%H:%M:%S", time.localtime(time.time() - silent))
        how = f"it {_state(process)}" if process else "it has not started"
        if what:
            how += f", at {what} since {time.monotonic() - reading_since:.0f} s"
        return (
            f"{self._name(number, process)} has answered nothing for {silent:.0f} s, since {since}: {how}; it was "
            f"killed. Start again, with a larger config.data.worker_timeout (now {self._timeout:g} s) where the data "
            "is slow"
        )

    def _name(self, number: int, process: int) -> str:
        return f"reader {number} of {self._count}" + (f" (process {process})" if process else "")

    def _told(self, error: Exception) -> Exception:
        """What is wrong, from what Grain says of it."""
        if self._verdict:
            return ReaderLost(self._verdict)
        if isinstance(error, DataError):
            return error
        pages = self._pages()
        code = re.search(r"exit code (-?\d+)", str(error)) if isinstance(error, RuntimeError) else None
        if code:
            number = next((n for n, page in enumerate(pages) if page[0] and not _lives(page[0])), None)
            name = "a reader" if number is None else self._name(number, pages[number][0])
            at = f", at {pages[number][4]}" if number is not None and pages[number][4] else ""
            return ReaderLost(f"{name} {_ending(int(code[1]))}{at}: {_advice(int(code[1]))}")
        logging.debug("%s", "".join(traceback.format_exception(error)))
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/grain/" not in frame.filename]
        where = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
        text = " ".join(str(error).split())
        return DataError(f"a reader process failed: {type(error).__name__}: {text}{where}; -v=1 shows where it was")


def _state(process: int) -> str:
    """What the system says of a process; on Linux alone."""
    try:
        letter = pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "does not say why"
    return f"is {_STATES.get(letter, 'in state')} ({letter})"


def _lives(process: int) -> bool:
    return any(child.pid == process for child in multiprocessing.active_children())


def _ending(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


def _advice(code: int) -> str:
    fewer = "lower config.data.workers, config.data.threads or config.data.prefetch"
    if code == -signal.SIGKILL:
        return f"so the system does when memory runs out (`dmesg` tells): {fewer}"
    if code in (-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT, -signal.SIGILL, -signal.SIGFPE):
        return "a library crashed in it; where that happens again, look at the data there, or set config.data.workers=0"
    return "it was asked to end by something else: start again" if code < 0 else "what it said last is above"
