"""Converts, validates and describes data sets: `python -m coca_jax.data.prepare`."""
