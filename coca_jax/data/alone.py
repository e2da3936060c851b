"""One process at a time where several would mix what they write."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from coca_jax.data import addresses, side_files
from coca_jax.data.records import DataError
from coca_jax.data.sources.files import is_remote

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def alone(lock: str | os.PathLike[str], said: str) -> Iterator[None]:
    """Keeps a second process out as long as this one lives, however it ends, on a disk that can lock files.

    Args:
      lock: a file in an existing folder, which stands for what is written. It goes when this process is done.
      said: to the second.

    Raises:
      DataError: another one is at work there.
    """
    if is_remote(os.fspath(lock)) or fcntl is None:
        yield
        return
    side_files.make_room(addresses.path(lock))  # a pipe in its place would keep this process waiting
    with open(lock, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(file.fileno()).st_nlink:  # the other one has taken it away since it was opened here
                raise BlockingIOError
        except BlockingIOError as error:
            raise DataError(said) from error
        except OSError:  # a network's disk that has no locks
            yield
            return
        try:
            yield
        finally:
            with contextlib.suppress(FileNotFoundError):  # with its folder
                os.unlink(lock)
