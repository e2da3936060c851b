r"""The paper's largest CoCa (Yu et al. 2022, table 1): 1.0B image encoder, 1.1B text decoder.

    python -m coca_jax.main --config=configs/coca_giant.py --workdir=gs://BUCKET/coca_giant \
        --config.data.train='array_record:gs://BUCKET/pairs/train-*.array_record' \
        --config.data.tokenizer=gs://BUCKET/pairs/tokenizer.model

The recipe of coca_base.py for 2,048 TPU v4 chips, with parameters and optimizer state sharded over 64 chips and 32
replicas (python -m coca_jax.plan --config=configs/coca_giant.py --topology=v4:8x16x16; figures in docs/planner.md).
The output projection is tied to the token embedding, because that gives the table's 1.1B decoder parameters (1.09B;
untied 1.18B). Base and large match the table with two separate matrices.
"""

import ml_collections

from coca_jax.config import default


def get_config() -> ml_collections.ConfigDict:
    c = default()
    c.model.embed_dim = 1408
    c.model.image.update(width=1408, depth=40, heads=16, mlp_dim=6144, remat="dots")
    c.model.text.update(width=1408, heads=16, mlp_dim=5632, n_uni=18, n_multi=18, remat="dots")
    c.model.text.tie_embeddings = True
    c.model.pooler.heads = 16
    c.mesh.update(replica=-1, fsdp=64)
    c.evaluate.every = 10_000
    c.checkpoint.every = 2_500
    return c
