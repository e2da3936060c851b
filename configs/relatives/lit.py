r"""LiT (arXiv 2111.07991): a text tower from the seed learns to read a locked image tower, the quickstart's for one.

    python -m coca_jax.main --config=configs/relatives/lit.py --workdir=runs/lit \
        --config.init.checkpoint=runs/quickstart

configs/finetune/locked_image.py's freezing, on the built-in set. Encoder, contrastive pooler and image projection are
the checkpoint's to the bit; of its text nothing is taken but the vocabulary.
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
