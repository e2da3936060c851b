r"""Image-text entailment (SNLI-VE): does a sentence follow from an image? A classifier on the multimodal decoder.

    python -m coca_jax.main --config=configs/finetune/entailment.py --workdir=runs/entailment \
        --config.init.checkpoint=runs/pretrained \
        --config.data.train='folder:/data/snli_ve/train?question=sentence&label=label' \
        --config.evaluate.splits="('folder:/data/snli_ve/val?question=sentence&label=label',)"

A line of captions.jsonl is {"image": "1.jpg", "sentence": "two people are outside", "label": "entailment"}, with the
labels entailment, neutral and contradiction. Otherwise like vqa.py: the classes are the labels of the training source.
Expect well over the one third that guessing reaches.
"""

import ml_collections

from coca_jax.config import default


def get_config() -> ml_collections.ConfigDict:
    c = default()
    c.init.model = "checkpoint"
    c.steps, c.batch_size = 20_000, 256
    c.loss.update(lambda_con=0.0, lambda_cap=0.0, lambda_cls=1.0)
    c.model.head.reads = "decoder"
    c.optimizer.update(name="adamw", peak_lr=2e-5, schedule="cosine", b2=0.999, weight_decay=0.01, warmup=0.1)
    c.data.update(crop_area=(0.8, 1.0))
    c.evaluate.every = 2000
    return c
