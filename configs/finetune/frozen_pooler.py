r"""A frozen encoder with a task-specific attentional pooler (CoCa paper, section 3.3).

    python -m coca_jax.main --config=configs/finetune/frozen_pooler.py --workdir=runs/frozen \
        --config.init.checkpoint=runs/pretrained --config.data.train=folder:/data/flowers/train \
        --config.evaluate.splits="('folder:/data/flowers/val',)"

One query attends to the frozen patch tokens, and a linear layer follows; only these two are trained. Expect more than
with linear_probe.py: the pooler can attend to what the pretrained query ignores. The encoder keeps every bit.
"""

import ml_collections

from coca_jax.config import default


def get_config() -> ml_collections.ConfigDict:
    c = default()
    c.init.model = "checkpoint"
    c.steps, c.batch_size = 20_000, 1024
    c.loss.update(lambda_con=0.0, lambda_cap=0.0, lambda_cls=1.0)
    c.model.head.reads = "pooler"
    c.optimizer.update(name="adamw", peak_lr=1e-3, schedule="cosine", b2=0.999, weight_decay=0.01)
    c.optimizer.freeze = ("(?!classifier/).*",)
    c.data.update(crop_area=(0.5, 1.0), flip=True)
    c.evaluate.every = 1000
    return c
