r"""Continues training at a higher resolution, 288 to 576 pixels, with resized position embeddings.

    python -m coca_jax.main --config=configs/finetune/higher_resolution.py --workdir=runs/at_576 \
        --config.init.checkpoint=runs/pretrained --config.data.train='array_record:/data/pairs/train-*.array_record' \
        --config.evaluate.splits="('folder:/data/coco/val2014',)"

The paper ends its pretraining with one such epoch. There are four times as many patches, at about four times the
encoder's cost. The evaluation before the first step shows what resizing alone costs.
"""

import ml_collections

from coca_jax.config import default


def get_config() -> ml_collections.ConfigDict:
    c = default()
    c.init.model = "checkpoint"
    c.init.image_size = 576
    c.steps, c.batch_size = 10_000, 4096
    c.optimizer.update(peak_lr=1e-5, schedule="cosine", warmup=0.1)
    c.evaluate.update(first=True, every=2000)
    return c
