"""Where coca_jax keeps what it can make again: prepared data sets and compiled programs."""

from __future__ import annotations

import os
from pathlib import Path


def folder() -> Path:
    """`$COCA_JAX_CACHE`, else `coca_jax` in `$XDG_CACHE_HOME`, else `~/.cache/coca_jax`; it may not exist yet.

    On a local disk: whoever writes there makes files under another name first and moves them. A relative path in
    `XDG_CACHE_HOME` is ignored, as the XDG Base Directory Specification asks.
    """
    if own := os.environ.get("COCA_JAX_CACHE"):
        return Path(own).expanduser()
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (shared if shared.is_absolute() else Path.home() / ".cache") / "coca_jax"
