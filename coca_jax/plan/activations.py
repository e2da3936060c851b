"""Memory of activations kept from the forward to the backward pass, counted in the traced loss."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from coca_jax import config
from coca_jax.train import frozen
from coca_jax.train.state import abstract_parameters, frames_of
from coca_jax.train.step import loss_function

_ROWS = 64  # large enough that terms quadratic in the rows are small beside the linear ones


def residual_bytes_per_row(c: config.Config, rows: float) -> float:
    """Bytes per image-text pair that are kept from the forward to the backward pass.

    Counts the program as written, including remat policies. The compiler may keep less by recomputing more.

    Args:
      c: Configuration; no mesh may be set.
      rows: Rows per device and microbatch; they decide whether the captioning loss is chunked.
    """
    # Decide for these rows, because of the two row counts below one might be chunked and the other not.
    unchunked = not 0 < c.loss.caption_chunk < rows * c.model.text.length
    c = dataclasses.replace(c, loss=dataclasses.replace(c.loss, caption_chunk=0 if unchunked else 1))
    return (_residual_bytes(c, 2 * _ROWS) - _residual_bytes(c, _ROWS)) / _ROWS


def _residual_bytes(c: config.Config, rows: int) -> int:
    c = dataclasses.replace(c, batch_size=rows, microbatches=1)
    size, length = c.model.image.size, c.model.text.length
    batch = {
        "images": jax.ShapeDtypeStruct((rows, *frames_of(c), size, size, 3), jnp.uint8),
        "tokens": jax.ShapeDtypeStruct((rows, length), jnp.int32),
    } | ({"labels": jax.ShapeDtypeStruct((rows,), jnp.int32)} if c.loss.lambda_cls else {})

    def backward(params: Any, batch: Any) -> Any:
        trained, fixed = frozen.split(params, frozen.patterns(c))
        return jax.vjp(lambda p: loss_function(c, frozen.join(p, fixed), batch)[0], trained)[1]

    # The backward function is a pytree whose leaves are the saved residuals.
    leaves = jax.tree.leaves(jax.eval_shape(backward, abstract_parameters(c), batch))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
