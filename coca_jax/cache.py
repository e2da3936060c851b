"""Where coca_jax keeps what it can make again: prepared data sets and compiled programs."""

from __future__ import annotations

import atexit
import functools
import os
import tempfile
from pathlib import Path


def folder() -> Path:
    """`$COCA_JAX_CACHE`, else `coca_jax` in `$XDG_CACHE_HOME`, else `~/.cache/coca_jax`; it may not exist yet.

    On a local disk: whoever writes there makes files under another name first and moves them. A relative path in
    `XDG_CACHE_HOME` is ignored, as the XDG Base Directory Specification asks. Where the user has no home folder (a
    container's user without a name, and no `HOME`), it is a temporary folder of this process, gone when it ends.
    """
    if own := os.environ.get("COCA_JAX_CACHE"):
        return Path(own).expanduser()
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (shared if shared.is_absolute() else Path.home() / ".cache") / "coca_jax"
    except RuntimeError:  # neither HOME nor an entry in the system's list of users
        return _of_process()


@functools.cache
def _of_process() -> Path:
    # Not one name for all processes: in a folder that all may write to, another user could have put something there.
    made = tempfile.TemporaryDirectory(prefix="coca_jax-")
    atexit.register(made.cleanup)
    return Path(made.name)
