"""What the forward pass keeps for the backward pass, counted in the traced loss."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from coca_jax import config
from coca_jax.train import frozen
from coca_jax.train.state import abstract_parameters, frames_of
from coca_jax.train.step import loss_function

_ROWS = 64  # enough that what grows with the square of the rows is small beside what grows with them


def bytes_of_a_row(c: config.Config, rows: float) -> float:
    """Bytes that each image-text pair adds to what is kept from the forward to the backward pass.

    It is the program as written, remat policies included. The compiler may keep less, by computing more again.

    Args:
      c: configuration; no mesh may be set.
      rows: of a device and a microbatch, which tell whether the captioning loss works in chunks there.
    """
    # Decided for these rows: of the two numbers that are counted one might be in chunks and the other not.
    at_once = not 0 < c.loss.caption_chunk < rows * c.model.text.length
    c = dataclasses.replace(c, loss=dataclasses.replace(c.loss, caption_chunk=0 if at_once else 1))
    return (_kept(c, 2 * _ROWS) - _kept(c, _ROWS)) / _ROWS


def _kept(c: config.Config, rows: int) -> int:
    c = dataclasses.replace(c, batch_size=rows, microbatches=1)
    size, length = c.model.image.size, c.model.text.length
    batch = {
        "images": jax.ShapeDtypeStruct((rows, *frames_of(c), size, size, 3), jnp.uint8),
        "tokens": jax.ShapeDtypeStruct((rows, length), jnp.int32),
    } | ({"labels": jax.ShapeDtypeStruct((rows,), jnp.int32)} if c.loss.lambda_cls else {})

    def backward(params: Any, batch: Any) -> Any:
        trained, fixed = frozen.split(params, frozen.patterns(c))
        return jax.vjp(lambda p: loss_function(c, frozen.join(p, fixed), batch)[0], trained)[1]

    # The backward pass is a tree, whose leaves are what it needs of the forward pass.
    leaves = jax.tree.leaves(jax.eval_shape(backward, abstract_parameters(c), batch))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
