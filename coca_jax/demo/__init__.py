"""A page to try a model on, in a browser: `python -m coca_jax.demo --checkpoint=...`."""
