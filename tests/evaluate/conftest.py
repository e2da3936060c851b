from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from coca_jax import config as config_lib
from coca_jax.data import records, sources
from coca_jax.data.tokenizer import Tokenizer
from tests.evaluate.shapes import COLORS, LENGTH, SHAPES, SIZE, World, draw


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Two held-out splits of coloured shapes and a training source that lacks the purple ones."""
    folder = tmp_path_factory.mktemp("evaluate")
    names = [(color, shape) for color in COLORS for shape in SHAPES]

    def write(name: str, style: str, side: int, edge: int, keep: Callable[[str], bool]) -> str:
        path = f"{folder}/{name}.array_record"
        packed = [
            records.pack(
                records.Record(
                    f"{style}/{c}-{s}",
                    draw(c, s, side, edge),
                    (f"{c} {s}", f"a {s}, {c}") if s == "bar" else (f"{c} {s}",),
                    s if c != "black" else "",
                    style,
                ),
                side,
                side,
            )
            for c, s in names
            if keep(c)
        ]
        assert records.write(path, packed) == len(packed)
        return f"array_record:{path}"

    seen = write("seen", "flat", 20, 3, lambda color: True)
    new = write("new", "flat", 24, 2, lambda color: color == "purple")
    train = write("train", "round", 18, 2, lambda color: color != "purple")
    model = Tokenizer.train([f"a {color} {shape}," for color, shape in names] * 4, vocab_size=320)
    config = config_lib.Config()
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model,
            image=dataclasses.replace(config.model.image, size=SIZE),
            text=dataclasses.replace(config.model.text, length=LENGTH),
        ),
        evaluate=dataclasses.replace(
            config.evaluate, splits=(seen, new), zero_shot=seen, prompts=("a {}", "{}"), captions=5, batch_size=8
        ),
        data=dataclasses.replace(config.data, train=train, threads=2),
    )
    opened = {spec: sources.open_source(spec) for spec in (seen, new)}
    return World(opened, sources.open_source(train), model, config)
