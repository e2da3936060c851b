"""SigLIP (arXiv 2303.15343): every pair a yes or no of its own, the sigmoid in place of the softmax.

    python -m coca_jax.main --config=configs/relatives/siglip.py --workdir=runs/siglip

clip.py with another loss, and what SigLIP begins with: a learned bias of -10, a temperature of 0.1. The pooler is
SigLIP's too, an attention with one learned query; its MLP is not.
"""

import pathlib
import runpy

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    c = runpy.run_path(str(pathlib.Path(__file__).with_name("clip.py")))["get_config"]()
    c.loss.contrastive = "sigmoid"
    c.model.update(logit_bias=-10.0, temperature=0.1)
    return c
