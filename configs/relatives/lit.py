r"""LiT (arXiv 2111.07991): a new text tower learns to match a locked image tower, here the quickstart's.

    python -m coca_jax.main --config=configs/relatives/lit.py --workdir=runs/lit \
        --config.init.checkpoint=runs/quickstart

The same frozen parameters as configs/finetune/locked_image.py, on the built-in emoji. Encoder, contrastive pooler and
image projection keep the checkpoint's bits; only the vocabulary is taken from its text half.
"""

import pathlib
import runpy

import ml_collections

CONFIGS = pathlib.Path(__file__).parents[1]


def get_config() -> ml_collections.ConfigDict:
    c = runpy.run_path(str(CONFIGS / "relatives" / "clip.py"))["get_config"]()
    locked = runpy.run_path(str(CONFIGS / "finetune" / "locked_image.py"))["get_config"]()
    c.init.update(model="checkpoint", skip=("text_decoder/.*", "text_projection/.*", "logit_scale"))
    c.optimizer.freeze = locked.optimizer.freeze
    return c
