"""An object store in memory that fails as it is told: an fsspec file system, for tests of whoever reads through fsspec.

It is registered as az://, one of the protocols that etils' paths know, so that what goes through epath meets it too.
"""

from __future__ import annotations

import collections
import io
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile

PROTOCOL = "az"


class Throttled(Exception):
    """As stores' libraries raise: no OSError, and a code of HTTP."""

    code = 503


class Faulty(MemoryFileSystem):
    """Fails the next questions of a kind with the errors in `faults[kind]`, in order.

    Kinds: info, cat_file, find (of which glob is made), open (to read), range (reads of an open file), write.
    """

    protocol = PROTOCOL
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    faults: ClassVar[dict[str, collections.deque[Exception]]] = collections.defaultdict(collections.deque)
    asked: ClassVar[collections.Counter[str]] = collections.Counter()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(str(path).replace(f"{PROTOCOL}://", "memory://", 1))

    def unstrip_protocol(self, name: str) -> str:
        return f"{PROTOCOL}:/{self._strip_protocol(name)}"

    def _ask(self, kind: str) -> None:
        self.asked[kind] += 1
        if self.faults[kind]:
            raise self.faults[kind].popleft()

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        self._ask("info")
        return super().info(path, **options)

    def find(self, path: str, *arguments: Any, **options: Any) -> Any:
        self._ask("find")
        return super().find(path, *arguments, **options)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        self._ask("cat_file")
        content = self.store.get(self._strip_protocol(path))
        if content is None:
            raise FileNotFoundError(path)
        return bytes(content.getbuffer()[start:end])

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode == "rb":
            self._ask("open")
            return _Ranges(self, path, size=super().info(path)["size"], block_size=4096)
        if "data" in options:  # pipe_file
            return super()._open(path, mode, **options)
        return _Writes(self, self._strip_protocol(path), append="a" in mode)


class _Ranges(AbstractBufferedFile):
    """Reads by ranges, as files in a bucket do."""

    fs: Faulty

    def _fetch_range(self, start: int, end: int) -> bytes:
        self.fs._ask("range")
        return bytes(self.fs.store[self.fs._strip_protocol(self.path)].getbuffer()[start:end])


class _Writes(io.RawIOBase):
    """What was written appears when it is flushed, or is lost."""

    def __init__(self, system: Faulty, path: str, append: bool) -> None:
        super().__init__()
        self._system, self._path, self._parts = system, path, list[bytes]()
        if not append:
            system.pipe_file(path, b"")

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._parts.append(bytes(data))
        return len(self._parts[-1])

    def flush(self) -> None:
        parts, self._parts = self._parts, []
        if parts:
            self._system._ask("write")
            before = self._system.store.get(self._path)
            self._system.pipe_file(self._path, b"".join([before.getvalue() if before else b"", *parts]))


def register() -> Faulty:
    """The store, empty and without faults."""
    fsspec.register_implementation(PROTOCOL, Faulty, clobber=True)
    system = fsspec.filesystem(PROTOCOL)
    assert isinstance(system, Faulty)
    Faulty.store.clear()
    Faulty.faults.clear()
    Faulty.asked.clear()
    return system
