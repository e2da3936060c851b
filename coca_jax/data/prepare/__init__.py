"""Converts, validates and describes data sets: `python -m coca_jax.data.prepare`."""

from __future__ import annotations

from coca_jax.data.prepare.command import main

__all__ = ["main"]
