r"""Video classification with a frozen encoder: one pooler over the tokens of all frames (CoCa paper, section 3.3).

    python -m coca_jax.main --config=configs/finetune/video.py --workdir=runs/actions \
        --config.init.checkpoint=runs/pretrained --config.data.train=folder:/data/actions/train \
        --config.evaluate.splits="('folder:/data/actions/val',)"

A clip is a line of captions.jsonl, {"image": ["a/0.jpg", "a/1.jpg", ...], "label": "running"}, or an ArrayRecord record
with several frames. config.model.head.frames frames are used, one from each of that many equal time spans. A learned
embedding of the frame's position, initially zero, is added, because the paper's pooler ignores order. To train all
weights, clear config.optimizer.freeze and set config.optimizer.peak_lr=5e-5.
"""

import ml_collections

from coca_jax.config import default


def get_config() -> ml_collections.ConfigDict:
    c = default()
    c.init.model = "checkpoint"
    c.steps, c.batch_size = 20_000, 256
    c.loss.update(lambda_con=0.0, lambda_cap=0.0, lambda_cls=1.0)
    c.model.head.update(reads="pooler", frames=8)
    c.optimizer.update(name="adamw", peak_lr=1e-3, schedule="cosine", b2=0.999, weight_decay=0.01)
    c.optimizer.freeze = ("(?!classifier/).*",)
    c.data.update(crop_area=(0.5, 1.0))
    c.evaluate.every = 1000
    return c
