from __future__ import annotations

import dataclasses
import datetime
import html.parser
import io
import itertools
import json
import math
import re

import numpy as np
import PIL.Image
import pytest

from coca_jax import config as config_lib
from coca_jax.evaluate import curves, figures, report, suite
from tests.evaluate.shapes import draw

NASTY = (
    "<script>alert(1)</script>",
    '"><img src=http://example.com/x.png onerror=alert(1)>',
    "{{ 7 * 7 }} {% raw %} &amp; &lt;b&gt;",
    "</figcaption></figure></main><style>*{display:none}</style>",
    "\u202eright to left\u202c \u05e9\u05dc\u05d5\u05dd, line\nbreak",
)
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(html.parser.HTMLParser):
    """What a browser would make of the page: elements, attributes, text; fails on tags that do not match."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.css = ""
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes), (tag, attributes)
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> inside {self.open}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            self.css += data
        elif data.strip():
            self.texts.append(data.strip())

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return "\n".join(self.texts)


def check(text: str) -> Page:
    """What holds for every report: it is sound, it loads nothing, and a screen reader finds its way."""
    page = Page(text)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form", "audio", "video", "foreignobject"}
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids)), "an id occurs twice"
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
                assert value and (value.startswith("data:image/png;base64,") or value[1:] in ids), (tag, name, value)
            for target in re.findall(r"url\(([^)]*)\)", value or "") if name != "alt" else ():
                assert target.startswith("#") and target[1:] in ids, (tag, name, target)
            if name not in ("alt", "content"):
                assert "://" not in (value or ""), (tag, name, value)
            if name == "aria-labelledby":
                assert value in ids
    assert "url(" not in page.css and "@import" not in page.css and "://" not in page.css
    assert all(image.get("alt") is not None for image in page.of("img"))
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in page.of("svg"))
    assert [tag for tag, _ in page.elements].count("h1") == 1
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels)), levels
    assert page.of("html") == [{"lang": "en"}] and page.of("title")
    return page


def config(**evaluate) -> config_lib.Config:
    base = config_lib.Config(steps=300, batch_size=64)
    return dataclasses.replace(base, evaluate=dataclasses.replace(base.evaluate, splits=("emoji:seen",), **evaluate))


METRICS = {
    **{f"seen/{prefix}{way}/{key}": value for way in ("image_to_text", "text_to_image")
       for prefix, shift in (("", 0.3), ("pixel/", 0.21))
       for key, value in (("r1", shift), ("r5", shift + 0.2), ("r10", shift + 0.3), ("median_rank", 7.5))},
    "seen/chance/r1": 0.0003, "seen/chance/r5": 0.0015, "seen/chance/r10": 0.003, "seen/chance/median_rank": 1653.0,
    "seen/images": 3306.0, "seen/texts": 3306.0, "seen/caption_loss": 1.25, "seen/perplexity": 3.49,
    "seen/caption_exact_match": 0.4,
    "zero_shot/top1": 0.123, "zero_shot/top5": 0.345, "zero_shot/mean_per_class": 0.111,
    "zero_shot/chance/top1": 0.01, "zero_shot/chance/top5": 0.05, "zero_shot/largest_class": 0.09,
    "zero_shot/classes": 100.0, "zero_shot/images": 3300.0,
}  # fmt: skip


def results(texts=NASTY) -> suite.Results:
    picture = draw("red", "circle", 40, 4)
    answers = tuple(suite.Answer(text, i == 1, picture) for i, text in enumerate(texts))
    queries = (
        suite.Query("seen", "image_to_text", texts[0], answers, 2, 3306, picture),
        suite.Query("seen", "image_to_text", "named <beyond> five", answers[2:], 4000, 3306, picture),
        suite.Query("seen", "text_to_image", texts[1], answers, 2, 3306),
    )
    captions = tuple(suite.Caption("seen", text, (text,), i == 0, picture) for i, text in enumerate(texts))
    return suite.Results(METRICS, queries, captions)


def log(folder, entries, tail=""):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries) + tail)


def training(steps=60):
    return [
        {
            "step": 5 * i,
            "loss": 9 / (i + 1),
            "loss/contrastive": 4 / (i + 1),
            "loss/captioning": 5 / (i + 1),
            "accuracy/image_to_text": i / steps,
            "accuracy/text_to_image": i / steps,
            "examples_per_second": 100.0 + i,
        }
        for i in range(steps)
    ]


def test_a_whole_report(tmp_path):
    log(tmp_path, [*training(), {"step": 100, "seen/image_to_text/r1": 0.1}, {"step": 295} | METRICS])
    path = report.write(
        tmp_path,
        config(),
        results(),
        parameters=12_345_678,
        machine="1 x <machine>",
        seconds=3725,
        date=datetime.datetime(2026, 11, 23, 12, tzinfo=datetime.UTC),
        attribution="Pictures: CC-BY 4.0, https://example.com/licence",
    )
    assert path == tmp_path / "report.html"
    text = path.read_text()
    page = check(text)
    for caption in NASTY:
        assert (
            page.texts.count(caption) >= 3
        )  # in the galleries, under its picture and as the reference, letter for letter
        assert caption not in text or not re.search("[<>&]", caption)
    for words in ("30.0%", "21.0%", "0.03%", "12.3%", "1,653", "3.49", "1 h 2 min", "12.3 million (12,345,678)"):
        assert any(words in part for part in page.texts), words
    assert "1 x <machine>" in page.texts and "295 of 300, batch 64" in page.texts
    assert any("example.com/licence" in part for part in page.texts)
    assert "Right answer at rank 3,306 of 3,306" in page.text and "named <beyond> five" in page.text
    assert len(page.of("svg")) == 4  # loss, accuracy, held-out recall, throughput
    for label in ("step", "loss", "loss/contrastive", "share right", "examples a second", "image to text"):
        assert label in page.texts
    assert len(text) < 300_000


def test_recall_stands_beside_chance_and_pixels(tmp_path):
    page = check(report.write(tmp_path, config(), results()).read_text())
    start = page.texts.index("Nearest pixels")
    assert page.texts[start - 8 : start] == ["30.0%", "50.0%", "60.0%", "7.5"] * 2
    assert page.texts[start + 1 : start + 9] == ["21.0%", "41.0%", "51.0%", "7.5"] * 2
    assert page.texts[start + 9 : start + 14] == ["Chance", "0.03%", "0.15%", "0.30%", "1,653"]


@pytest.mark.parametrize("half", ["contrastive", "captioning", "neither"])
def test_a_missing_half_is_left_out(tmp_path, half):
    full = results()
    if half == "contrastive":
        shown = suite.Results({k: v for k, v in METRICS.items() if "/r" in k or "median" in k}, full.queries)
    elif half == "captioning":
        shown = suite.Results({"seen/caption_loss": 1.25, "seen/perplexity": 3.49}, (), full.captions)
    else:
        shown = suite.Results({})
    page = check(report.write(tmp_path, config(), shown).read_text())
    assert ("Retrieval" in page.texts) == ("Retrieval gallery" in page.texts) == (half == "contrastive")
    assert ("Captioning" in page.texts) == ("Generated captions" in page.texts) == (half == "captioning")
    assert "Zero-shot classification" not in page.texts


def test_without_results_the_log_is_enough(tmp_path):
    log(tmp_path, [{"step": 3} | METRICS])
    page = check(report.write(tmp_path, config()).read_text())
    assert "Zero-shot classification" in page.texts and "30.0%" in page.texts
    assert "Retrieval gallery" not in page.texts and not page.of("svg")


@pytest.mark.parametrize("tail", ["", '{"step": 6, "loss": 0.', "[1, 2]\n", '{"loss": 3}\n', "null\n", "\n\n", '"\xff'])
def test_broken_logs_break_nothing(tmp_path, tail):
    entries = [{"step": 0, "loss": 2.0}, {"step": 5, "loss": math.nan}, {"step": 10, "loss": math.inf}]
    log(tmp_path, [*entries, {"step": 15, "loss": None}, {"step": 20, "loss": 1.0, "note": "text", "on": True}], tail)
    history = curves.read(tmp_path / "metrics.jsonl")
    np.testing.assert_array_equal(history.series["loss"][0], [0, 5, 10, 15, 20])
    np.testing.assert_array_equal(history.series["loss"][1], [2, np.nan, np.inf, np.nan, 1])
    assert set(history.series) == {"loss"}
    assert history.unreadable == bool(tail.strip())
    page = check(report.write(tmp_path, config(), results()).read_text())
    assert len(page.of("svg")) == 1
    assert "loss 2 to 1 (3 of 5 not finite)." in page.texts
    assert ("cannot be read" in page.text) == bool(tail.strip())


@pytest.mark.parametrize("content", [None, b"", b"\x00\xff\xfe garbage", b'{"step": 1e400, "loss": 1}', b"[" * 100_000])
def test_no_log_at_all(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_bytes(content)
    page = check(report.write(tmp_path / "new" if content is None else tmp_path, config(), results()).read_text())
    assert any("no entries yet" in part for part in page.texts)
    assert not page.of("svg")


def test_divergence_is_said(tmp_path):
    log(tmp_path, [*training(), {"step": 300, "loss": math.nan}])
    broken = dataclasses.replace(results(), metrics=dict.fromkeys(METRICS, math.nan) | {"seen/perplexity": math.inf})
    page = check(report.write(tmp_path, config(), broken).read_text())
    assert "The newest value of loss is not finite: training has diverged." in page.texts
    assert "not a number" in page.texts and "infinite" in page.texts


def test_pictures_that_cannot_be_decoded_are_said(tmp_path):
    full = results(("a", "b", "c"))
    captions = (dataclasses.replace(full.captions[0], picture=b"not a picture"),)
    page = check(report.write(tmp_path, config(), dataclasses.replace(full, captions=captions)).read_text())
    assert "a: the picture cannot be decoded." in page.texts


def test_control_characters_do_not_reach_the_page(tmp_path):
    text = report.write(tmp_path, config(), results(("nul \x00 esc \x1b half \ud800", "", "c"))).read_text()
    assert "nul \ufffd esc \ufffd half \ufffd" in check(text).texts
    assert "(empty)" in text and not re.search("[\x00\x1b]", text)


def test_a_resumed_run_counts_its_later_lines(tmp_path):
    log(tmp_path, [{"step": s, "loss": v} for s, v in [(1, 5.0), (2, 4.0), (3, 3.0), (2, 4.5), (3, 3.5)]])
    steps, values = curves.read(tmp_path / "metrics.jsonl").series["loss"]
    assert steps.tolist() == [1, 2, 3] and values.tolist() == [5, 4.5, 3.5]


def test_long_curves_are_thinned_by_their_means():
    steps, values = np.arange(10_000), np.sin(np.arange(10_000) / 500)
    values[::7] = np.nan
    x, y = curves.thin(steps, values, 100)
    assert len(x) == len(y) == 100
    np.testing.assert_allclose(y, np.sin(x / 500), atol=0.01)
    gap = np.full(1000, 2.0)
    gap[300:400] = np.inf
    x, y = curves.thin(np.arange(1000), gap, 10)
    np.testing.assert_array_equal(y, [2, 2, 2, np.nan, 2, 2, 2, 2, 2, 2])
    assert curves.thin(steps[:5], values[:5], 100)[0] is not None


def test_a_long_run_stays_small(tmp_path):
    log(tmp_path, training(5000))
    picture = np.random.default_rng(0).integers(0, 256, (100, 120, 3), np.uint8)
    many = [dataclasses.replace(results().captions[0], picture=png(np.roll(picture, i % 8))) for i in range(100)]
    path = report.write(tmp_path, config(), dataclasses.replace(results(), captions=tuple(many)))
    page = check(path.read_text())
    assert (
        "The first 96 are shown." in page.text and path.stat().length < 3_000_000
    )  # of pure noise, the worst there is


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    PIL.Image.fromarray(pixels).save(out, "png")
    return out.getvalue()


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.0%"), (1.0, "100.0%"), (0.2178, "21.8%"), (0.000302, "0.03%"), (1e-6, "0.0001%"), (None, "\u2013")],
)
def test_percentages(value, text):
    assert figures.percent(value) == text


def test_charts_take_the_colours_of_the_page():
    line = (np.arange(5), np.arange(5.0))
    svg = curves.chart(3, 'a "b" <c>', "loss", {"x": line, "_hidden <i>": line, "$y_1$": line})
    assert "var(--series-1)" in svg and "var(--ink-soft)" in svg and "var(--grid)" in svg
    assert not re.search(r"#0[0-9a-f]{5}\b", svg.lower())
    page = Page(svg)
    assert page.of("svg")[0]["aria-label"] == 'a "b" <c>'
    assert "$y_1$" in page.texts and any("_hidden <i>" in part for part in page.texts)
