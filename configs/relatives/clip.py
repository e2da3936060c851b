"""CLIP (arXiv 2103.00020): the contrastive half alone. The quickstart's model, data and optimizer.

    python -m coca_jax.main --config=configs/relatives/clip.py --workdir=runs/clip

With lambda_cap=0 the model has no multimodal half, generative pooler and output projection, so it cannot caption.
docs/relatives.md compares the relatives at equal compute.
"""

import pathlib
import runpy

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    c = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "quickstart.py"))["get_config"]()
    c.loss.lambda_cap = 0.0
    return c
