r"""A locked image tower (LiT, arXiv 2111.07991): image encoder and pooler stay fixed, the text tower is trained.

    python -m coca_jax.main --config=configs/finetune/locked_image.py --workdir=runs/locked \
        --config.init.checkpoint=runs/pretrained --config.data.train='array_record:/data/pairs/train-*.array_record' \
        --config.evaluate.zero_shot='tfds:imagenet2012?split=validation&classes=imagenet'

The image tower has no backward pass and keeps every bit. For a new text tower (another language or vocabulary) set
config.init.skip="('text_decoder/.*', 'text_projection/.*')" and config.data.tokenizer.
"""

import ml_collections

from coca_jax.config import default


def get_config() -> ml_collections.ConfigDict:
    c = default()
    c.init.model = "checkpoint"
    c.steps, c.batch_size = 50_000, 4096
    c.loss.update(lambda_con=1.0, lambda_cap=0.0)
    c.optimizer.update(name="adamw", peak_lr=1e-3, schedule="cosine", b2=0.99, weight_decay=1e-4)
    c.optimizer.freeze = ("image_encoder/.*", r"\w+_pooler/.*", "image_projection/.*")
    c.evaluate.update(first=True, every=5000, prompts=("imagenet",))
    return c
