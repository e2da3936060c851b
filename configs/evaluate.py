r"""Evaluation of a checkpoint: retrieval and captions on one dataset, zero-shot classification on another.

    python -m coca_jax.evaluate --checkpoint=runs/mine --output=results/mine --config=configs/evaluate.py \
        --config.evaluate.splits="('karpathy:/data/coco/dataset_coco.json?split=test',)" \
        --config.evaluate.zero_shot='tfds:imagenet2012?split=validation&classes=imagenet'

Retrieval follows COCO and Flickr30k: every caption of an image counts as correct. Captions are scored by COCO's metrics
(CIDEr, BLEU, ROUGE-L). Zero-shot classification averages CLIP's 80 prompts. --config.evaluate.likelihood=1000 also
ranks the texts of 1,000 images by log-likelihood. No dataset is set by default: name yours.
"""

from ml_collections import ConfigDict

from coca_jax import config


def get_config() -> ConfigDict:
    c = config.default()
    c.batch_size = 256
    c.evaluate.update(prompts=("imagenet",), score_captions=True, captions=64, batch_size=256)
    return c
