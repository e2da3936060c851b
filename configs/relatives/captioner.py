"""A captioner alone: CoCa without the contrastive half. The quickstart's model, data and optimizer.

    python -m coca_jax.main --config=configs/relatives/captioner.py --workdir=runs/captioner

With lambda_con=0 there are no contrastive pooler, [CLS] token and projections: the model has captions and likelihoods,
but no features. Its lower decoder layers have no cross-attention, as in CoCa.
"""

import pathlib
import runpy

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    c = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "quickstart.py"))["get_config"]()
    c.loss.lambda_con = 0.0
    return c
