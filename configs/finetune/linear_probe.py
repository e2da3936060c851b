r"""A linear probe: all weights frozen, a linear layer on the contrastive pooler's output.

    python -m coca_jax.main --config=configs/finetune/linear_probe.py --workdir=runs/probe \
        --config.init.checkpoint=runs/pretrained --config.data.train=folder:/data/flowers/train \
        --config.evaluate.splits="('folder:/data/flowers/val',)"

It is cheap, because only the linear layer has a backward pass, and measures what the pretrained image features contain.
Expect less than with frozen_pooler.py. The encoder keeps every bit.
"""

import ml_collections

from coca_jax.config import default


def get_config() -> ml_collections.ConfigDict:
    c = default()
    c.init.model = "checkpoint"
    c.steps, c.batch_size = 10_000, 1024
    c.loss.update(lambda_con=0.0, lambda_cap=0.0, lambda_cls=1.0)
    c.model.head.reads = "contrastive"
    c.optimizer.update(name="adamw", peak_lr=1e-2, schedule="cosine", b2=0.999, weight_decay=0.0)
    c.optimizer.freeze = ("(?!classifier/).*",)
    c.data.update(crop_area=(0.5, 1.0), flip=True)
    c.evaluate.every = 1000
    return c
