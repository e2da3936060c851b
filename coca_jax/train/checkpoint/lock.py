"""One run in a workdir: run.lock says which, and its heart beats in it."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from absl import logging
from etils import epath

from coca_jax.data import side_files
from coca_jax.train.checkpoint.paths import is_bucket, one_line

FILE = "run.lock"
BEAT = 15.0  # seconds between heartbeats
STALE = 4 * BEAT  # without one, after which a run on another machine is taken for dead
_SETTLE = 3.0  # seconds after which the last of two that wrote at once is seen by both, in a bucket


_held: set[str] = set()  # tokens of this process


class Locked(RuntimeError):
    """The workdir is another run's. The message names it."""


@dataclasses.dataclass(frozen=True)
class Owner:
    """A run.

    Attributes:
      host, pid, started: by which a person finds it.
      machine: what a pid means something on: the kernel's boot and the pid namespace.
      process_started: the kernel's count of when the pid began, since pids are used again.
      token: unlike any other run's.
    """

    host: str
    pid: int
    started: str
    machine: str
    process_started: str
    token: str

    @classmethod
    def me(cls) -> Owner:
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        pid = os.getpid()
        return cls(socket.gethostname(), pid, now, _machine(), _process_started(pid), uuid.uuid4().hex)

    def is_dead(self) -> bool | None:
        """None: it cannot be told from here."""
        if not self.machine or self.machine != _machine():
            return None
        if self.pid == os.getpid():  # one that could not be removed when the run ended
            return self.token not in _held
        return _process_started(self.pid) in ("", "dead") or _process_started(self.pid) != self.process_started

    def __str__(self) -> str:
        return f"host {self.host}, pid {self.pid}, started {self.started}"


class Lock:
    """Holds a workdir for this process, as a context manager.

    A run that was killed does not hold it: on the same machine its process is looked for; on another, its heart is
    listened for, which needs no common clock. On a file system the look and the taking are one (flock); in a bucket,
    where nothing is, the one who wrote last of two that begin at the same moment has it, and the other finds out.

    A run that finds that another has taken its place, because it stood still for longer than STALE, ends at once: it
    must not write any more.
    """

    def __init__(self, workdir: epath.Path, on_loss: Callable[[str], None] | None = None) -> None:
        self._workdir, self._path = workdir, workdir / FILE
        self._me, self._beats = Owner.me(), 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._on_loss = on_loss or _end

    def __enter__(self) -> Lock:
        """Raises Locked where another run has the workdir; OSError where it cannot be written."""
        seen = self._take(None)
        if seen:
            owner = seen[0]
            logging.warning(
                "%s is locked by %s: waiting up to %.0f s to see whether that run lives",
                *(self._path, owner, STALE),
            )
            deadline = time.monotonic() + STALE
            while time.monotonic() < deadline:
                time.sleep(min(1.0, BEAT / 4))
                now = _read(self._path)
                if now and now != seen:
                    self._refuse(now[0])
            if again := self._take(seen):
                self._refuse(again[0])
            logging.warning("%s: no sign of life; this run takes its place", owner)
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        _held.discard(self._me.token)
        if self._thread:
            self._thread.join(BEAT)
        with contextlib.suppress(Exception):
            now = _read(self._path)
            if now and now[0].token == self._me.token:
                self._path.unlink()

    def _take(self, stale: tuple[Owner, int] | None) -> tuple[Owner, int] | None:
        """Takes the lock where it is free, a dead run's, or as it was in `stale`; else returns what is there."""
        with _alone(self._workdir):
            now = _read(self._path)
            if now and now != stale:
                if (dead := now[0].is_dead()) is False:
                    self._refuse(now[0])
                if not dead:
                    return now
                logging.info("%s: the run of %s is no more", self._path, now[0])
            _held.add(self._me.token)
            self._write()
            if is_bucket(self._path):
                time.sleep(_SETTLE)
                now = _read(self._path)
                if now and now[0].token != self._me.token:
                    self._refuse(now[0])
        return None

    def _refuse(self, owner: Owner) -> None:
        raise Locked(
            f"--workdir={self._workdir} is in use by another run ({owner}): wait for it, stop it, or use another "
            "--workdir"
        )

    def _write(self) -> None:
        text = json.dumps(dataclasses.asdict(self._me) | {"beat": self._beats}) + "\n"
        if is_bucket(self._path):
            self._path.write_text(text)
            return
        partial = self._path.with_name(f"{FILE}.{self._me.token}")
        try:
            partial.write_text(text)
            side_files.make_room(self._path)
            partial.replace(self._path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            try:
                now = _read(self._path)
                if now and now[0].token != self._me.token:
                    self._on_loss(
                        f"error: {self._path} was taken by another run ({now[0]}) while this one stood still: it "
                        "ends here, and writes nothing more"
                    )
                    return
                self._beats += 1
                self._write()
            except Exception as error:  # a full disk, a storage that does not answer: the next time, perhaps
                logging.info("%s: %s", self._path, one_line(error))


def _end(message: str) -> None:
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    os._exit(1)


def _read(path: epath.Path) -> tuple[Owner, int] | None:
    """Whose lock it is and how often its heart has beaten; None where there is none. One half-written is read again."""
    for attempt in range(3):
        try:
            values = side_files.read_json(path)
            if values is None:
                return None
            return Owner(**{f.name: values[f.name] for f in dataclasses.fields(Owner)}), int(values["beat"])
        except side_files.Refused as error:  # it may be a living run's
            raise OSError(str(error)) from error
        except (ValueError, KeyError, TypeError):  # Unreadable is a ValueError
            time.sleep(0.2 * (attempt + 1))
    return None  # not ours to understand: cut by a crash


@contextlib.contextmanager
def _alone(folder: epath.Path) -> Iterator[None]:
    """Only one process at a time, where the file system can lock."""
    if is_bucket(folder):
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network folders cannot
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _machine() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return ""


def _process_started(pid: int) -> str:
    """When a process began, in the kernel's ticks; empty: there is none; `dead`: it has ended and was not collected."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return ""
    return "dead" if fields[0] in (b"Z", b"X") else fields[19].decode()
