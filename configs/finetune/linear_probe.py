r"""A linear probe: all weights frozen, a linear layer on what the contrastive pooler gives.

    python -m coca_jax.main --config=configs/finetune/linear_probe.py --workdir=runs/probe \
        --config.init.checkpoint=runs/pretrained --config.data.train=folder:/data/flowers/train \
        --config.evaluate.splits="('folder:/data/flowers/val',)"

Cheap: no backward pass but through the linear layer. It measures what the pretrained picture features hold; expect less
than frozen_pooler.py. The encoder is the checkpoint's to the bit afterwards.
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
