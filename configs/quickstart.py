"""A small CoCa on the built-in emoji: minutes on two CPU cores. `bash launch/quickstart` runs it.

    python -m coca_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

It trains on the drawings of two designers and is tested on those of a third. configs/emoji.py trains the same model for
longer.
"""

import ml_collections

from coca_jax.config import default


def get_config() -> ml_collections.ConfigDict:
    c = default()
    c.steps, c.batch_size, c.log_every = 800, 128, 10
    c.model.update(embed_dim=128, dtype="float32")
    # 36 patches, wide enough for a CPU's matrix units, few layers. A CPU gains more from unrolled layers than
    # it pays in compilation.
    c.model.image.update(size=48, patch=8, width=128, depth=4, heads=4, mlp_dim=256, scan_unroll=0)
    # The dataset's vocabulary has 1,675 tokens. Its longest captions have 22 tokens, 99% have 20 or fewer.
    c.model.text.update(vocab_size=1675, length=20, width=128, heads=4, mlp_dim=256, n_uni=1, n_multi=1, scan_unroll=0)
    c.model.pooler.update(queries=8, heads=4)
    c.loss.caption_chunk = 0  # these logits are small: recomputing them would cost more than keeping them
    # Muon needs about half as many examples as AdamW here (docs/log.md).
    c.optimizer.update(name="muon", peak_lr=4e-3, schedule="cosine", warmup=0.05, b1=0.95, b2=0.98, weight_decay=0.1)
    c.data.train = "emoji:train"
    # The held-out designer uses other colors, lines and proportions, so augmentation varies them.
    c.data.update(crop_area=(0.5, 1.0), rotate=15.0, blur=0.2, color_jitter=0.4, hue_jitter=0.05, grayscale=0.1)
    c.data.eval_crop = 0.875  # matches the scale at which the crops above show things
    c.evaluate.splits = ("emoji:seen", "emoji:combinations", "emoji:concepts", "emoji:base")
    c.evaluate.update(zero_shot="emoji:all", reference_style="twemoji", captions=64)
    c.evaluate.prompts = ("{}", "an emoji of {}", "{} emoji")
    c.checkpoint.every = 200
    return c
