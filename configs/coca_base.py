r"""CoCa-Base (Yu et al. 2022, table 1): 86M image encoder, 297M text decoder.

    python -m coca_jax.main --config=configs/coca_base.py --workdir=gs://BUCKET/coca_base \
        --config.data.train='array_record:gs://BUCKET/pairs/train-*.array_record' \
        --config.data.tokenizer=gs://BUCKET/pairs/tokenizer.model

The paper's recipe: batch 65,536, 500k steps, Adafactor with momentum 0.9 and second-moment decay 0.999, decoupled
weight decay 0.01, peak learning rate 8e-4 after 2% of linear warm-up, linear decay, 288 px, 64 text tokens, a
vocabulary of 64k. Sized for 256 TPU v4 chips, with parameters and optimizer state sharded over 8 chips and 32 replicas
(python -m coca_jax.plan --config=configs/coca_base.py --topology=v4:4x8x8; figures in docs/planner.md). On a smaller
machine set --config.batch_size=4096 and --config.steps; the learning rate is the paper's, for its batch.
"""

import ml_collections

from coca_jax.config import default


def get_config() -> ml_collections.ConfigDict:
    c = default()  # the defaults are this model and recipe
    c.model.image.remat = c.model.text.remat = "dots"
    c.mesh.update(replica=-1, fsdp=8)
    c.evaluate.every = 10_000
    c.checkpoint.every = 2_500
    return c
