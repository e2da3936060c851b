r"""BLIP-2's first stage (arXiv 2301.12597): 32 queries learn to read a frozen image encoder, with a text of their own.

    python -m coca_jax.main --config=configs/relatives/bridge_stage_one.py --workdir=runs/bridge_one \
        --config.init.checkpoint=runs/quickstart

Contrastive, captioning and matching loss on one query transformer in the place of the poolers. Image encoder and text
decoder are the checkpoint's to the bit; the decoder is not computed yet, and stays in the model for stage two.
Retrieval by the nearest of the queries; no captions before stage two.
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
