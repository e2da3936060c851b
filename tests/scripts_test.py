"""`coca_jax.caption` and `coca_jax.embed` as scripts run them: real processes, files that cannot be read, a kill."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import PIL.Image
import pyarrow.parquet
import pytest
from flax import traverse_util

import coca_jax
from coca_jax import config, pictures
from coca_jax.data.alone import alone
from coca_jax.data.images import Preprocessor
from coca_jax.data.records import DataError
from coca_jax.data.tokenizer import Tokenizer
from coca_jax.interop import exported
from coca_jax.interop.weights import Weights
from coca_jax.pretrained import Pretrained
from tests import pairs, tiny

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    tokenizer = Tokenizer.train([pairs.caption(*e) for e in pairs.examples()] * 20, vocab_size=300)
    drawn = tiny.replace(tiny.MODEL, text__vocab_size=tokenizer.vocab_size)
    folder = tmp_path_factory.mktemp("model") / "model"
    exported.write(Weights(config.Config(model=drawn), tiny.parameters(drawn), tokenizer, 5), folder)
    return folder


@pytest.fixture
def photos(tmp_path: pathlib.Path) -> pathlib.Path:
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    for at, (color, shape) in enumerate(pairs.examples()[:5]):
        PIL.Image.fromarray(pairs.picture(color, shape)).save(folder / ("deep" if at % 2 else "") / f"{at}.png")
    (folder / "torn.jpg").write_bytes(b"\xff\xd8\xff nothing more")
    (folder / "notes.txt").write_text("no picture")
    return folder


def lines(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_captions_of_a_folder(
    model: pathlib.Path, photos: pathlib.Path, tmp_path: pathlib.Path, run_python: Run
) -> None:
    out = tmp_path / "out.jsonl"
    command = ["-m", "coca_jax.caption", str(photos), f"--checkpoint={model}", f"--output={out}", "--batch_size=2"]
    options = ["--method=sample", "--returns=2", "--top_p=0.9", "--length=6", "--seed=4"]
    done = run_python([*command, *options], devices=1)
    assert "5 pictures; 1 could not be read" in done.stdout
    rows = lines(out)
    assert [pathlib.Path(row["path"]).name for row in rows] == ["0.png", "2.png", "4.png", "1.png", "3.png"]
    coca = coca_jax.load(model)
    order = pictures.find([str(photos)])
    assert sorted(order) == sorted(row["path"] for row in [*rows, *lines(tmp_path / "out.jsonl.bad.jsonl")])
    for row in rows[:2]:  # the same as from Python, whatever the batch
        pixels = coca.preprocessor.pixels([row["path"]])
        made = coca.caption_pixels(
            pixels, numbers=[order.index(row["path"])], seed=4, method="sample", returns=2, top_p=0.9, length=6
        )[0]
        assert [c["text"] for c in row["captions"]] == [c.text for c in made]
        for found, wanted in zip(row["captions"], made, strict=True):
            assert found["log_prob"] == pytest.approx(wanted.log_prob, abs=1e-4)
            assert found["similarity"] == pytest.approx(wanted.similarity, abs=1e-4)
    (bad,) = lines(tmp_path / "out.jsonl.bad.jsonl")
    assert bad["path"].endswith("torn.jpg") and "torn.jpg" in bad["error"]

    # Half a line is what a kill leaves: it goes, and what is missing is made. Other batches round differently.
    content = out.read_text()
    out.write_text(content[: content.index("\n", 10) + 20])
    done = run_python([*command, *options], devices=1)
    assert "4 pictures, 1 were there already; 1 could not be read" in done.stdout
    again = lines(out)
    assert [[c["text"] for c in row["captions"]] for row in again] == [
        [c["text"] for c in row["captions"]] for row in rows
    ]
    settings = json.loads((tmp_path / "out.jsonl.settings.json").read_text())
    assert (settings["method"], settings["top_p"], settings["step"]) == ("sample", 0.9, 5)
    with pytest.raises(DataError, match=r"was begun with --method='sample', not 'greedy'"):
        pictures.keep_settings(str(out), settings | {"method": "greedy"})


def test_features_as_parquet_and_of_texts(
    model: pathlib.Path, photos: pathlib.Path, tmp_path: pathlib.Path, run_python: Run
) -> None:
    out = tmp_path / "out.parquet"
    command = ["-m", "coca_jax.embed", f"--checkpoint={model}"]
    done = run_python([*command, str(photos), f"--output={out}", "--batch_size=3"], devices=1)
    assert "5 pictures; 1 could not be read" in done.stdout
    table = pyarrow.parquet.read_table(out)
    paths, features = table["path"].to_pylist(), np.array(table["feature"].to_pylist(), np.float32)
    coca = coca_jax.load(model)
    np.testing.assert_allclose(features, coca.encode_image(paths), atol=1e-5)
    assert sorted(p.name for p in out.iterdir()) == ["part-00000.parquet", "part-00001.parquet"]
    (out / "part-00001.parquet").unlink()
    done = run_python([*command, str(photos), f"--output={out}", "--batch_size=3"], devices=1)
    again = pyarrow.parquet.read_table(out)
    assert again["path"].to_pylist() == paths

    texts = tmp_path / "texts.txt"
    texts.write_text("a red dot\n\na blue\u2028cross\r\na red dot\n", encoding="utf-8")
    done = run_python([*command, f"--texts={texts}", f"--output={tmp_path}/texts.jsonl"], devices=1)
    rows = lines(tmp_path / "texts.jsonl")
    assert [row["text"] for row in rows] == ["a red dot", "a blue\u2028cross"]
    features = np.array([row["feature"] for row in rows])
    np.testing.assert_allclose(features, coca.encode_text([row["text"] for row in rows]), atol=1e-5)


@pytest.mark.slow
def test_a_killed_run_goes_on(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder, out = tmp_path / "many", tmp_path / "out.jsonl"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for at in range(400):
        PIL.Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{at:03}.png")
    command = [sys.executable, "-m", "coca_jax.caption", str(folder), f"--checkpoint={model}", f"--output={out}"]
    command += ["--batch_size=2", "--length=6"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out.exists() and out.stat().st_size > 2000):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = len(lines(out)) if out.read_text().endswith("\n") else len(out.read_text().splitlines()) - 1
    assert 0 < before < 400
    subprocess.run(
        command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=200
    )
    rows = lines(out)
    assert [pathlib.Path(row["path"]).name for row in rows] == [f"{at:03}.png" for at in range(400)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x.png"], "--checkpoint=PATH is needed"),
        pytest.param(
            ["--checkpoint={m}", "--output=o.jsonl"], "name pictures or folders of pictures", marks=pytest.mark.slow
        ),
        (["{m}/none.png", "--checkpoint={m}", "--output={t}/o.jsonl"], "none.png: no such file or folder"),
        pytest.param(["{m}", "--checkpoint={m}", "--output={t}/o.jsonl"], "no picture in it", marks=pytest.mark.slow),
        pytest.param(
            ["{m}", "--checkpoint={m}", "--output={t}/o.csv"], "must end in .jsonl or .parquet", marks=pytest.mark.slow
        ),
        pytest.param(
            ["{p}", "--checkpoint={t}/none", "--output={t}/o.jsonl"],
            "none: no such file or directory",
            marks=pytest.mark.slow,
        ),
        (["{p}", "--checkpoint={m}", "--output={t}/o.jsonl", "--returns=3"], "greedy gives one"),
    ],
)
def test_wrong_arguments_get_one_line(
    model: pathlib.Path, tmp_path: pathlib.Path, run_python: Run, arguments: list[str], message: str
) -> None:
    picture = tmp_path / "p.png"
    PIL.Image.fromarray(pairs.picture("red", "dot")).save(picture)
    command = [argument.format(m=model, t=tmp_path, p=picture) for argument in arguments]
    done = run_python(["-m", "coca_jax.caption", *command], devices=1, check=False)
    assert done.returncode == 1 and message in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["p.png"]


def row(pixels: np.ndarray, numbers: list[int]) -> list[dict[str, Any]]:
    return [{"mean": float(x.mean()), "number": n} for x, n in zip(pixels, numbers, strict=True)]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_odd_names_and_loops_of_links(photos: pathlib.Path, tmp_path: pathlib.Path, kind: str) -> None:
    """A name that is not UTF-8 is a bad file and not the end; a link to a folder above is not followed."""
    name = os.fsdecode(os.fsencode(str(photos)) + b"/\xff.png")
    PIL.Image.fromarray(pairs.picture("red", "dot")).save(photos / "ä \n'.png")
    os.link(photos / "ä \n'.png", name)
    (photos / "deep" / "up").symlink_to(photos)
    paths = pictures.find([str(photos)])
    assert len(paths) == 8 and name in paths
    out = str(tmp_path / f"o.{kind}")
    preprocessor = Preprocessor(16)
    said = pictures.run(paths, preprocessor, row, out, batch_size=3, description="")
    assert said == f"6 pictures; 2 could not be read, see {out}.bad.jsonl: {out}"
    bad = lines(tmp_path / f"o.{kind}.bad.jsonl")
    assert {pathlib.Path(b["path"]).name for b in bad} == {"torn.jpg", "\udcff.png"}
    assert any("the name is not UTF-8: rename the file" in b["error"] for b in bad)
    assert f"{photos}/ä \n'.png" in pictures.open_rows(out).done()
    said = pictures.run(paths, preprocessor, row, out, batch_size=3, description="")
    assert said == f"0 pictures, 6 were there already; 2 could not be read, see {out}.bad.jsonl: {out}"
    # They are tried again where the list is removed: the one that was mended is done.
    (tmp_path / f"o.{kind}.bad.jsonl").unlink()
    PIL.Image.fromarray(pairs.picture("red", "dot")).save(photos / "torn.jpg")
    assert "1 pictures, 6 were there already; 1 could not be read" in pictures.run(
        paths, preprocessor, row, out, batch_size=3, description=""
    )


@pytest.mark.parametrize("name", ["part-00000-1b2c.snappy.parquet", "part-.parquet", "part-²3.parquet"])
def test_parts_of_another_writer_are_named(tmp_path: pathlib.Path, name: str) -> None:
    (tmp_path / "o.parquet").mkdir()
    (tmp_path / "o.parquet" / name).write_bytes(b"PAR1")
    with pytest.raises(DataError, match=rf"{re.escape(name)} was not written here: name another --output"):
        pictures.open_rows(str(tmp_path / "o.parquet"))


def test_damaged_results_are_named(photos: pathlib.Path, tmp_path: pathlib.Path) -> None:
    out = tmp_path / "o.parquet"
    pictures.keep_settings(str(out), {"seed": 1})
    pictures.run(pictures.find([str(photos)]), Preprocessor(16), row, str(out), batch_size=2, description="")
    part = out / "part-00001.parquet"
    part.write_bytes(part.read_bytes()[:50])
    with pytest.raises(DataError, match=r"part-00001\.parquet is damaged, or not .*: remove it to compute it again"):
        pictures.open_rows(str(out)).done()
    part.unlink()
    assert len(pictures.open_rows(str(out)).done()) == 3
    settings = tmp_path / "o.parquet.settings.json"
    settings.write_text('{"seed')
    with pytest.raises(DataError, match=r"settings\.json is damaged .*remove it if"):
        pictures.keep_settings(str(out), {"seed": 1})


def test_what_another_model_at_the_same_path_and_step_has_begun_is_refused(
    model: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    coca = coca_jax.load(model)
    assert coca.digest() == coca_jax.load(model).digest()
    flat = traverse_util.flatten_dict(coca.params, sep="/")
    path = "image_encoder/blocks/mlp/down/kernel"
    flat[path] = flat[path].copy()
    flat[path][-1, -1, -1] += 1  # one value of all
    changed = traverse_util.unflatten_dict(flat, sep="/")
    weights = Weights(coca.config, coca.params, coca.tokenizer, coca.step)
    others = [dataclasses.replace(weights, params=changed)]
    others += [dataclasses.replace(weights, config=tiny.replace(coca.config, data__mean=(0.4, 0.5, 0.5)))]
    others += [dataclasses.replace(weights, tokenizer=None)]
    out = str(tmp_path / "out.jsonl")
    settings: dict[str, Any] = {"checkpoint": "m", "step": 5}
    pictures.keep_settings(out, settings)  # as a version wrote it that kept no digest
    pictures.open_rows(out).add([{"path": "a", "feature": [1.0]}])
    pictures.keep_settings(out, settings | {"model": coca.digest()})
    for other in map(Pretrained, others):
        with pytest.raises(DataError, match="was begun with another model than --checkpoint=m is now: remove"):
            pictures.keep_settings(out, settings | {"model": other.digest()})
    pictures.keep_settings(out, settings | {"model": coca.digest()})


def test_features_of_two_models_are_not_mixed(
    model: pathlib.Path, photos: pathlib.Path, tmp_path: pathlib.Path, run_python: Run
) -> None:
    coca = coca_jax.load(model)
    other = jax.tree.map(lambda x: 1.5 * x, coca.params)
    place, out = tmp_path / "m", tmp_path / "out.jsonl"
    arguments = ["-m", "coca_jax.embed", str(photos / "0.png"), f"--checkpoint={place}", f"--output={out}"]
    for params, said in ((coca.params, "1 pictures: "), (other, "another model than --checkpoint=")):
        exported.write(Weights(coca.config, params, coca.tokenizer, coca.step), place, overwrite=True)
        done = run_python(arguments, devices=1, check=False)
        assert said in done.stdout + done.stderr
    assert len(lines(out)) == 1


def test_a_file_of_something_else_is_not_written_into(tmp_path: pathlib.Path) -> None:
    (tmp_path / "o.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(DataError, match="not what was written here"):
        pictures.open_rows(str(tmp_path / "o.jsonl")).done()


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_second_process_is_refused_and_does_no_harm(
    model: pathlib.Path, photos: pathlib.Path, tmp_path: pathlib.Path, run_python: Run, kind: str
) -> None:
    out, coca = str(tmp_path / f"o.{kind}"), coca_jax.load(model)
    command = ["-m", "coca_jax.embed", str(photos), f"--checkpoint={model}", f"--output={out}"]
    with pictures.begun(out, str(model), coca, texts=""):
        pictures.open_rows(out).add([{"path": "a", "feature": coca.encode_text("a")[0].tolist()}])
        half = tmp_path / ("o.jsonl" if kind == "jsonl" else "o.parquet/part-00001.partial")  # that is being written
        with half.open("ab") as file:
            file.write(b"half")
        before = half.read_bytes()
        done = run_python(command, devices=1, check=False)
        assert done.returncode == 1 and f"error: {out}: another process is writing there" in done.stderr
        assert half.read_bytes() == before
    assert "5 pictures; 1 could not be read" in run_python(command, devices=1).stdout  # what was half-written is gone
    assert len(pictures.open_rows(out).done()) == 6 and not list(tmp_path.glob("*.lock"))


def test_a_lock_is_held_to_the_end_and_by_one(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "lock"
    with pytest.raises(KeyError), alone(lock, ""):
        raise KeyError
    with alone(lock, "the first"):
        for _ in range(2):  # the refused one takes nothing away
            with pytest.raises(DataError, match="busy"), alone(lock, "busy"):
                pass
    assert not lock.exists()

    def locks(file: Any, _: int) -> None:
        lock.unlink()  # by one that has just ended

    monkeypatch.setattr("fcntl.flock", locks)
    with pytest.raises(DataError, match="busy"), alone(lock, "busy"):
        pass
    monkeypatch.setattr("fcntl.flock", lambda file, _: (_ for _ in ()).throw(OSError(37, "No locks available")))
    with alone(lock, "busy"):
        pass
