"""What an evaluation keeps while it runs: pieces are found again, damaged ones are not believed."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable

import numpy as np
from etils import epath

from coca_jax.evaluate.pieces import Pieces
from coca_jax.evaluate.results import Processes


def squares(asked: list[int], count: int = 4):
    def compute(first: int) -> Iterable[dict[str, np.ndarray]]:
        for number in range(first, count):
            asked.append(number)
            yield {"x": np.arange(3, dtype=np.float32) * number, "bad": np.zeros(0, np.int64)}

    return compute


def values(pieces: Pieces, asked: list[int]) -> list[float]:
    return [float(piece["x"][1]) for piece in pieces.each("name", squares(asked))]


def test_pieces_are_computed_once(tmp_path: pathlib.Path) -> None:
    folder, asked = epath.Path(tmp_path) / "pieces", list[int]()
    # Stopped behind the second.
    for _ in zip(range(2), Pieces(folder, {"a": 1}).each("name", squares(asked)), strict=False):
        pass
    kept = sorted(path.name for path in tmp_path.glob("pieces/*.npz"))
    assert kept[:2] == ["name-000000.npz", "name-000001.npz"]
    begun = len(kept)
    asked.clear()
    again = Pieces(folder, {"a": 1})
    assert values(again, asked) == [0, 1, 2, 3] and asked == list(range(begun, 4)) and again.kept == begun
    asked.clear()
    assert values(Pieces(folder, {"a": 1}), asked) == [0, 1, 2, 3] and not asked
    # Half a file, and one that is missing: they and what follows.
    path = tmp_path / "pieces" / "name-000002.npz"
    path.write_bytes(path.read_bytes()[:100])
    assert values(Pieces(folder, {"a": 1}), asked) == [0, 1, 2, 3] and asked == [2, 3]
    asked.clear()
    (tmp_path / "pieces" / "name-000000.npz").unlink()
    assert values(Pieces(folder, {"a": 1}), asked) == [0, 1, 2, 3] and asked == [0, 1, 2, 3]
    asked.clear()
    # Another checkpoint.
    assert values(Pieces(folder, {"a": 2}), asked) == [0, 1, 2, 3] and asked == [0, 1, 2, 3]
    Pieces(folder, {"a": 2}).remove()
    assert not (tmp_path / "pieces").exists()


def test_without_a_folder_nothing_is_kept() -> None:
    asked: list[int] = []
    assert values(Pieces(None), asked) == values(Pieces(None), asked) == [0, 1, 2, 3]
    assert asked == [0, 1, 2, 3] * 2


def test_processes_that_do_not_see_the_folder_compute_all(tmp_path: pathlib.Path) -> None:
    asked: list[int] = []
    folder = epath.Path(tmp_path) / "pieces"
    assert values(Pieces(folder, 1), asked) == [0, 1, 2, 3]
    asked.clear()
    other = Processes(0, 2, lambda value: [value, 0])  # the second sees none
    assert values(Pieces(folder, 1, other), asked) == [0, 1, 2, 3] and asked == [0, 1, 2, 3]
    # One that is not the first never writes.
    (tmp_path / "elsewhere").mkdir()
    second = Pieces(epath.Path(tmp_path) / "elsewhere", 1, Processes(1, 2, lambda value: [0, value]))
    assert values(second, asked) == [0, 1, 2, 3] and not list((tmp_path / "elsewhere").iterdir())


def test_other_files_in_the_folder_stay(tmp_path: pathlib.Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    pieces = Pieces(epath.Path(tmp_path), 1)
    assert values(pieces, [])
    pieces.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
