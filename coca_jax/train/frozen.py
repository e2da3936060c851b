"""Parameters in two parts: those that are trained, and those that `optimizer.freeze` says never change.

Gradients, the optimiser's state and updates exist for the first part alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from flax import traverse_util

from coca_jax import config

Tree = dict[str, Any]


def patterns(c: config.Config) -> tuple[str, ...]:
    """What is frozen: `optimizer.freeze`; with low-rank updates, all but these and the classifier.

    With a bridge in stage one, also the text decoder, which waits for stage two.
    """
    low_rank = (r"(?!lora/|classifier/).*",) if c.lora.rank else ()
    later = ("text_decoder/.*",) if c.model.bridge.stage == 1 else ()
    return (*c.optimizer.freeze, *low_rank, *later)


def split(params: Tree, patterns: Sequence[str]) -> tuple[Tree, Tree]:
    """What is trained and what is frozen, two nested dicts without each other's leaves.

    Args:
      params: parameters, or anything else by their paths.
      patterns: regular expressions; a leaf whose whole path (`a/b/c`) matches one of them is frozen.
    """
    if not patterns:
        return params, {}
    compiled = [re.compile(pattern) for pattern in patterns]
    trained: Tree = {}
    frozen: Tree = {}
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        (frozen if any(p.fullmatch(path) for p in compiled) else trained)[path] = leaf
    return traverse_util.unflatten_dict(trained, sep="/"), traverse_util.unflatten_dict(frozen, sep="/")


def join(trained: Tree, frozen: Tree) -> Tree:
    """The inverse of `split`."""
    if not frozen:
        return trained
    flat = traverse_util.flatten_dict(trained, sep="/") | traverse_util.flatten_dict(frozen, sep="/")
    tree: Tree = traverse_util.unflatten_dict(flat, sep="/")
    return tree
