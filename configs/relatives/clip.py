"""CLIP (arXiv 2103.00020): the contrastive half alone. The quickstart's model, data and optimiser.

    python -m coca_jax.main --config=configs/relatives/clip.py --workdir=runs/clip

With lambda_cap=0 neither the multimodal half nor the generative pooler nor the output softmax is in the model: it has
no captions. docs/relatives.md compares the relatives at equal compute.
"""

import pathlib
import runpy

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    c = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "quickstart.py"))["get_config"]()
    c.loss.lambda_cap = 0.0
    return c
