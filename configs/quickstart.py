"""A small CoCa on the built-in emoji: minutes on two CPU cores. `bash launch/quickstart` runs it.

    python -m coca_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

It trains on the drawings of two designers and is tested on a third's. configs/emoji.py is the same model trained for
longer.
"""

import ml_collections

from coca_jax.config import default


def get_config() -> ml_collections.ConfigDict:
    c = default()
    c.steps, c.batch_size, c.log_every = 800, 128, 10
    c.model.update(embed_dim=128, dtype="float32")
    # 36 patches; wide enough for a CPU's matrix units, few enough layers for its minutes. Layers are unrolled: a CPU
    # gains more from that than it pays in compilation.
    c.model.image.update(size=48, patch=8, width=128, depth=4, heads=4, mlp_dim=256, scan_unroll=0)
    # The set's vocabulary has 1,675 pieces; its longest captions have 22 tokens, 99% have 20 or fewer.
    c.model.text.update(vocab_size=1675, length=20, width=128, heads=4, mlp_dim=256, n_uni=1, n_multi=1, scan_unroll=0)
    c.model.pooler.update(queries=8, heads=4)
    c.loss.caption_chunk = 0  # these logits are small: computing them again would cost more than holding them
    # Muon needs about half of AdamW's examples here, see docs/log.md.
    c.optimizer.update(name="muon", peak_lr=4e-3, schedule="cosine", warmup=0.05, b1=0.95, b2=0.98, weight_decay=0.1)
    c.data.train = "emoji:train"
    # The held-out designer has other colours, lines and proportions: so does each picture every time it is seen.
    c.data.update(crop_area=(0.5, 1.0), rotate=15.0, blur=0.2, color_jitter=0.4, hue_jitter=0.05, grayscale=0.1)
    c.data.eval_crop = 0.875  # the crops above make things larger: as large they are in evaluation
    c.evaluate.splits = ("emoji:seen", "emoji:combinations", "emoji:concepts", "emoji:base")
    c.evaluate.update(zero_shot="emoji:all", reference_style="twemoji", captions=64)
    c.evaluate.prompts = ("{}", "an emoji of {}", "{} emoji")
    c.checkpoint.every = 200
    return c
