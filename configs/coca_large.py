r"""CoCa-Large (Yu et al. 2022, table 1): 303M image encoder, 484M text decoder.

    python -m coca_jax.main --config=configs/coca_large.py --workdir=gs://BUCKET/coca_large \
        --config.data.train='array_record:gs://BUCKET/pairs/train-*.array_record' \
        --config.data.tokenizer=gs://BUCKET/pairs/tokenizer.model

The recipe of coca_base.py for 512 TPU v4 chips, with parameters and optimizer state sharded over 8 chips and 64
replicas (python -m coca_jax.plan --config=configs/coca_large.py --topology=v4:8x8x8; figures in docs/planner.md).
"""

import ml_collections

from coca_jax.config import default


def get_config() -> ml_collections.ConfigDict:
    c = default()
    c.model.embed_dim = 1024
    c.model.image.update(width=1024, depth=24, heads=16, mlp_dim=4096, remat="dots")
    c.model.text.update(width=1024, heads=16, mlp_dim=4096, n_uni=12, n_multi=12, remat="dots")
    c.model.pooler.heads = 16
    c.mesh.update(replica=-1, fsdp=8)
    c.evaluate.every = 10_000
    c.checkpoint.every = 2_500
    return c
