"""A long computation kept in pieces, so that an evaluation that was killed goes on inside a large set."""

from __future__ import annotations

import functools
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from etils import epath

from coca_jax.data import side_files
from coca_jax.evaluate.results import Processes

_IDENTITY = "identity.json"
Arrays = Mapping[str, np.ndarray]


class Pieces:
    """A folder of numbered arrays, `NAME-000012.npz`, and what they belong to. Without a folder nothing is kept.

    Process 0 writes. With several processes the folder must be seen by all; where one does not see what the first has
    written, all compute it again.
    """

    def __init__(self, folder: epath.Path | None, identity: Any = None, processes: Processes = Processes()):  # noqa: B008  (frozen)
        """
        Args:
          folder: kept in; what is there of another identity is removed.
          identity: what the pieces depend on, as JSON can hold it.
          processes: with whom the work is shared.
        """
        self._folder, self._processes = folder, processes
        self.kept = 0  # pieces that were found, of all names
        if folder is None or processes.index:
            return
        wanted = json.dumps(identity, sort_keys=True)
        path = folder / _IDENTITY
        side_files.make_room(folder, folder=True)
        if side_files.take_json(path) != json.loads(wanted):
            self.remove()
            folder.mkdir(parents=True, exist_ok=True)
            side_files.write_text(path, wanted)

    def each(self, name: str, compute: Callable[[int], Iterable[dict[str, np.ndarray]]]) -> Iterable[Arrays]:
        """All pieces of a name, those that are there from the folder and the others computed and kept.

        Args:
          name: of the computation: letters and dashes.
          compute: number of the first piece that is missing -> that piece and all after it, in order.
        """
        found = self._read(name)
        self.kept += len(found)
        yield from found
        for number, arrays in enumerate(compute(len(found)), len(found)):
            if self._folder is not None and not self._processes.index:
                path = self._folder / f"{name}-{number:06}.npz"
                content = io.BytesIO()
                named: dict[str, Any] = {key: np.asarray(value) for key, value in arrays.items()}
                np.savez(content, **named)
                side_files.write_whole(path, functools.partial(_write, content=content.getvalue()))
            yield arrays

    def remove(self) -> None:
        """Forgets them all: the computation is done."""
        if self._folder is not None and not self._processes.index and self._folder.exists():
            for path in self._folder.iterdir():
                ours = path.name == _IDENTITY or re.fullmatch(r"[\w-]+\.npz(\.partial)?", path.name)
                if ours and not path.is_dir():
                    path.unlink()
            if not any(self._folder.iterdir()):
                self._folder.rmdir()

    def _read(self, name: str) -> list[Arrays]:
        """Those that every process can read, from the first on without a gap."""
        found: list[Arrays] = []
        if self._folder is None:
            return found
        while (path := self._folder / f"{name}-{len(found):06}.npz").exists():
            try:
                content = side_files.read(path)
                with np.load(io.BytesIO(content or b""), allow_pickle=False) as arrays:
                    found.append(dict(arrays))
            except Exception:  # of many kinds: zipfile's, zlib's, NumPy's
                break  # damaged: it and what follows is computed again
        return found[: min(self._processes.gather(len(found)))]


def _write(path: epath.Path, content: bytes) -> None:
    path.write_bytes(content)
