r"""BLIP-2's first stage (arXiv 2301.12597): 32 queries learn to read a frozen image encoder.

    python -m coca_jax.main --config=configs/relatives/bridge_stage_one.py --workdir=runs/bridge_one \
        --config.init.checkpoint=runs/quickstart

A query transformer with text layers of its own replaces the poolers and is trained on the contrastive, captioning and
matching losses. Image encoder and text decoder keep the checkpoint's bits; the decoder is not computed in this stage.
Retrieval uses the nearest query. Captions need stage two.
"""

import pathlib
import runpy

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    c = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "quickstart.py"))["get_config"]()
    c.init.update(model="checkpoint", skip=("logit_scale", r"\w+_projection/.*"))
    c.model.bridge.update(stage=1, width=128, depth=2, heads=4, mlp_dim=256)
    c.loss.update(lambda_con=1.0, lambda_cap=1.0, lambda_match=1.0)
    c.optimizer.freeze = ("image_encoder/.*", "text_decoder/.*")
    return c
