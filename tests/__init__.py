"""Tests mirror coca_jax/; `tiny` and `conftest` hold what they share."""
