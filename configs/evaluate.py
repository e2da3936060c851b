r"""What a checkpoint is evaluated on: retrieval and captions of a set, zero-shot classification of another.

    python -m coca_jax.evaluate --checkpoint=runs/mine --output=results/mine --config=configs/evaluate.py \
        --config.evaluate.splits="('karpathy:/data/coco/dataset_coco.json?split=test',)" \
        --config.evaluate.zero_shot='tfds:imagenet2012?split=validation&classes=imagenet'

Retrieval is that of COCO and Flickr30k: all captions of a picture are right for it. Captions are scored as COCO's
evaluation does (CIDEr, BLEU, ROUGE-L). Zero-shot classification takes CLIP's 80 prompts. By likelihood too, of so many
pictures: --config.evaluate.likelihood=1000. Without a change it evaluates nothing: the sets are yours.
"""

from ml_collections import ConfigDict

from coca_jax import config


def get_config() -> ConfigDict:
    c = config.default()
    c.batch_size = 256
    c.evaluate.update(prompts=("imagenet",), score_captions=True, captions=64, batch_size=256)
    return c
