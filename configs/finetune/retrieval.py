r"""Retrieval on your own dataset: the contrastive half alone.

    python -m coca_jax.main --config=configs/finetune/retrieval.py --workdir=runs/retrieval \
        --config.init.checkpoint=runs/pretrained --config.data.train=folder:/data/flickr30k/train \
        --config.evaluate.splits="('folder:/data/flickr30k/val',)"

With lambda_cap=0 the model has no captioning half, and a step does not pay for it. It is evaluated before the first
step too. Expect higher recall in both directions. A larger batch has harder negatives: config.microbatches makes room.
"""

import ml_collections

from coca_jax.config import default


def get_config() -> ml_collections.ConfigDict:
    c = default()
    c.init.model = "checkpoint"
    c.steps, c.batch_size = 5_000, 2048
    c.loss.update(lambda_con=1.0, lambda_cap=0.0)
    c.optimizer.update(name="adamw", peak_lr=1e-5, schedule="cosine", b2=0.999, weight_decay=0.01, warmup=0.1)
    c.data.crop_area = (0.8, 1.0)
    c.evaluate.update(first=True, every=1000)
    return c
