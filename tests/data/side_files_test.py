"""Files beside results, damaged in every way: their readers go on, and what cannot be read is kept."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import time
import tracemalloc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from etils import epath

from coca_jax import config, evaluation, pictures
from coca_jax.data import side_files
from coca_jax.data.alone import alone
from coca_jax.data.records import DataError
from coca_jax.data.tally import List as BadExamples
from coca_jax.evaluate import curves, pixels
from coca_jax.evaluate.pieces import Pieces
from coca_jax.start import Start
from coca_jax.train import checkpoint, skipped
from coca_jax.train.checkpoint import CheckpointError
from coca_jax.train.checkpoint.folder import Folder, read_metrics
from coca_jax.train.metrics import Writer, read_lines

LINE = '{"step": 1, "loss": 2.0, "source": "s", "record": 7, "path": "a.png", "error": "e"}\n'
SECOND = LINE.replace("1", "2", 1).replace("7", "8")


def remove(path: pathlib.Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def make_folder(path: pathlib.Path) -> None:
    path.mkdir()
    (path / "something").write_text("of somebody")


# What is in the place of a file.
PLACES: dict[str, Callable[[pathlib.Path], object]] = {
    "a folder": make_folder,
    "a pipe": os.mkfifo,
    "a link to itself": lambda path: path.symlink_to(path.name),
}
CONTENTS: dict[str, bytes] = {
    "a byte that is no text": SECOND.encode().replace(b"loss", b"lo\xfes"),
    "rubbish": bytes(range(1, 256)) * 40 + b"\n",
    "an endless line": b"[" * (1 << 20) + b"\n",
    "deep nesting": b"[" * 100_000 + b"\n",
    "another value": b"[1, 2]\n17\nnull\n",
    "zeros": bytes(5000) + b"\n",
}
DAMAGE: dict[str, Callable[[pathlib.Path], object]] = PLACES | {
    # Between lines that can be read.
    name: lambda path, content=content: path.write_bytes(LINE.encode() + content + SECOND.encode())
    for name, content in CONTENTS.items()
}


@pytest.fixture(autouse=True)
def short_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_files, "_LINE", 1 << 18)


@pytest.fixture(params=DAMAGE)
def damage(request: pytest.FixtureRequest) -> Callable[[pathlib.Path], epath.Path]:
    def apply(path: pathlib.Path) -> epath.Path:
        remove(path)
        DAMAGE[request.param](path)
        return epath.Path(path)

    apply.lines = [] if request.param in PLACES else [1, 2]  # type: ignore[attr-defined]
    return apply


def aside(path: epath.Path) -> list[str]:
    return sorted(p.name for p in path.parent.iterdir() if side_files.ASIDE in p.name)


def test_metrics_are_written_on_after_any_damage(damage: Any, tmp_path: pathlib.Path) -> None:
    path = damage(tmp_path / "metrics.jsonl")
    assert curves.read(path).unreadable  # a report of it only reads
    assert not aside(path)
    writer = Writer(epath.Path(tmp_path), 5)
    writer.write(6, {"loss": 1.0})
    writer.close()
    assert [line["step"] for line in read_lines(path)] == [*damage.lines, 6]
    assert aside(path) == ["metrics.jsonl.unreadable-1"]
    damage(tmp_path / "metrics.jsonl")
    Writer(epath.Path(tmp_path), 5).close()
    assert aside(path) == ["metrics.jsonl.unreadable-1", "metrics.jsonl.unreadable-2"]


def test_lists_of_bad_examples_and_skipped_steps_are_gone_on_with(damage: Any, tmp_path: pathlib.Path) -> None:
    source = SimpleNamespace(name="s", __getitem__=None)

    class Mixture:
        sources = (source,)

        def locate(self, at: int) -> tuple[int, int]:
            return 0, at

    class Source:
        name = "s"

        def __getitem__(self, index: int) -> Any:
            return SimpleNamespace(key=f"\udcff{index}")

    Mixture.sources = (Source(),)  # type: ignore[assignment]
    path = damage(tmp_path / "bad_examples.jsonl")
    listed = BadExamples(Mixture(), epath.Path(tmp_path))
    listed.add(np.array([7, 9]), np.array([1, 1]))
    kept = [line["record"] for line in side_files.read_lines(path).objects]
    assert kept == ([7, 8, 9] if damage.lines else [7, 9])  # each once
    path = damage(tmp_path / "skipped_steps.jsonl")
    left_out = skipped.List(Mixture(), epath.Path(tmp_path), 2)
    metrics = {"loss": float("nan"), "gradient_norm": 1.0, "guard/bound": 2.0, "guard/in_a_row": 1, "guard/skipped": 1}
    assert "its records are in" in left_out.add(3, metrics, np.array([4]))
    assert [line["step"] for line in read_lines(path)] == [*damage.lines, 3]
    assert aside(path) == ["bad_examples.jsonl.unreadable-1", "skipped_steps.jsonl.unreadable-1"]


def test_a_last_line_that_a_kill_cut_off_is_no_damage(tmp_path: pathlib.Path) -> None:
    path = epath.Path(tmp_path / "metrics.jsonl")
    path.write_text(LINE + SECOND[:20])
    assert side_files.take_lines(path) == [json.loads(LINE)] and path.read_text() == LINE
    path.write_text(LINE + SECOND.rstrip())  # whole, but for its end
    assert len(side_files.take_lines(path)) == 2 and path.read_text() == LINE + SECOND
    path.write_text(json.dumps({"step": 1, "name": "é\u2028"}, ensure_ascii=False))
    assert side_files.take_lines(path)[0]["name"] == "é\u2028" and not aside(path)


def test_a_lock_that_is_none_is_set_aside_and_a_damaged_configuration_is_refused(
    damage: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # one that is half-written is looked at again
    path = damage(tmp_path / "run.lock")
    with checkpoint.Lock(epath.Path(tmp_path)):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not side_files.is_there(path)
    assert aside(path) == ([] if damage.lines else ["run.lock.unreadable-1"])
    path = damage(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json .*: restore it, or start in another --workdir"):
        checkpoint.keep_config(epath.Path(tmp_path), config.Config())
    assert side_files.is_there(path)


def test_what_an_evaluation_keeps_is_computed_again(damage: Any, tmp_path: pathlib.Path) -> None:
    path = damage(tmp_path / "results.json")
    assert evaluation._known(path, {}) is None and aside(path) == ["results.json.unreadable-1"]
    path = damage(tmp_path / "pixels.json")
    assert pixels._read(path) == {}
    pixels._write(path, {"key": {"image_to_text": {"r1": 0.5}}})
    assert pixels._read(path) == {"key": {"image_to_text": {"r1": 0.5}}}
    folder = epath.Path(tmp_path / "pieces")
    made: list[int] = []

    def compute(first: int) -> Any:
        for number in range(first, 3):
            made.append(number)
            yield {"x": np.full(2, number)}

    for damaged in (None, "identity.json", "a-000001.npz"):
        if damaged:
            damage(tmp_path / "pieces" / damaged)
        made.clear()
        found = list(Pieces(folder, {"of": 1}).each("a", compute))
        assert [piece["x"].tolist() for piece in found] == [[n, n] for n in range(3)]
        assert made == ([1, 2] if damaged == "a-000001.npz" else [0, 1, 2])
    made.clear()
    list(Pieces(folder, {"of": 1}).each("a", compute))
    assert not made


def test_a_step_s_evaluation_and_the_report_of_a_start_are_written_anew(damage: Any, tmp_path: pathlib.Path) -> None:
    (tmp_path / "8").mkdir()
    path = damage(tmp_path / "8/evaluation.json")
    assert read_metrics(epath.Path(tmp_path / "8")) is None
    Folder(epath.Path(tmp_path), None, "").was_evaluated(8, {"r1": 0.5})
    assert read_metrics(epath.Path(tmp_path / "8")) == {"r1": 0.5} and len(aside(path)) == (not damage.lines)
    path = damage(tmp_path / "init.json")
    report = SimpleNamespace(brief=lambda: "brief", to_json=lambda: {"taken": 1})
    Start(config.Config(), report=report).tell(epath.Path(tmp_path))
    assert json.loads(path.read_text()) == {"taken": 1}


def test_results_are_refused_by_line_and_what_is_beside_them_is_not(damage: Any, tmp_path: pathlib.Path) -> None:
    path = damage(tmp_path / "captions.jsonl")
    with pytest.raises(DataError, match="first is line 2: remove" if damage.lines else "is not a file|leads to itself"):
        pictures.open_rows(str(path)).done()
    assert not aside(path)
    path = damage(tmp_path / "captions.jsonl.bad.jsonl")
    assert pictures.Lines(pathlib.Path(path), side=True).done() == ({"a.png"} if damage.lines else set())
    assert aside(path) == ["captions.jsonl.bad.jsonl.unreadable-1"]
    path = damage(tmp_path / "captions.jsonl.lock")
    with alone(path, "busy"):
        pass
    damage(tmp_path / "captions.jsonl.settings.json")
    remove(tmp_path / "captions.jsonl")
    (tmp_path / "captions.jsonl").write_text(LINE)
    with pytest.raises(DataError, match=r"is damaged.*remove it if"):
        pictures.keep_settings(f"{tmp_path}/captions.jsonl", {"prompt": "a"})


def test_what_is_in_the_way_of_the_file_beside_is_set_aside_too(tmp_path: pathlib.Path) -> None:
    path = epath.Path(tmp_path / "metrics.jsonl")
    DAMAGE["rubbish"](tmp_path / "metrics.jsonl")
    before = path.read_bytes()
    (tmp_path / "metrics.jsonl.partial").mkdir()
    assert len(side_files.take_lines(path)) == 2
    assert (tmp_path / "metrics.jsonl.unreadable-1").read_bytes() == before
    assert (tmp_path / "metrics.jsonl.partial.unreadable-1").is_dir()


def test_one_large_line_takes_no_memory_and_a_large_file_is_not_read(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = epath.Path(tmp_path / "metrics.jsonl")
    with open(path, "wb") as file:
        file.write(LINE.encode())
        file.truncate(32 << 20)  # sparse: zeros
    tracemalloc.start()
    lines = side_files.read_lines(path)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
    assert len(lines.objects) == 1 and lines.bad == 1 and not lines.ended
    monkeypatch.setattr(side_files, "_LARGEST", 16 << 20)
    with pytest.raises(side_files.Unreadable, match="more than 16 MiB"):
        side_files.read_json(path)
