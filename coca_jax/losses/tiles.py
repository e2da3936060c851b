"""Contrastive losses in tiles: the similarity matrix `[b, b]` is never in memory, nor one device's rows of it.

Forward: the statistics of each row and column of the similarities that the loss needs (`LineStats`) are accumulated
over tiles, with a streaming log-sum-exp (Milakov and Gimelshein, arXiv 1805.02867). Backward: each tile is recomputed
and its gradient is added to those of the features. Only the features and a few numbers per row are stored between the
two.

On a mesh each device keeps its images and visits all texts. Gathering the texts takes one collective, but texts, their
gradient and the buffers of both need the memory of b rows on every device. A ring (SigLIP, arXiv 2303.15343, section
3.3) needs memory for b / devices rows, but as many steps as devices, and on a pod each step is too small to keep a chip
busy. Both move the same bytes. The tile size decides: neighboring devices whose texts together fill a tile form a group
that gathers its texts, and the groups form the ring. With tile 4,096, 16 chips of 4,096 rows are a ring of 16, and
2,048 chips of 32 rows are a ring of 16 groups of 128. Between groups a device sends only its own rows, so that little
traffic crosses the slow links between slices.

Axes: b rows of the global batch, r and c rows and columns of a part of the similarities, e contrastive space.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coca_jax.losses.parts import Axes, mesh_axes, per_device, scan_in_slices

ROWS: Axes = ("batch",)  # logical axes: each device has its own rows
WHOLE: Axes = ()  # replicated


class LineStats(NamedTuple):
    """Statistics of r rows or columns of the logits. float32.

    Attributes:
      top: `[r]` the largest logit.
      total: `[r]` softmax: sum of exp(logit - top); sigmoid: sum of the pair losses.
      own: `[r]` the logit of the matching pair.
    """

    top: Array
    total: Array
    own: Array


def similarities(image_features: Float[Array, "r e"], text_features: Float[Array, "c e"]) -> Float[Array, "r c"]:
    """Dot products in float32. Precision "highest", because a TPU would round float32 features to bfloat16."""
    return jnp.einsum(
        "re,ce->rc", image_features, text_features, preferred_element_type=jnp.float32, precision="highest"
    )


def pair_losses(logits: Float[Array, "r c"], own: Bool[Array, "r c"]) -> Float[Array, "r c"]:
    """Pairwise sigmoid losses: -log sigmoid(logit) if `own`, else -log sigmoid(-logit) (arXiv 2303.15343)."""
    return jax.nn.softplus(jnp.where(own, -logits, logits))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def tiled(
    kind: str,
    tile: int,
    image_features: Float[Array, "b e"],
    text_features: Float[Array, "b e"],
    logit_scale: Float[Array, ""],
    logit_bias: Float[Array, ""],
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Contrastive loss, and accuracies over rows and over columns; the accuracies have no gradient.

    Uses the mesh set with `jax.set_mesh`, or one device without it. Differentiable once, in reverse mode.

    Args:
      kind: softmax or sigmoid.
      tile: Rows and columns of the similarity matrix in memory at a time, 1 or more; need not divide anything.
      image_features, text_features: Row i of one matches row i of the other.
      logit_scale, logit_bias: The logits are `logit_scale * image @ text + logit_bias`.

    Raises:
      ValueError: The mesh does not divide the rows.
    """
    return _forward(kind, tile, image_features, text_features, logit_scale, logit_bias)[0]


def _forward(kind: str, tile: int, x: Array, y: Array, scale: Array, bias: Array) -> tuple[Any, Any]:
    ring = _ring(len(x), tile)

    def accumulate(x: Array, y: Array, scale: Array, bias: Array) -> tuple[LineStats, LineStats]:
        ids = ring.index() * len(x) + jnp.arange(len(x))

        def visit(carry: tuple[Array, LineStats, LineStats], step: Array | int) -> tuple[Any, None]:
            y, rows, columns = carry
            arriving = ring.pass_on(y)  # independent of this block's work, so the transfer overlaps it
            block, first = ring.gather(y), ring.first_column(step, len(y))
            rows, part = _block_stats(kind, tile, scale, bias, (x, ids, rows), (block, first + jnp.arange(len(block))))
            return (arriving, rows, jax.tree.map(lambda a, b: _put(a, b, first), columns, part)), None

        _, rows, columns = ring.visit_all(visit, (y, _empty_stats(len(x)), _empty_stats(ring.size * len(y))))
        return rows, ring.combine(kind, columns)

    if ring.size > 1:
        accumulate = per_device(accumulate, (ROWS, ROWS, WHOLE, WHOLE), (ROWS, WHOLE))
    rows, columns = accumulate(x, y, scale, bias)
    # With sigmoid, rows and columns sum the same pairs, so half of each is the sum over all pairs / b.
    loss = (jnp.mean(_stats_losses(kind, rows)) + jnp.mean(_stats_losses(kind, columns))) / 2
    accuracies = (jnp.mean(stats.own >= stats.top) for stats in (rows, columns))
    return (loss, *accuracies), (x, y, scale, bias, rows, columns)


