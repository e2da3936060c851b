"""SigLIP (arXiv 2303.15343): a binary decision per pair, with the sigmoid in place of the softmax.

    python -m coca_jax.main --config=configs/relatives/siglip.py --workdir=runs/siglip

clip.py with another loss and SigLIP's initial values: a learned bias of -10, a temperature of 0.1. The pooler,
attention with one learned query, is SigLIP's too, but without its MLP.
"""

import pathlib
import runpy

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    c = runpy.run_path(str(pathlib.Path(__file__).with_name("clip.py")))["get_config"]()
    c.loss.contrastive = "sigmoid"
    c.model.update(logit_bias=-10.0, temperature=0.1)
    return c
