r"""Classification, all weights trained: a pooler of the task's own and a linear layer on the image encoder.

    python -m coca_jax.main --config=configs/finetune/classification.py --workdir=runs/flowers \
        --config.init.checkpoint=runs/pretrained --config.data.train=folder:/data/flowers/train \
        --config.evaluate.splits="('folder:/data/flowers/val',)"

The classes are the labels of the training source (or the lines of config.data.classes). Lower layers learn more slowly
(layer_decay). What to expect: a higher top-1 than linear_probe.py's, more the more labelled pictures there are; text
and zero-shot are not in the model any more (add config.loss.lambda_con=1 to keep them, with captions in the data).
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
