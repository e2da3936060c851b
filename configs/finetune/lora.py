r"""LoRA (arXiv 2106.09685): only low-rank updates of the attention kernels are trained.

    python -m coca_jax.main --config=configs/finetune/lora.py --workdir=runs/lora \
        --config.init.checkpoint=runs/pretrained --config.data.train=folder:/data/coco/train2014 \
        --config.evaluate.splits="('folder:/data/coco/val2014',)"

The optimizer state covers the updates alone, a small share of the model. Loading and exporting merge the updates into
the kernels. config.lora.kernels selects the kernels; a classifier (config.loss.lambda_cls) is trained as well.
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
