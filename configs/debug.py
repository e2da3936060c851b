"""The whole loop in under a minute on a laptop: data, steps, evaluation, checkpoints, report.

    python -m coca_jax.main --config=configs/debug.py --workdir=/tmp/coca_debug

The model is too small to learn anything useful.
"""

import ml_collections

from coca_jax.config import default


def get_config() -> ml_collections.ConfigDict:
    c = default()
    c.steps, c.batch_size, c.log_every = 20, 32, 5
    c.model.update(embed_dim=32, dtype="float32")
    c.model.image.update(size=24, patch=8, width=32, depth=2, heads=2, mlp_dim=64)
    c.model.text.update(vocab_size=2048, length=16, width=32, heads=2, mlp_dim=64, n_uni=1, n_multi=1)
    c.model.pooler.update(queries=4, heads=2)
    c.loss.caption_chunk = 0
    c.optimizer.update(name="adamw", peak_lr=1e-3)
    c.data.train = "emoji:train"
    c.evaluate.update(every=10, splits=("emoji:combinations",), zero_shot="emoji:combinations", captions=8)
    c.evaluate.update(prompts=("an emoji of {}", "{}"), reference_style="twemoji", batch_size=64)
    c.checkpoint.every = 10
    return c
