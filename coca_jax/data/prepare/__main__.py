"""See `python -m coca_jax.data.prepare --help`."""

from __future__ import annotations

import sys

from coca_jax import commandline

with commandline.starting():
    from coca_jax.data.prepare.command import main

if __name__ == "__main__":
    commandline.printable()
    sys.exit(main())
