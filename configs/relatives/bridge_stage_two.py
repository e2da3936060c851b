r"""BLIP-2's second stage: the first one's queries, projected, are what the frozen text decoder reads as the image.

    python -m coca_jax.main --config=configs/relatives/bridge_stage_two.py --workdir=runs/bridge_two \
        --config.init.checkpoint=runs/bridge_one

Captioning loss alone; its gradient goes through the decoder, and trains the bridge only. What comes out is loaded,
scored and captions like any CoCa that was trained without contrastive half.
"""

import pathlib
import runpy

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    c = runpy.run_path(str(pathlib.Path(__file__).with_name("bridge_stage_one.py")))["get_config"]()
    c.init.skip = ()
    c.model.bridge.stage = 2
    c.loss.update(lambda_con=0.0, lambda_match=0.0)
    return c
