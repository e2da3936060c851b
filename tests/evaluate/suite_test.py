from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import re
import threading
from typing import Any

import numpy as np
import pytest
from etils import epath

from coca_jax.config import ConfigError
from coca_jax.data.records import DataError
from coca_jax.evaluate import asked, pixels, retrieval, splits, suite, tables
from coca_jax.evaluate.pieces import Pieces
from tests.evaluate.shapes import COLORS, LENGTH, SIZE, World, unit

WIDTH = 24
SPLIT = {f"r{k}" for k in retrieval.KS} | {"median_rank"}


def contrastive(world: World, noise: float = 0.0):
    """An image encoder that looks at colour and shape, and a text encoder that reads them: their features agree."""
    words = [*COLORS, "square", "circle", "bar"]
    table = np.random.default_rng(0).normal(size=(len(words), WIDTH))
    palette = np.array(list(COLORS.values()), float)

    def encode_image(images):
        rows = []
        for image in images:
            color = int(np.argmin(((palette - image[SIZE // 2, SIZE // 2]) ** 2).sum(1)))
            ink = ((image.astype(int) - 255) ** 2).sum(2) > ((image.astype(int) - palette[color]) ** 2).sum(2)
            y, x = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
            full = ink.sum() > 0.9 * len(y) * len(x)
            shape = words.index("bar" if len(y) < 0.6 * len(x) else "square" if full else "circle")
            rng = np.random.default_rng(int(image.sum()))
            rows.append(table[color] + table[shape] + noise * rng.normal(size=WIDTH))
        return unit(np.stack(rows))

    def encode_text(tokens):
        rows = []
        for row in tokens:
            text = world.tokenizer.decode(row).replace(",", " ").split()
            rows.append(sum((table[words.index(word)] for word in text if word in words), np.full(WIDTH, 1e-3)))
        return unit(np.stack(rows))

    return encode_image, encode_text


def generative(world: World):
    def caption_loss(images, tokens):
        count = (tokens[:, 1:] != world.tokenizer.pad_id).sum(1)
        return count * (1 + images.mean((1, 2, 3)) / 255), count

    def generate(images):
        return world.tokenizer.encode_batch(["red square"] * len(images), LENGTH)

    return caption_loss, generate


def whole(world: World, noise: float = 0.0) -> suite.Functions:
    return suite.Functions(*contrastive(world, noise), *generative(world))


def scored(world: World, noise: float = 0.0) -> suite.Functions:
    """Texts that fit a picture are likelier, and short ones likelier than long ones."""
    encode_image, encode_text = contrastive(world, noise)

    def log_probs(images, tokens):
        length = (tokens != world.tokenizer.pad_id).sum(1)
        return 10 * encode_image(images) @ encode_text(tokens).T - 3.0 * length[None, :]

    return dataclasses.replace(whole(world, noise), log_probs=log_probs)


def run(world: World, functions: suite.Functions, **changes: Any) -> suite.Results:
    settings: dict[str, Any] = {"reference": world.reference, "progress": False} | changes
    return suite.run(functions, world.sources, world.tokenizer, world.config, world.batches, **settings)


def test_metrics_have_their_names_and_are_plain_numbers(world):
    metrics = run(world, whole(world)).metrics
    ways = ("image_to_text", "text_to_image")
    expected = {"seen/caption_exact_match"} | {f"zero_shot/{name}" for name in ("classes", "images", "largest_class")}
    expected |= {"zero_shot/classes_without_images", "zero_shot/same_classes"}
    expected |= {f"zero_shot/{name}" for name in ("top1", "top5", "mean_per_class", "chance/top1", "chance/top5")}
    for name in ("seen", "new"):
        groups = [*ways, "chance", *(f"pixel/{way}" for way in ways)]
        expected |= {f"{name}/{group}/{key}" for group in groups for key in SPLIT}
        expected |= {f"{name}/{key}" for key in ("images", "texts", "same_texts", "caption_loss", "perplexity")}
    assert set(metrics) == expected
    assert all(type(value) is float for value in metrics.values())
    assert json.loads(json.dumps(metrics)) == metrics


def test_a_model_that_sees_scores_full_marks(world):
    metrics = run(world, whole(world)).metrics
    for name in ("seen", "new"):
        for way in ("image_to_text", "text_to_image"):
            assert metrics[f"{name}/{way}/r1"] == 1, (name, way)
    # Three classes of shapes; the black pictures have no label and are left out.
    assert (metrics["zero_shot/top1"], metrics["zero_shot/classes"], metrics["zero_shot/images"]) == (1, 3, 15)
    assert metrics["zero_shot/chance/top1"] == pytest.approx(1 / 3)
    assert metrics["seen/texts"] == 24  # 18 pictures, the 6 bars with a second caption


def test_figures_equal_those_of_the_definition(world):
    """A noisy model, measured again here pair by pair from the records."""
    encode_image, encode_text = contrastive(world, noise=3.0)
    caption_loss, generate = generative(world)
    metrics = run(world, suite.Functions(encode_image, encode_text, caption_loss, generate)).metrics
    source = world.sources[world.config.evaluate.splits[0]]
    captions = [source[i].captions for i in range(len(source))]
    texts = sorted({text for its in captions for text in its})
    (batch,) = list(world.with_evaluate(batch_size=18).batches(source))
    image = encode_image(batch["images"]).astype(np.float64)
    text = encode_text(world.tokenizer.encode_batch(texts, LENGTH)).astype(np.float64)
    scores = image @ text.T
    ranks = []
    for i, its in enumerate(captions):
        right = [texts.index(c) for c in its]
        best = scores[i, right].max()
        ranks.append(1 + sum(scores[i, j] >= best - 1e-12 for j in range(len(texts)) if j not in right))
    assert 0 < metrics["seen/image_to_text/r1"] < 1  # the noise does its work
    assert metrics["seen/image_to_text/r1"] == pytest.approx(np.mean(np.array(ranks) == 1))
    assert metrics["seen/image_to_text/median_rank"] == np.median(ranks)
    nll, count = caption_loss(batch["images"], batch["tokens"])
    assert metrics["seen/caption_loss"] == pytest.approx(nll.sum() / count.sum())
    assert metrics["seen/perplexity"] == pytest.approx(np.exp(nll.sum() / count.sum()))


@pytest.mark.parametrize("size", [4, 18, 32])
def test_batch_size_changes_nothing(world, size):
    base = run(world, whole(world, noise=3.0)).metrics
    other = run(world.with_evaluate(batch_size=size), whole(world, noise=3.0)).metrics
    assert other == pytest.approx(base)


def test_absent_halves_are_absent(world):
    functions = whole(world)
    captioner = run(world, dataclasses.replace(functions, encode_image=None, encode_text=None))
    assert {name.split("/")[1] for name in captioner.metrics} == {"caption_loss", "perplexity", "caption_exact_match"}
    assert captioner.captions and not captioner.queries
    unclassified = run(world.with_evaluate(zero_shot=""), functions)
    assert not any(name.startswith("zero_shot") for name in unclassified.metrics) and not unclassified.classes
    clip = run(world, dataclasses.replace(functions, caption_loss=None, generate=None))
    assert not any("caption" in name or "perplexity" in name for name in clip.metrics)
    assert clip.queries and not clip.captions
    assert clip.metrics["seen/image_to_text/r1"] == 1


def test_captions_and_classes_by_likelihood(world):
    """Every figure again from the records, one pair at a time."""
    functions = scored(world, noise=2.0)
    assert functions.log_probs is not None
    found = run(world.with_evaluate(likelihood=100), functions)
    source = world.sources[world.config.evaluate.splits[0]]
    (batch,) = list(world.with_evaluate(batch_size=18).batches(source))
    captions = [source[i].captions for i in range(len(source))]
    texts = list(dict.fromkeys(text for its in captions for text in its))
    matrix = functions.log_probs(batch["images"], world.tokenizer.encode_batch(texts, LENGTH)).astype(np.float64)
    likely = matrix - np.log(np.exp(matrix - matrix.max()).mean(0))[None, :]
    own = [matrix[i, texts.index(text)] for i, its in enumerate(captions) for text in its]
    assert found.metrics["seen/likelihood/log_prob"] == pytest.approx(np.mean(own), rel=1e-5)
    right = [[texts.index(text) for text in its] for its in captions]
    for name, scores in (("image_to_text", matrix), ("image_to_text_pmi", likely)):
        hits = [scores[i].argmax() in its for i, its in enumerate(right)]
        assert found.metrics[f"seen/likelihood/{name}/r1"] == pytest.approx(np.mean(hits))
    hits = [j in right[int(matrix[:, j].argmax())] for j in range(len(texts))]
    assert found.metrics["seen/likelihood/text_to_image/r1"] == pytest.approx(np.mean(hits))
    # Classes: of "a {}", the first of the prompts.
    labels = [source[i].label for i in range(len(source))]
    known = [i for i, label in enumerate(labels) if label]
    classes = sorted({labels[i] for i in known})
    prompts = world.tokenizer.encode_batch([f"a {name}" for name in classes], LENGTH)
    scores = functions.log_probs(batch["images"], prompts)[known]
    hits = [classes[int(row.argmax())] == labels[i] for row, i in zip(scores, known, strict=True)]
    assert found.metrics["zero_shot/likelihood/top1"] == pytest.approx(np.mean(hits))
    less = np.asarray(scores, np.float64)
    less = less - np.log(np.exp(less - less.max()).mean(0))[None, :]
    hits = [classes[int(row.argmax())] == labels[i] for row, i in zip(less, known, strict=True)]
    assert found.metrics["zero_shot/likelihood_pmi/top1"] == pytest.approx(np.mean(hits))
    assert found.metrics["zero_shot/likelihood_contrastive/top1"] == found.metrics["zero_shot/top1"]
    assert found.metrics["zero_shot/likelihood/images"] == len(known)
    some = run(world.with_evaluate(likelihood=6), functions).metrics
    assert some["seen/likelihood/images"] == some["zero_shot/likelihood/images"] == 6
    # A captioner has no other way to classify.
    alone = dataclasses.replace(functions, encode_image=None, encode_text=None)
    captioner = run(world.with_evaluate(likelihood=100), alone).metrics
    same = {key: value for key, value in found.metrics.items() if "likelihood" in key and "contrastive" not in key}
    assert same == {key: value for key, value in captioner.items() if "likelihood" in key}
    lines = "\n".join(tables.summary(world.config, captioner | {"zero_shot/images": 15.0}))
    assert "caption likelihood" in lines and "contrastive" not in lines
    top1 = captioner["zero_shot/likelihood/top1"]
    assert f"log P(prompt | image): top-1 {top1:.4f}, top-5 1.0000, mean of classes" in lines


def test_each_class_has_its_accuracy(world):
    found = run(world, whole(world, noise=3.0))
    assert [one.label for one in found.classes] == ["bar", "circle", "square"]
    assert sum(one.pictures for one in found.classes) == found.metrics["zero_shot/images"]
    right = sum(one.top1 * one.pictures for one in found.classes)
    assert right / found.metrics["zero_shot/images"] == pytest.approx(found.metrics["zero_shot/top1"])
    assert np.mean([one.top1 for one in found.classes]) == pytest.approx(found.metrics["zero_shot/mean_per_class"])
    assert len({one.top1 for one in found.classes}) > 1  # they do differ
    shown = [query for query in found.queries if query.split == "zero_shot"]
    assert len(shown) == 15 and {query.text for query in shown} == {"bar", "circle", "square"}
    for query in shown:
        assert (query.rank == 1) == query.answers[0].right and query.picture
    share = np.mean([query.rank == 1 for query in shown])
    assert share == pytest.approx(found.metrics["zero_shot/top1"])


@pytest.mark.parametrize("after", [1, 3, 7])
def test_an_evaluation_that_was_killed_goes_on_inside_a_source(world, tmp_path, monkeypatch, after):
    """Killed in its n-th call of the model, it computes none of the pieces again that it had."""
    monkeypatch.setattr(splits, "_PIECE", 1)
    world = world.with_evaluate(likelihood=10, score_captions=True, batch_size=4)
    whole_of_it, calls, limit = run(world, scored(world, noise=2.0)), list[str](), [after * 4]

    def counted(functions):
        def count(name, function):
            def call(*arrays):
                if len(calls) == limit[0]:
                    raise KeyboardInterrupt
                calls.append(name)
                return function(*arrays)

            return call

        fields = ("encode_image", "encode_text", "caption_loss", "generate", "log_probs")
        return dataclasses.replace(functions, **{f: count(f, getattr(functions, f)) for f in fields})

    def evaluate():
        begun = Pieces(epath.Path(tmp_path) / "pieces", "this")
        spec = world.config.evaluate.splits[0]
        one = world.with_evaluate(splits=(spec,), zero_shot=spec)
        return run(one, counted(scored(world, noise=2.0)), pieces=begun, reference=None), begun

    with pytest.raises(KeyboardInterrupt):
        evaluate()
    before = len(calls)
    limit[0] = 10**6
    results, begun = evaluate()
    first = calls[before:]
    assert begun.kept >= after
    alone = [name for name in whole_of_it.metrics if name.startswith(("seen/", "zero_shot/")) and "/pixel/" not in name]
    assert {name: results.metrics[name] for name in alone} == {name: whole_of_it.metrics[name] for name in alone}
    assert results.captions == whole_of_it.captions and results.classes == whole_of_it.classes
    calls.clear()
    for path in (tmp_path / "pieces").iterdir():
        path.unlink()
    evaluate()
    assert len(first) < len(calls)


def test_gallery_shows_what_was_ranked(world):
    results = run(world, whole(world))
    source = world.sources[world.config.evaluate.splits[0]]
    pictures = {source[i].image: source[i].captions for i in range(len(source))}
    seen = [query for query in results.queries if query.split == "seen"]
    assert [query.direction for query in seen].count("image_to_text") == suite.GALLERY == len(seen) // 2
    for query in seen:
        assert len(query.answers) == suite.SHOWN and query.answers[0].right and query.rank == 1
        for answer in query.answers:
            if query.direction == "image_to_text":
                assert answer.right == (answer.text in pictures[query.picture])
            else:
                assert answer.right == (query.text in pictures[answer.picture])
    assert len({query.picture for query in seen}) > suite.GALLERY // 2  # different ones


def test_captions_stand_under_their_pictures(world):
    results = run(world, whole(world))
    assert len(results.captions) == 5 == len({caption.picture for caption in results.captions})
    source = world.sources[world.config.evaluate.splits[0]]
    references = {source[i].image: source[i].captions for i in range(len(source))}
    for caption in results.captions:
        assert caption.text == "red square" and caption.references == references[caption.picture]
        assert caption.exact == ("red square" in caption.references)
    share = np.mean([caption.exact for caption in results.captions])
    assert results.metrics["seen/caption_exact_match"] == share
    everything = run(world.with_evaluate(captions=100), whole(world))
    assert len(everything.captions) == len(source)
    assert sum(caption.exact for caption in everything.captions) == 1


def test_pixel_baseline_finds_seen_colours_and_misses_the_new(world):
    metrics = run(world, whole(world)).metrics
    assert metrics["new/pixel/image_to_text/r10"] == metrics["new/pixel/text_to_image/r10"] == 0  # purple: no reference
    assert 0.5 < metrics["seen/pixel/image_to_text/r1"] <= 15 / 18
    assert run(world, whole(world), reference_style="round").metrics == metrics
    with pytest.raises(ValueError, match=r"reference_style='oil': the styles of array_record:.*train.* are round"):
        run(world, whole(world), reference_style="oil")


def test_pixel_baseline_is_left_out_where_it_would_be_slow(world, monkeypatch):
    def baselines(**changes):
        metrics = run(world, whole(world), **changes).metrics
        return {name.split("/")[0] for name in metrics if "/pixel/" in name}

    assert baselines() == {"seen", "new"}
    assert baselines(reference=None) == set()
    monkeypatch.setattr(pixels, "LIMIT", 15)  # as many as the training source has; seen has 18
    assert baselines() == {"new"}
    monkeypatch.setattr(pixels, "LIMIT", 14)
    assert baselines() == set()


def test_pixel_baseline_is_computed_once(world, tmp_path, monkeypatch):
    cache = tmp_path / "folder" / "pixels.json"
    first = run(world, whole(world), cache=cache).metrics
    calls = []
    original = retrieval.pixel_baseline

    def counted(*args):
        calls.append(1)
        return original(*args)

    monkeypatch.setattr(retrieval, "pixel_baseline", counted)
    assert run(world, whole(world), cache=cache).metrics == first
    assert not calls
    run(world, whole(world), cache=cache, reference_style="round")  # another question
    assert len(calls) == 2
    cache.write_text(cache.read_text()[:50])  # cut short: computed again, not believed
    assert run(world, whole(world), cache=cache).metrics == first
    assert len(calls) == 4
    assert set(json.loads(cache.read_text())) and pixels.baselines({}, world.reference, cache=cache) == {}


def test_processes_share_the_work(world):
    """Two of them, here as threads: each finds what one finds alone, and the first shows it."""
    meeting, said = threading.Barrier(2, timeout=60), ["", ""]
    baselines = []

    def process(index: int) -> suite.Results:
        def gather(value: Any) -> list[Any]:
            said[index] = json.dumps(value)
            meeting.wait()
            everyone = [json.loads(text) for text in said]
            meeting.wait()
            return everyone

        class Reference:
            """The training source, with a note of who reads it."""

            name = world.reference.name
            fingerprint, contents = world.reference.fingerprint, world.reference.contents

            def __len__(self):
                return len(world.reference)

            def __getitem__(self, i):
                baselines.append(index)
                return world.reference[i]

        return run(world, whole(world, noise=3.0), processes=suite.Processes(index, 2, gather), reference=Reference())

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first, second = pool.map(process, range(2))
    alone = run(world, whole(world, noise=3.0))
    assert first.metrics == second.metrics == alone.metrics
    assert first.queries == alone.queries and not second.queries
    assert first.captions == alone.captions
    assert set(baselines) == {0}


def test_batches_that_leave_records_out_are_refused(world):
    def batches(source, start):
        return list(world.batches(source))[:-1]

    with pytest.raises(ValueError, match=r"seen: 2 of 18 records are in no batch; the first is 16"):
        suite.run(whole(world), world.sources, world.tokenizer, world.config, batches, progress=False)


def test_sources_that_are_missing_or_unlabelled_are_refused(world):
    spec = world.config.evaluate.splits[0]
    with pytest.raises(ValueError, match="which is not loaded"):
        suite.run(whole(world), {}, world.tokenizer, world.config, world.batches, progress=False)

    class Unlabelled:
        name, tokenizer_path = "unlabelled", None

        def __len__(self):
            return len(world.sources[spec])

        def __getitem__(self, index):
            return world.sources[spec][index]._replace(label="")

        def fingerprint(self):
            return "unlabelled"

        def contents(self):
            return {}

    sources = world.sources | {spec: Unlabelled()}
    with pytest.raises(ValueError, match="has no labels: name a labelled source"):
        suite.run(whole(world), sources, world.tokenizer, world.config, world.batches, progress=False)
    # The same before a training begins, for what it would measure.
    with pytest.raises(ConfigError, match=re.escape(f"config.evaluate.zero_shot={spec!r} has no labels")):
        asked.check(world.config, sources, None)
    captioner = dataclasses.replace(world.config, loss=dataclasses.replace(world.config.loss, lambda_con=0.0))
    asked.check(captioner, sources, None)
    evaluate = dataclasses.replace(captioner.evaluate, likelihood=5)  # which classifies too
    with pytest.raises(ConfigError, match="has no labels"):
        asked.check(dataclasses.replace(captioner, evaluate=evaluate), sources, None)


def test_sources_without_a_usable_picture_are_refused_by_name(world):
    spec = world.config.evaluate.splits[0]

    class Torn:
        name, tokenizer_path = "torn", None

        def __len__(self):
            return 18

        def __getitem__(self, index):
            return world.sources[spec][index]._replace(image=b"\xff\xd8 torn")

        def fingerprint(self):
            return "torn"

        def contents(self):
            return {}

    sources = world.sources | {spec: Torn()}
    said = re.escape(f"{spec!r}: none of its 18 records can be used; `python -m coca_jax.data.prepare describe` says")
    with pytest.raises(ConfigError, match=said):
        asked.check(world.config, sources, None)

    with pytest.raises(DataError, match=said):
        suite.run(whole(world), sources, world.tokenizer, world.config, world.batches, progress=False)


def test_what_is_asked_for_is_opened_and_looked_at_before_a_training(world):
    opened = asked.open_sources(world.config.evaluate)
    assert list(opened) == list(world.config.evaluate.splits)  # the zero-shot source is one of them
    asked.check(world.with_evaluate(reference_style="round").config, opened, world.reference)
    with pytest.raises(ConfigError, match=r"config\.evaluate\.reference_style='flat': the styles of .* are round"):
        asked.check(world.with_evaluate(reference_style="flat").config, opened, world.reference)


def test_split_names():
    specs = [
        "emoji:seen",
        "array_record:/data/coco-val.array_record",
        "array_record:gs://b/val-*.array_record",
        "x:val",
        "tfds:coco_captions/2014:1.1.0?split=val",
        "folder:/data/photos?captions=/x/names.csv",
        "karpathy:/data/dataset_coco.json?split=test&root=/data/coco",
        "karpathy:/data/dataset_coco.json?split=train,restval",
    ]
    found = suite.split_names([*specs, "emoji:seen", "emoji:zero_shot"])
    wanted = ["seen", "coco-val", "val", "val-2", "coco_captions-2014", "photos", "coco-test", "coco-train_restval"]
    assert list(found.values()) == [*wanted, "zero_shot-2"]


def test_spread_is_even_and_without_repeats():
    assert suite.spread(10, 2) == [2, 7]
    assert suite.spread(3, 8) == [0, 1, 2]
    assert suite.spread(5, 0) == suite.spread(0, 5) == []
