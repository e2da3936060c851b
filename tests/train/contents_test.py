"""A run goes on only with what it has read so far: each thing changed between two starts is refused by name."""

from __future__ import annotations

import pathlib
import runpy
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from etils import epath

import coca_jax
from coca_jax import run
from coca_jax.config import ConfigError
from coca_jax.data import records
from coca_jax.data.sources import open_source
from coca_jax.data.tokenizer import Tokenizer
from coca_jax.train import checkpoint, contents
from coca_jax.train.checkpoint import CheckpointError
from coca_jax.train.metrics import read_lines
from tests import pairs

STEPS = 4
LABELS = tuple(sorted(pairs.SHAPES))


def write_images(folder: pathlib.Path) -> None:
    folder.mkdir()
    lines = ["file_name,caption,label"]
    for number, (color, shape) in enumerate(pairs.examples()):
        (folder / f"{number:02}.png").write_bytes(pairs.png(pairs.picture(color, shape)))
        lines.append(f"{number:02}.png,{pairs.caption(color, shape)},{shape}")
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")


def recipe(folder: pathlib.Path, *, accept: bool = False) -> Any:
    c = runpy.run_path("tests/tiny_recipe.py")["get_config"]()
    c.steps, c.checkpoint.every, c.loss.lambda_cap, c.loss.lambda_cls = STEPS, 2, 0.0, 1.0
    c.data.train = f"array_record:{folder}/data/shapes.array_record + folder:{folder}/data/images"
    c.evaluate.update(captions=0, splits=(f"folder:{folder}/data/held_out",))
    c.data.tokenizer, c.data.accept_changes = f"{folder}/data/shapes.model", accept
    return c


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with `data` and a run, `run`, that was interrupted after half of its steps."""
    folder = tmp_path_factory.mktemp("begun") / "here"
    (folder / "data").mkdir(parents=True)
    pairs.write(folder / "data")
    write_images(folder / "data/images")
    write_images(folder / "data/held_out")
    assert run.run(recipe(folder), str(folder / "run")) == 0
    shutil.rmtree(folder / "run/checkpoints" / str(STEPS))
    (folder / "run/report.html").unlink()
    shutil.copytree(folder, folder.with_name("kept"))
    return folder


@pytest.fixture
def begun(once: pathlib.Path) -> Iterator[pathlib.Path]:
    """The same, as new in every test and at the same path: paths are part of a configuration."""
    yield once
    put_back(once)


def put_back(folder: pathlib.Path) -> None:
    """With other times, as a copy has them."""
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("kept"), folder, copy_function=shutil.copyfile)


def reverse_records(folder: pathlib.Path) -> None:
    source, file = open_source(f"array_record:{folder}/data/shapes.array_record"), folder / "data/shapes.array_record"
    size = file.stat().st_size
    records.write(file, [records.pack(source[i], 24, 24) for i in reversed(range(len(source)))])
    assert file.stat().st_size == size and open_source(source.name).fingerprint() == source.fingerprint()


def other_tokenizer(path: pathlib.Path) -> None:
    Tokenizer.train([pairs.caption(*e)[::-1] for e in pairs.examples()] * 20, path, vocab_size=300)


def replace(path: pathlib.Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text and len(old) == len(new)
    path.write_text(text.replace(old, new))


# What is changed, and what the error names.
CHANGES: list[tuple[Callable[[pathlib.Path], object], str]] = [
    (lambda data: other_tokenizer(data / "shapes.model"), "shapes.model"),
    (lambda data: reverse_records(data.parent), "shapes.array_record (digest"),
    (lambda data: replace(data / "images/captions.csv", "blue dot", "rude dot"), "captions.csv (digest"),
    (lambda data: shutil.copyfile(data / "images/04.png", data / "images/03.png"), "03.png (digest"),
    (lambda data: (data / "images/05.png").unlink(), "05.png (digest"),
]


def test_what_has_changed_is_refused_by_name_and_the_workdir_stays_as_it_was(begun: pathlib.Path) -> None:
    kept = begun.with_name("kept")
    for change, named in CHANGES:
        put_back(begun)
        change(begun / "data")
        said = str(run.run(recipe(begun), str(begun / "run")))
        assert named in said and "digest" in said and "--config.data.accept_changes=True" in said and "\n" not in said
        for name in ("tokenizer.model", "classes.txt", "metrics.jsonl"):
            assert (begun / "run" / name).read_bytes() == (kept / "run" / name).read_bytes()


def test_accepted_changes_are_trained_on_and_become_what_later_starts_compare(
    begun: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    reverse_records(begun)
    other_tokenizer(begun / "data/other.model")
    replace(begun / "data/held_out/captions.csv", "blue dot", "rude dot")  # reported, never refused
    own = (begun / "run/tokenizer.model").read_bytes()
    # One bit of a side file, and a line that a kill cut off: neither costs the others (and only the former is a fault).
    metrics = begun / "run/metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(b"".join([lines[0], b"\xff" + lines[1][1:], *lines[2:]]) + b'{"step": 4, "lo')
    other = recipe(begun)
    other.data.tokenizer = f"{begun}/data/other.model"
    advice = str(run.run(other, str(begun / "run")))  # which must work
    assert "is another vocabulary" in advice and advice.endswith("--config.data.accept_changes=True"), advice
    other.data.accept_changes = True
    assert run.run(other, str(begun / "run")) == 0
    assert (begun / "run/tokenizer.model").read_bytes() == own
    said = caplog.text
    for words in ("other.model", "shapes.array_record (digest", "held_out is not what this run has measured on"):
        assert words in said
    assert [line["step"] for line in read_lines(epath.Path(metrics)) if "loss" in line] == [1, 3, 4]
    assert (begun / "run/metrics.jsonl.unreadable-1").read_bytes().startswith(lines[0] + b"\xff")
    source = f"array_record:{begun}/data/shapes.array_record"
    saved = checkpoint.saved_place(begun / "run")["contents"]
    assert saved["train"][source] == open_source(source).contents()
    assert saved["tokenizer"] == contents.of_tokenizer(Tokenizer(begun / "run/tokenizer.model"))


def test_a_damaged_vocabulary_or_list_of_classes_is_never_taken_for_the_run_s(begun: pathlib.Path) -> None:
    own, named, listed = begun / "run/tokenizer.model", begun / "data/shapes.model", begun / "run/classes.txt"
    place = checkpoint.saved_place(begun / "run")
    assert place["contents"]["classes"] == contents.of_labels(LABELS)

    def tokenizer(place: Any = place) -> bytes:
        given = Tokenizer(named)
        return contents.own_tokenizer(epath.Path(begun / "run"), given, "NAME", place, accept=False).to_bytes()

    def labels(found: tuple[str, ...] = LABELS) -> tuple[str, ...]:
        return contents.own_labels(epath.Path(begun / "run"), "", lambda: found, place, accept=False)

    good = named.read_bytes()
    for damage in (b"rubbish", b"", good[:-20], None):  # None: another vocabulary, as a flipped bit could make it
        other_tokenizer(own) if damage is None else own.write_bytes(damage)
        assert tokenizer() == good  # what the checkpoint says decides, and the workdir's is written anew
        with pytest.raises((CheckpointError, ValueError), match=r"tokenizer\.model"):
            coca_jax.load(begun / "run")
    other_tokenizer(named)
    with pytest.raises(ConfigError, match="not the vocabulary that the run was trained with"):
        tokenizer()
    own.write_bytes(good)
    with pytest.raises(ConfigError, match="NAME is another vocabulary"):
        tokenizer()
    with pytest.raises(ConfigError, match="NAME is another vocabulary"):
        tokenizer({})  # of a version without digests, or before the first checkpoint

    for damage in (b"\xff\xfe\x00", "\n".join(reversed(LABELS)).encode()):
        listed.write_bytes(damage)
        assert labels() == LABELS
        with pytest.raises(ConfigError, match=r"classes\.txt (is damaged|has other classes)"):
            labels(LABELS[::-1])
        with pytest.raises(CheckpointError, match=r"classes\.txt"):
            coca_jax.load(begun / "run")
