"""The answers behind the page, without gradio: labels, views, the index of a folder, and text that is shown as text."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import PIL.Image
import pytest

from coca_jax import config, pictures
from coca_jax.data.records import DataError
from coca_jax.data.tokenizer import Tokenizer
from coca_jax.demo import answers, page
from coca_jax.demo.answers import Answers, Index, Seen
from coca_jax.interop.weights import Weights
from coca_jax.pretrained import Pretrained
from tests import pairs, tiny


@pytest.fixture(scope="module")
def coca() -> Pretrained:
    tokenizer = Tokenizer.train([pairs.caption(*e) for e in pairs.examples()] * 20, vocab_size=300)
    model = tiny.replace(tiny.MODEL, text__vocab_size=tokenizer.vocab_size)
    return Pretrained(Weights(config.Config(model=model), tiny.parameters(model), tokenizer, 5))


@pytest.fixture
def photos(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    for at, (color, shape) in enumerate(pairs.examples()[:6]):
        place = tmp_path / "photos" / ("deep" if at % 2 else "")
        PIL.Image.fromarray(pairs.picture(color, shape)).save(place / f"{color} {shape}.png")
    (tmp_path / "photos" / "torn.jpg").write_bytes(b"\xff\xd8\xff nothing more")
    return tmp_path / "photos"


def test_a_picture_is_seen_and_its_brightest_patch_is_where_the_weights_say(coca: Pretrained) -> None:
    encoded = pairs.png(pairs.picture("blue", "cross", side=64))
    seen, views = Answers(coca).see(encoded)
    np.testing.assert_array_equal(seen.pixels, coca.preprocessor.pixels([encoded])[0])
    np.testing.assert_allclose(seen.feature, coca.encode_image([encoded])[0], atol=1e-6)
    titles = [title.split(":")[0] for _, title in views]
    assert titles[:3] == [
        "what the model sees",
        "where its feature is from",
        "what captions are read from, mean of 4 queries",
    ]
    assert titles[3:] == [f"query {q}" for q in range(4)]  # all that it has
    weights = coca.attention_pixels(seen.pixels[None], pooler="contrastive")[0, 0]
    (shown, _), (lit, title) = views[0], views[1]
    row, column = np.unravel_index(weights.argmax(), weights.shape)
    side = len(shown) // len(weights)
    patch = np.s_[row * side : (row + 1) * side, column * side : (column + 1) * side]
    np.testing.assert_array_equal(lit[patch], shown[patch])
    assert f"brightest patch {100 * weights.max():.1f}%" in title and "each 6.2%" in title
    white = answers.lit(np.full((8, 8, 3), 200, np.uint8), np.array([[0.0, 0.5], [1.0, 0.2]]))
    np.testing.assert_array_equal(white[::4, ::4, 0], [[30, 115], [200, 64]])  # from 15% to all of it


def test_labels_are_the_loss_of_the_model_over_the_words(coca: Pretrained) -> None:
    behind = Answers(coca)
    words = ["a red dot", "a blue cross", "a black bar on top"]
    seen = Seen(np.zeros((16, 16, 3), np.uint8), coca.encode_image([pairs.picture("red", "dot")])[0])
    found = behind.labels(seen, " a red dot,a blue cross;\n\na black bar on top, a red dot ,")
    cosine = coca.encode_text(words) @ seen.feature
    order = np.argsort(-cosine)
    assert [x.word for x in found] == [words[at] for at in order]
    np.testing.assert_allclose([x.cosine for x in found], cosine[order], atol=1e-6)
    logits = np.exp(coca.params["logit_scale"]) * cosine[order]
    np.testing.assert_allclose([x.probability for x in found], np.exp(logits) / np.exp(logits).sum(), rtol=1e-4)

    sigmoid = Pretrained(
        Weights(
            config.Config(model=coca.config.model, loss=config.Loss(contrastive="sigmoid")),
            {**coca.params, "logit_bias": np.float32(-2.0)}, coca.tokenizer, 5,
        )
    )  # fmt: skip
    each = Answers(sigmoid)._probability(cosine)
    np.testing.assert_allclose(each, 1 / (1 + np.exp(2.0 - np.exp(coca.params["logit_scale"]) * cosine)), rtol=1e-5)

    again = behind.labels(seen, "a red dot,a blue cross,a black  bar on top,a\u00a0red dot,a black bar on top")
    assert [x.word for x in again] == [x.word.replace("black bar", "black  bar") for x in found]
    np.testing.assert_allclose([x.probability for x in again], [x.probability for x in found], rtol=1e-5)

    prompted = behind.labels(seen, "red dot, blue cross", "a {} | the {}")
    mean = coca.encode_text(["a red dot", "the red dot", *words])[:2].mean(axis=0)
    wanted = mean @ seen.feature / np.linalg.norm(mean)
    assert next(x.cosine for x in prompted if x.word == "red dot") == pytest.approx(wanted, abs=1e-5)

    for given, prompts, message in (
        (" , ;\n", "{}", "no words to choose from"),
        ("dot", "a dot", "has no place for the name"),
        ("dot", " | ", "needs classes and prompts"),
        (",".join(map(str, range(201))), "imagenet", "201 words in 80 prompts are more than 16000"),
    ):
        with pytest.raises(ValueError, match=message):
            behind.labels(seen, given, prompts)
    with pytest.raises(ValueError, match="lambda_con=0 and compares no words"):
        behind.labels(Seen(seen.pixels, None), "dot")
    for method, count in (("beam", 9), ("beam", 0), ("best", 1)):
        with pytest.raises(ValueError, match="1 to 8 by one of beam, sample, greedy"):
            behind.captions(seen, method, count)


def test_an_index_is_made_completed_and_searched(
    coca: Pretrained, photos: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    output = str(tmp_path / "index.jsonl")
    index, done = answers.open_index(output, coca, "runs/a", str(photos))
    assert done == f"6 pictures; 1 could not be read, see {output}.bad.jsonl: {output}"
    np.testing.assert_allclose(index.features, coca.encode_image(list(index.paths)), atol=1e-5)
    behind = Answers(coca, index)
    scores = index.features @ coca.encode_text("a red dot")[0]
    best = [pathlib.Path(index.paths[at]).name for at in np.argsort(-scores)[:3]]
    found, unread = behind.nearest(" a red dot ", 3)
    assert [title for _, title in found] == [
        f"{score:.3f}  {file}" for score, file in zip(np.sort(scores)[::-1], best, strict=False)
    ]
    assert not unread and found[0][0].shape == (336, 336, 3)

    # A picture that is gone is said; one that is new is added by the next start; others are out of reach.
    next(photos.rglob(best[0])).unlink()
    found, unread = behind.nearest("a red dot", 2)
    assert len(found) == 1 and len(unread) == 1 and "no such picture" in unread[0]
    PIL.Image.fromarray(pairs.picture("black", "dot")).save(photos / "deep" / "new.png")
    again, done = answers.open_index(output, coca, "runs/a", str(photos / "deep"))
    assert done.startswith("1 pictures") and all("/deep/" in path for path in again.paths)
    assert any(path.endswith("new.png") for path in again.paths)
    assert len(answers.open_index(output, coca, "runs/a")[0].paths) == 7
    with pytest.raises(DataError, match="was begun with --checkpoint='runs/a', not 'runs/b'"):
        answers.open_index(output, coca, "runs/b")

    # The other form, of two parts, says the same.
    parquet = pictures.open_rows(str(tmp_path / "index.parquet"))
    rows = pictures.as_rows(index.features, "index.parquet")
    for part in (slice(0, 4), slice(4, None)):
        parquet.add([{"path": path} | row for path, row in zip(index.paths[part], rows[part], strict=True)])
    paths, features = parquet.features()
    assert paths == list(index.paths)
    np.testing.assert_array_equal(features, index.features)
    pictures.open_rows(str(tmp_path / "other.parquet")).add([{"path": "a.png", "caption": "a dot"}])
    with pytest.raises(DataError, match=r"part-00000\.parquet is damaged, or not what was written here"):
        pictures.open_rows(str(tmp_path / "other.parquet")).features()


def test_an_index_that_cannot_be_used_is_said(coca: Pretrained, photos: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        answers.open_index(str(tmp_path / "i.jsonl"), coca, "a", str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"no such index; --pictures=FOLDER makes it"):
        answers.open_index(str(tmp_path / "i.jsonl"), coca, "a")
    with pytest.raises(DataError, match=r"must end in \.jsonl or \.parquet"):
        answers.open_index(str(tmp_path / "i.csv"), coca, "a")
    torn = tmp_path / "torn"
    torn.mkdir()
    (photos / "torn.jpg").rename(torn / "torn.jpg")
    with pytest.raises(DataError, match="none of its pictures could be read"):
        answers.open_index(str(tmp_path / "i.jsonl"), coca, "a", str(torn))
    with pytest.raises(DataError, match="features of 3 values, and this model's have 8"):
        Answers(coca, Index(["a.png"], np.zeros((1, 3), np.float32)))
    bad: list[list[dict[str, Any]]] = [
        [{"path": "a"}],
        [{"path": "a", "feature": [1, 2]}, {"path": "b", "feature": [1]}],
        [{"path": "a", "feature": "x"}],
        [{"path": "a", "feature": [1, float("nan")]}],
    ]
    for at, rows in enumerate(bad):
        file = tmp_path / f"{at}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(DataError, match=f"{at}.jsonl(.*not what was written| has (no )?features)"):
            pictures.open_rows(str(file)).features()


def test_what_is_not_ours_is_shown_as_text_and_what_fails_as_a_line(coca: Pretrained, tmp_path: pathlib.Path) -> None:
    evil = '<img src=http://example.com/x onerror="alert(1)"> ${1+1} {{2}}'
    assert "<img" not in page.said(evil) + page.table([evil], [[evil]])
    behind = page.Page(Answers(coca))
    assert "drop one" in behind.captions(None, "beam", 3, "") and "drop one" in behind.labels(None, "a", "{}")
    text = tmp_path / "notes <b>.jpg"
    text.write_text("no picture\n")
    no = behind.picture(str(text), "beam", 3, "", "", "{}")
    assert "notes &lt;b&gt;.jpg: 11 bytes that are not a readable picture" in no[1]
    assert 'role="alert"' in no[1] and no[2] is None and no[3] == []
    assert "no picture was given" in behind.picture(None, "beam", 3, "", "", "{}")[1]
    assert "start with --pictures=FOLDER" in behind.find("dot", 3)[0]
    indexed: Any = page.Page(Answers(coca, Index(["a.png"], np.zeros((1, 8), np.float32))))
    assert "no text to look for" in indexed.find("  ", 3)[0]
    assert "1 to 48 can be shown" in indexed.find("dot", 1e9)[0]


def test_a_port_in_use_and_a_host_that_is_not_there_are_said() -> None:
    with page.listen("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(DataError, match=rf"--host=127.0.0.1 --port={port}: Address already in use"):
            page.listen("127.0.0.1", port)
    with pytest.raises(DataError, match=r"--host=192\.0\.2\.1 --port=0: Cannot assign requested address"):
        page.listen("192.0.2.1", 0)
