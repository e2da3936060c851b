r"""LoRA (arXiv 2106.09685): low-rank updates of the attention kernels are all that is trained.

    python -m coca_jax.main --config=configs/finetune/lora.py --workdir=runs/lora \
        --config.init.checkpoint=runs/pretrained --config.data.train=folder:/data/coco/train2014 \
        --config.evaluate.splits="('folder:/data/coco/val2014',)"

Moments for the updates alone: the optimiser's state is a small share of the model's. What is loaded or exported are the
kernels with the updates added, a model like any other. config.lora.kernels says which; with a classifier
(config.loss.lambda_cls) that is trained too.
"""

import ml_collections

from coca_jax.config import default


def get_config() -> ml_collections.ConfigDict:
    c = default()
    c.init.model = "checkpoint"
    c.steps, c.batch_size = 10_000, 512
    c.lora.update(rank=8, alpha=16.0)
    c.optimizer.update(name="adamw", peak_lr=2e-4, schedule="cosine", b2=0.999, weight_decay=0.0, warmup=0.1)
    c.data.crop_area = (0.8, 1.0)
    c.evaluate.update(first=True, every=2000, score_captions=True)
    return c
