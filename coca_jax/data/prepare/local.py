"""Shards by processes of this machine."""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import tqdm

from coca_jax import parent
from coca_jax.data.prepare import shards
from coca_jax.data.prepare.plan import Plan
from coca_jax.data.records import DataError

_seen: Any = None  # in a worker: the number of records seen by all, shared


def run(plan: Plan, bad: str, workers: int, progress: Callable[[int], None], dropped: Callable[[int], None]) -> None:
    """Processes all shards; one worker, or a single shard, in this process.

    Args:
      plan: what to write.
      bad: see shards.process.
      workers: cores to use; processes, and threads of those where there are fewer shards.
      progress: is told how many records have been seen since it was told last.
      dropped: is told how many records were left out of each shard, and may raise to end it all.

    Raises:
      DataError: see shards.process; of several errors that of the first shard; or a worker was killed.
    """
    threads = max(1, workers // plan.shards)  # few shards and many cores
    workers = min(workers, plan.shards)
    if workers == 1:
        for shard in range(plan.shards):
            dropped(shards.process(plan, shard, bad, progress, threads))
        return
    # Spawned, not forked: libraries with threads of their own are loaded here.
    context = multiprocessing.get_context("spawn")
    seen = context.Value("q", 0)
    told = 0
    others = set(multiprocessing.active_children())
    with _interrupted() as interrupted:
        pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start, (seen,))
        try:
            waiting = {pool.submit(_process, plan, shard, bad, threads): shard for shard in range(plan.shards)}
            while waiting:
                done, _ = concurrent.futures.wait(waiting, 0.2, concurrent.futures.FIRST_COMPLETED)
                for future in sorted(done, key=waiting.__getitem__):
                    del waiting[future]
                    dropped(future.result())
                if news := seen.value - told:
                    told += news
                    progress(news)
                if interrupted.is_set():
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            for worker in set(multiprocessing.active_children()) - others:
                worker.terminate()  # what it leaves half-written has a temporary name
            raise
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process was killed, perhaps for want of memory: run the same command again, with fewer "
                "--workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _interrupted() -> Iterator[threading.Event]:
    """Ctrl-C as an event instead of an exception.

    An exception may come out of the handler while `wait` takes the locks of all futures, one after the other. Nobody
    gives those back, and the pool's own thread, which cancels the futures at its end, would wait for them for ever.
    """
    event = threading.Event()
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored, or somebody else's
        yield event
        return
    try:
        signal.signal(signal.SIGINT, lambda *_: event.set())
    except ValueError:  # not the main thread, which alone is interrupted
        yield event
        return
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _process(plan: Plan, shard: int, bad: str, threads: int) -> int:
    def progress(records: int) -> None:
        with _seen.get_lock():
            _seen.value += records

    return shards.process(plan, shard, bad, progress, threads)


def _start(seen: Any) -> None:
    global _seen
    _seen = seen
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the first one acts
    # tqdm's own lock is a semaphore of the system, which a process that is ended would leave there.
    tqdm.tqdm.set_lock(threading.RLock())
    parent.follow()  # a worker whose parent was killed would wait for work forever
