r"""Classification with all weights trained: a pooler of its own and a linear layer on the image encoder.

    python -m coca_jax.main --config=configs/finetune/classification.py --workdir=runs/flowers \
        --config.init.checkpoint=runs/pretrained --config.data.train=folder:/data/flowers/train \
        --config.evaluate.splits="('folder:/data/flowers/val',)"

The classes are the labels of the training source, or the lines of config.data.classes. Lower layers have lower learning
rates (layer_decay). Expect a higher top-1 than with linear_probe.py, the more so the more labelled images there are.
The model has no text half; to keep it, set config.loss.lambda_con=1 and use data with captions.
"""

import ml_collections

from coca_jax.config import default


def get_config() -> ml_collections.ConfigDict:
    c = default()
    c.init.model = "checkpoint"
    c.steps, c.batch_size = 20_000, 512
    c.loss.update(lambda_con=0.0, lambda_cap=0.0, lambda_cls=1.0, label_smoothing=0.1)
    c.model.head.reads = "pooler"
    c.optimizer.update(name="adamw", peak_lr=5e-5, schedule="cosine", b2=0.999, weight_decay=0.05, layer_decay=0.85)
    c.optimizer.update(warmup=0.1, ema_decay=0.999)
    c.data.update(crop_area=(0.3, 1.0), flip=True, color_jitter=0.2)
    c.evaluate.every = 1000
    return c
