"""The quickstart's model, trained for longer.

    python -m coca_jax.main --config=configs/emoji.py --workdir=runs/emoji

It took 97 minutes on one CPU core (2026-11-23). Two idle cores run twice as many steps a second.
"""

import pathlib
import runpy

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    # By path, because a recipe is run as a file, from any folder.
    c = runpy.run_path(str(pathlib.Path(__file__).with_name("quickstart.py")))["get_config"]()
    c.steps, c.log_every = 6000, 50
    c.evaluate.update(every=1500, best="seen/image_to_text/r1")
    c.checkpoint.every = 750
    return c
