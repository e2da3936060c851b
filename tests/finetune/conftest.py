"""One small pretrained checkpoint that every fine-tuning begins with, and what they have in common."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import runpy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from flax import traverse_util

from coca_jax import config, run
from coca_jax.stored import read_weights
from coca_jax.train.metrics import read_lines
from tests.finetune import digits

ROOT = pathlib.Path(__file__).resolve().parents[2]


def flat(tree: Any) -> Mapping[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(tree, sep="/").items()}


def pretraining(source: str, tokenizer: pathlib.Path) -> Any:
    c = config.default()
    c.steps, c.batch_size, c.log_every = 150, 64, 50
    c.model.update(embed_dim=16, dtype="float32")
    c.model.image.update(size=16, patch=4, width=32, depth=1, heads=2, mlp_dim=64)
    c.model.text.update(vocab_size=300, length=24, width=32, heads=2, mlp_dim=64, n_uni=1, n_multi=1)
    c.model.pooler.update(queries=4, heads=2)
    c.loss.caption_chunk = 0
    c.optimizer.update(name="adamw", peak_lr=4e-3, b2=0.98)
    c.data.update(train=source, tokenizer=str(tokenizer), crop_area=(0.9, 1.0))
    c.evaluate.captions = 0
    c.checkpoint.every = 1000
    return c


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A run that is over.

    Attributes:
      workdir: of the run.
      first, last: its evaluations before the first step, where there is one, and after the last.
      said: what it printed.
      before, after: parameters by path, of the checkpoint and of the run.
    """

    workdir: pathlib.Path
    first: Mapping[str, float]
    last: Mapping[str, float]
    said: str
    before: Mapping[str, np.ndarray]
    after: Mapping[str, np.ndarray]

    def kept(self, prefix: str = "") -> list[str]:
        """Paths that begin so and have the same bits as before."""
        return [
            path
            for path, leaf in self.after.items()
            if path.startswith(prefix) and path in self.before and leaf.tobytes() == self.before[path].tobytes()
        ]

    def of(self, prefix: str) -> list[str]:
        return [path for path in self.after if path.startswith(prefix)]


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A workdir: 1,000 digits with captions, 150 steps."""
    folder = tmp_path_factory.mktemp("digits")
    tokenizer = digits.tokenizer(folder / "digits.model")
    source = digits.pairs(folder / "train.array_record", 0, 1000)
    assert run.run(pretraining(source, tokenizer), str(folder / "run")) == 0
    return folder / "run"


@pytest.fixture
def tune(pretrained: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Tuned]:
    """`tune(recipe, train, test, **changes)` runs configs/finetune/RECIPE.py on the small checkpoint.

    `changes` are keys, `optimizer__peak_lr=1e-2`; `scratch=True` leaves the checkpoint out: the same run from the seed.
    """

    def tune(recipe: str, train: str, test: str, *, scratch: bool = False, name: str = "run", **changes: Any) -> Tuned:
        c = runpy.run_path(str(ROOT / "configs" / "finetune" / f"{recipe}.py"))["get_config"]()
        c.batch_size, c.log_every, c.checkpoint.every = 64, 1000, 1000
        c.init.checkpoint, c.data.train, c.evaluate.splits = str(pretrained), train, (test,)
        c.loss.caption_chunk = 0
        c.data.update(flip=False, color_jitter=0.0, crop_area=(0.9, 1.0))
        c.evaluate.update(every=0, captions=0, score_captions=False, batch_size=256)
        for path, value in changes.items():
            group, *names = c, *path.split("__")
            while len(names) > 1:
                group = group[names.pop(0)]
            group[names[0]] = value
        if scratch:
            like = json.loads((pretrained / "config.json").read_text())
            head = c.model.head.to_dict()
            c.init.update(checkpoint="", model="config", image_size=0, skip=())
            c.model.update(like["model"] | {"head": head})
            c.data.tokenizer = str(pretrained / "tokenizer.model")
        capsys.readouterr()
        assert run.run(c, str(tmp_path / name)) == 0
        lines = [line for line in read_lines(tmp_path / name / "metrics.jsonl") if "loss" not in line]
        first = next((line for line in lines if line["step"] == 0), {})
        said, before = capsys.readouterr().out, flat(read_weights(pretrained).params)
        return Tuned(tmp_path / name, first, lines[-1], said, before, flat(read_weights(tmp_path / name).params))

    return tune
