"""Files of the result: each takes its name when it is whole, on a disk as in a bucket."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from coca_jax.data.addresses import remedy
from coca_jax.data.records import DataError
from coca_jax.data.sources.base import one_line
from coca_jax.data.sources.files import is_remote

TEMPORARY = ".tmp"  # ending of what is not whole
_CHUNK = 16 << 20


@contextlib.contextmanager
def whole(path: epath.Path, work: epath.Path) -> Iterator[Path]:
    """A local file to write to, which becomes `path` at the end, all at once, or never.

    Args:
      path: where the file belongs, on a disk or in a bucket.
      work: an existing folder of the same disk, for the time until then.

    Raises:
      DataError: the disk is full, the folder not writable, ...
    """
    remote = is_remote(os.fspath(path))
    temporary: Path | None = None
    try:
        folder = None if remote else os.fspath(work)
        descriptor, name = tempfile.mkstemp(suffix=TEMPORARY, prefix=f"{path.name}.", dir=folder)
        os.close(descriptor)
        temporary = Path(name)
        yield temporary
        if remote:
            # A store shows an object when all of it has arrived.
            with temporary.open("rb") as source, path.open("wb") as target:
                shutil.copyfileobj(source, target, _CHUNK)
        else:
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.chmod(0o644)  # temporary files are their owner's alone
            os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # RuntimeError is ArrayRecord's
        raise DataError(
            f"{path} cannot be written: {one_line(error)}; {remedy(str(error))} and run the command again, or name "
            "another --out"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write(path: epath.Path, data: bytes, work: epath.Path) -> None:
    """Writes a small file, see `whole`."""
    with whole(path, work) as temporary:
        temporary.write_bytes(data)


def write_json(path: epath.Path, values: Any, work: epath.Path, indent: int | None = None) -> None:
    """Writes plain values, in the order in which they come."""
    write(path, (json.dumps(values, ensure_ascii=False, indent=indent) + "\n").encode(), work)


def sha256(path: epath.Path | Path) -> str:
    """Of a file's content, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sweep(work: epath.Path) -> None:
    """Removes what was not whole when an earlier run was killed. Only while no other writes there."""
    for left in work.glob(f"*{TEMPORARY}"):
        left.unlink(missing_ok=True)
