"""A recipe whose whole loop takes seconds, for tests that start the real program. Paths come on the command line."""

import ml_collections

from coca_jax.config import default


def get_config() -> ml_collections.ConfigDict:
    c = default()
    c.steps, c.batch_size, c.log_every = 12, 8, 1
    c.model.update(embed_dim=8, dtype="float32")
    c.model.image.update(size=16, patch=8, width=16, depth=1, heads=2, mlp_dim=16)
    c.model.text.update(vocab_size=320, length=16, width=16, heads=2, mlp_dim=16, n_uni=1, n_multi=1)
    c.model.pooler.update(queries=2, heads=2)
    c.loss.caption_chunk = 0
    c.optimizer.update(name="adamw", peak_lr=3e-3, ema_decay=0.9)
    c.data.update(color_jitter=0.2, rotate=5.0)
    c.evaluate.update(batch_size=16, captions=4, prompts=("{}",))
    c.checkpoint.update(every=4, keep=2)
    return c