def _backward(kind: str, tile: int, residuals: Any, d_outputs: Any) -> tuple[Array, Array, Array, Array]:
    x, y, scale, bias, rows, columns = residuals
    ring = _ring(len(x), tile)

    def accumulate(
        x: Array, y: Array, scale: Array, bias: Array, rows: LineStats, columns: LineStats
    ) -> tuple[Array, Array, Array]:
        ids = ring.index() * len(x) + jnp.arange(len(x))

        def visit(carry: tuple[Array, Array, Array, Array], step: Array | int) -> tuple[Any, None]:
            y, dy, dx, db = carry
            # The gradient follows its texts one step behind, so that its transfer overlaps this block's work.
            arriving, dy = ring.pass_on(y), ring.pass_on(dy)
            block, first = ring.gather(y), ring.first_column(step, len(y))
            part = block, first + jnp.arange(len(block)), jax.tree.map(lambda a: _cut(a, first, len(block)), columns)
            (dx, db), dblock = _block_gradients(kind, tile, scale, bias, (x, ids, rows, (dx, db)), part)
            return (arriving, dy + ring.scatter(dblock), dx, db), None

        zeros = jnp.zeros(x.shape, jnp.float32)
        _, dy, dx, db = ring.visit_all(visit, (y, zeros, zeros, zeros[:, 0]))
        return dx, ring.pass_on(dy), db

    if ring.size > 1:
        accumulate = per_device(accumulate, (ROWS, ROWS, WHOLE, WHOLE, ROWS, WHOLE), (ROWS, ROWS, ROWS))
    dx, dy, db = accumulate(x, y, scale, bias, rows, columns)
    d_loss = d_outputs[0] / len(x)
    # The scale's gradient sums d_logit * similarity over all pairs; dx holds the sums over texts.
    dscale = d_loss * jnp.sum(dx * x.astype(jnp.float32))
    dx, dy = ((d_loss * scale * d).astype(features.dtype) for d, features in ((dx, x), (dy, y)))
    return dx, dy, dscale.astype(scale.dtype), (d_loss * jnp.sum(db)).astype(bias.dtype)


tiled.defvjp(_forward, _backward)


# ---------------------------------------------------------------------------------------------------------------------
# The two losses, in a tile


def _logits(x: Array, y: Array, row_ids: Array, column_ids: Array, scale: Array, bias: Array) -> tuple[Array, Array]:
    """Logits of a tile, and which of them belong to matching pairs."""
    return similarities(x, y) * scale + bias, row_ids[:, None] == column_ids[None, :]


def _empty_stats(count: int) -> LineStats:
    zeros = jnp.zeros(count, jnp.float32)
    return LineStats(top=zeros - jnp.inf, total=zeros, own=zeros)


def _add(kind: str, stats: LineStats, logits: Array, own: Array, axis: int) -> LineStats:
    """Add a tile to the statistics of its rows (axis 1: reduced over columns) or its columns (axis 0)."""
    top = jnp.maximum(stats.top, jnp.max(logits, axis))
    terms = jnp.exp(logits - jnp.expand_dims(top, axis)) if kind == "softmax" else pair_losses(logits, own)
    total = _rescale(kind, stats, top) + jnp.sum(terms, axis)
    return LineStats(top, total, stats.own + jnp.sum(jnp.where(own, logits, 0.0), axis))


def _rescale(kind: str, stats: LineStats, top: Array) -> Array:
    """`stats.total` relative to another top."""
    return stats.total * jnp.exp(stats.top - top) if kind == "softmax" else stats.total


def _stats_losses(kind: str, stats: LineStats) -> Array:
    return stats.top + jnp.log(stats.total) - stats.own if kind == "softmax" else stats.total


def _d_logits(kind: str, logits: Array, own: Array, rows: LineStats, columns: LineStats) -> Array:
    """b times the derivative of the loss with respect to each logit."""
    if kind == "sigmoid":
        return jnp.where(own, -jax.nn.sigmoid(-logits), jax.nn.sigmoid(logits))
    # Use top and total separately, not their log-sum-exp: logits reach 100, where float32 keeps 5 digits.
    row_probs = jnp.exp(logits - rows.top[:, None]) / rows.total[:, None]
    column_probs = jnp.exp(logits - columns.top[None, :]) / columns.total[None, :]
    return (row_probs + column_probs) / 2 - own


# ---------------------------------------------------------------------------------------------------------------------
# From tiles to a block: all rows of a device and the columns that are with it


def _block_stats(
    kind: str,
    tile: int,
    scale: Array,
    bias: Array,
    row_args: tuple[Array, Array, LineStats],
    column_args: tuple[Array, Array],
) -> tuple[LineStats, LineStats]:
    """Row statistics with this block's columns added, and column statistics over this device's rows."""
    x, row_ids, rows = row_args

    def scan_columns(rows: LineStats, part: tuple[Array, Array]) -> tuple[LineStats, LineStats]:
        y, column_ids = part

        def scan_rows(columns: LineStats, part: tuple[Array, Array, LineStats]) -> tuple[LineStats, LineStats]:
            x, row_ids, rows = part
            logits, own = _logits(x, y, row_ids, column_ids, scale, bias)
            return _add(kind, columns, logits, own, 0), _add(kind, rows, logits, own, 1)

        columns, rows = scan_in_slices(scan_rows, _empty_stats(len(y)), (x, row_ids, rows), tile)
        return rows, columns

    return scan_in_slices(scan_columns, rows, column_args, tile)


