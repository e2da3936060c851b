r"""BLIP-2's second stage: the frozen text decoder reads the projected queries of stage one as the image.

    python -m coca_jax.main --config=configs/relatives/bridge_stage_two.py --workdir=runs/bridge_two \
        --config.init.checkpoint=runs/bridge_one

The captioning loss alone; its gradient passes through the decoder and trains only the bridge. The result loads, scores
and captions like any CoCa without a contrastive half.
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