def _block_gradients(
    kind: str,
    tile: int,
    scale: Array,
    bias: Array,
    row_args: tuple[Array, Array, LineStats, tuple[Array, Array]],
    column_args: tuple[Array, Array, LineStats],
) -> tuple[tuple[Array, Array], Array]:
    """Row sums of d_logits times texts and of d_logits, with this block added; column sums of d_logits times images."""
    x, row_ids, rows, sums = row_args

    def scan_columns(sums: tuple[Array, Array], part: tuple[Array, Array, LineStats]) -> tuple[Any, Array]:
        y, column_ids, columns = part

        def scan_rows(dy: Array, part: tuple[Array, Array, LineStats, tuple[Array, Array]]) -> tuple[Array, Any]:
            x, row_ids, rows, (dx, db) = part
            logits, own = _logits(x, y, row_ids, column_ids, scale, bias)
            d_logits = _d_logits(kind, logits, own, rows, columns)
            dx += jnp.einsum("rc,ce->re", d_logits, y, preferred_element_type=jnp.float32, precision="highest")
            dy += jnp.einsum("rc,re->ce", d_logits, x, preferred_element_type=jnp.float32, precision="highest")
            return dy, (dx, db + jnp.sum(d_logits, axis=1))

        dy, sums = scan_in_slices(scan_rows, jnp.zeros(y.shape, jnp.float32), (x, row_ids, rows, sums), tile)
        return sums, dy

    return scan_in_slices(scan_columns, sums, column_args, tile)


def _put(whole: Array, part: Array, first: Array | int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(whole, part, first, axis=0)


def _cut(whole: Array, first: Array | int, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(whole, first, size, axis=0)


# ---------------------------------------------------------------------------------------------------------------------
# From blocks to the batch: around the devices


@dataclasses.dataclass(frozen=True)
class _Ring:
    """The devices that split the batch, in groups of `group` neighbors.

    Without a mesh it is one device and nothing is sent. Methods run on each device.

    Attributes:
      axes: Mesh axes, in the order in which they split the batch.
      size: Number of devices.
      group: Devices that gather their texts together; divides size.
    """

    axes: tuple[str, ...] = ()
    size: int = 1
    group: int = 1

    @property
    def steps(self) -> int:
        return self.size // self.group

    def index(self) -> Int[Array, ""] | int:
        return jax.lax.axis_index(self.axes) if self.size > 1 else 0

    def first_column(self, step: Array | int, rows: int) -> Array | int:
        """Index of the first text on this device after `step` steps, with `rows` texts per device."""
        return (self.index() // self.group + step) % self.steps * self.group * rows

    def pass_on(self, x: Array) -> Array:
        """Send x to the same device of the previous group and return what the next group sends."""
        pairs = [(device, (device - self.group) % self.size) for device in range(self.size)]
        return jax.lax.ppermute(x, self.axes, pairs) if self.steps > 1 else x

    def gather(self, x: Float[Array, "r e"]) -> Float[Array, "c e"]:
        """The group's rows, in order."""
        if self.group == 1:
            return x
        return jax.lax.all_gather(x, self.axes, axis_index_groups=self._groups(), tiled=True)

    def scatter(self, x: Float[Array, "c e"]) -> Float[Array, "r e"]:
        """Sum over the group; each device gets its own rows."""
        if self.group == 1:
            return x
        return jax.lax.psum_scatter(x, self.axes, axis_index_groups=self._groups(), tiled=True)

    def _groups(self) -> list[list[int]]:
        return [list(range(first, first + self.group)) for first in range(0, self.size, self.group)]

    def combine(self, kind: str, stats: LineStats) -> LineStats:
        """Combine column statistics over each device's rows into statistics over all rows."""
        if self.size == 1:
            return stats
        top = jax.lax.pmax(stats.top, self.axes)
        total, own = jax.lax.psum((_rescale(kind, stats, top), stats.own), self.axes)
        return LineStats(top, total, own)

    def visit_all(self, visit: Callable[[Any, Array | int], tuple[Any, None]], carry: Any) -> Any:
        """Carry after `visit(carry, step)` for every step, when each device has seen all texts."""
        return (visit(carry, 0) if self.steps == 1 else jax.lax.scan(visit, carry, jnp.arange(self.steps)))[0]


def _ring(rows: int, tile: int) -> _Ring:
    """The mesh's devices, in the largest groups whose texts fit in one tile."""
    axes, size = mesh_axes("batch")
    if rows % size:
        raise ValueError(
            f"a batch of {rows} rows is not divisible by the {size} shards of the mesh: use {rows // size * size} or "
            f"{(rows // size + 1) * size} rows, or config.loss.contrastive_tile=0"
        )
    groups = [group for group in range(1, size + 1) if size % group == 0 and group * (rows // size) <= tile]
    return _Ring(axes, size, max(groups, default=1))
