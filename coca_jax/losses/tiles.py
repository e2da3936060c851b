"""The contrastive losses tile by tile: neither the similarities `[b, b]` nor one device's rows of them are ever held.

Forward: what the loss needs of every row and every column of the similarities (`Lines`) is gathered up from tiles, the
log-sum-exp in its streaming form (Milakov and Gimelshein, arXiv 1805.02867). Backward: each tile is computed again, and
its gradient goes straight into those of the features. From the one to the other only the features and a few numbers a
row are kept.

Over the mesh a device keeps its images, and the texts come by. Gathering all of them is one collective, but they, their
gradient and the buffers of both take the memory of b rows on every device. Handing them on around a ring of devices
(SigLIP, arXiv 2303.15343, section 3.3) takes that of b / devices rows, but as many steps as there are devices, on a pod
each of them too small to keep a chip busy. Both move the same bytes. So the tile decides: neighbours whose texts
together fill a tile gather them, and the groups form the ring. With a tile of 4,096, 16 chips of 4,096 rows are a ring
of 16, and 2,048 chips of 32 rows are a ring of 16 groups of 128. Between groups a device hands on its own rows only, so
that little crosses the slow links between slices.

Axes: b rows of the global batch, r and c rows and columns of a part of the similarities, e the contrastive space.
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

ROWS: Axes = ("batch",)  # logical axes: each device has its rows
WHOLE: Axes = ()  # each device has all


class Lines(NamedTuple):
    """What the loss needs of each of r lines (rows or columns) of the similarities. float32.

    Attributes:
      top: `[r]` the largest logit.
      total: `[r]` softmax: the sum of exp(logit - top); sigmoid: the sum of the pairs' losses.
      own: `[r]` the logit of the pair that belongs together.
    """

    top: Array
    total: Array
    own: Array


def similarities(image_features: Float[Array, "r e"], text_features: Float[Array, "c e"]) -> Float[Array, "r c"]:
    """Scalar products, float32. At "highest" precision: a TPU would round float32 features to bfloat16 otherwise."""
    return jnp.einsum(
        "re,ce->rc", image_features, text_features, preferred_element_type=jnp.float32, precision="highest"
    )


def pair_losses(logits: Float[Array, "r c"], own: Bool[Array, "r c"]) -> Float[Array, "r c"]:
    """-log sigmoid(logit) of pairs that belong together, -log sigmoid(-logit) of all others (arXiv 2303.15343)."""
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
    """The loss, and the shares of rows and of columns whose own pair scores highest (those have no gradient).

    Over the mesh that `jax.set_mesh` has set; without one, on one device. Can be differentiated once, in reverse.

    Args:
      kind: softmax | sigmoid.
      tile: rows and columns of the similarities that are held at a time, 1 or more; it need not divide anything.
      image_features, text_features: row i of one belongs to row i of the other.
      logit_scale, logit_bias: the logits are `logit_scale * image @ text + logit_bias`.

    Raises:
      ValueError: the mesh does not divide the rows.
    """
    return _forward(kind, tile, image_features, text_features, logit_scale, logit_bias)[0]


def _forward(kind: str, tile: int, x: Array, y: Array, scale: Array, bias: Array) -> tuple[Any, Any]:
    ring = _ring(len(x), tile)

    def gather_up(x: Array, y: Array, scale: Array, bias: Array) -> tuple[Lines, Lines]:
        ids = ring.index() * len(x) + jnp.arange(len(x))

        def visit(carry: tuple[Array, Lines, Lines], step: Array | int) -> tuple[Any, None]:
            y, rows, columns = carry
            arriving = ring.hand_on(y)  # does not wait for the work on this block, and so travels meanwhile
            block, first = ring.gather(y), ring.first_column(step, len(y))
            rows, part = _block_lines(kind, tile, scale, bias, (x, ids, rows), (block, first + jnp.arange(len(block))))
            return (arriving, rows, jax.tree.map(lambda a, b: _put(a, b, first), columns, part)), None

        _, rows, columns = ring.go_round(visit, (y, _no_lines(len(x)), _no_lines(ring.size * len(y))))
        return rows, ring.combine(kind, columns)

    if ring.size > 1:
        gather_up = per_device(gather_up, (ROWS, ROWS, WHOLE, WHOLE), (ROWS, WHOLE))
    rows, columns = gather_up(x, y, scale, bias)
    # A row's and a column's sum hold the same pairs with the sigmoid: half of each is the sum over all pairs / b.
    loss = (jnp.mean(_line_losses(kind, rows)) + jnp.mean(_line_losses(kind, columns))) / 2
    accuracies = (jnp.mean(lines.own >= lines.top) for lines in (rows, columns))
    return (loss, *accuracies), (x, y, scale, bias, rows, columns)


def _backward(kind: str, tile: int, kept: Any, slopes: Any) -> tuple[Array, Array, Array, Array]:
    x, y, scale, bias, rows, columns = kept
    ring = _ring(len(x), tile)

    def gather_up(
        x: Array, y: Array, scale: Array, bias: Array, rows: Lines, columns: Lines
    ) -> tuple[Array, Array, Array]:
        ids = ring.index() * len(x) + jnp.arange(len(x))

        def visit(carry: tuple[Array, Array, Array, Array], step: Array | int) -> tuple[Any, None]:
            y, dy, dx, db = carry
            # The gradient follows its texts one step behind: it too travels while this block is worked on.
            arriving, dy = ring.hand_on(y), ring.hand_on(dy)
            block, first = ring.gather(y), ring.first_column(step, len(y))
            part = block, first + jnp.arange(len(block)), jax.tree.map(lambda a: _cut(a, first, len(block)), columns)
            (dx, db), dblock = _block_gradients(kind, tile, scale, bias, (x, ids, rows, (dx, db)), part)
            return (arriving, dy + ring.scatter(dblock), dx, db), None

        zeros = jnp.zeros(x.shape, jnp.float32)
        _, dy, dx, db = ring.go_round(visit, (y, zeros, zeros, zeros[:, 0]))
        return dx, ring.hand_on(dy), db

    if ring.size > 1:
        gather_up = per_device(gather_up, (ROWS, ROWS, WHOLE, WHOLE, ROWS, WHOLE), (ROWS, ROWS, ROWS))
    dx, dy, db = gather_up(x, y, scale, bias, rows, columns)
    slope = slopes[0] / len(x)
    # The scale's gradient is the sum of slope times similarity over all pairs: dx holds the sums over the texts.
    dscale = slope * jnp.sum(dx * x.astype(jnp.float32))
    dx, dy = ((slope * scale * d).astype(features.dtype) for d, features in ((dx, x), (dy, y)))
    return dx, dy, dscale.astype(scale.dtype), (slope * jnp.sum(db)).astype(bias.dtype)


tiled.defvjp(_forward, _backward)


# ---------------------------------------------------------------------------------------------------------------------
# The two losses, in a tile


def _logits(x: Array, y: Array, row_ids: Array, column_ids: Array, scale: Array, bias: Array) -> tuple[Array, Array]:
    """A tile's logits, and which of them are of pairs that belong together."""
    return similarities(x, y) * scale + bias, row_ids[:, None] == column_ids[None, :]


def _no_lines(count: int) -> Lines:
    zeros = jnp.zeros(count, jnp.float32)
    return Lines(top=zeros - jnp.inf, total=zeros, own=zeros)


def _add(kind: str, lines: Lines, logits: Array, own: Array, axis: int) -> Lines:
    """Adds a tile to what is known of its rows (axis 1: summed over columns) or its columns (axis 0)."""
    top = jnp.maximum(lines.top, jnp.max(logits, axis))
    terms = jnp.exp(logits - jnp.expand_dims(top, axis)) if kind == "softmax" else pair_losses(logits, own)
    total = _rescaled(kind, lines, top) + jnp.sum(terms, axis)
    return Lines(top, total, lines.own + jnp.sum(jnp.where(own, logits, 0.0), axis))


def _rescaled(kind: str, lines: Lines, top: Array) -> Array:
    """`lines.total` with respect to another top."""
    return lines.total * jnp.exp(lines.top - top) if kind == "softmax" else lines.total


def _line_losses(kind: str, lines: Lines) -> Array:
    return lines.top + jnp.log(lines.total) - lines.own if kind == "softmax" else lines.total


def _slopes(kind: str, logits: Array, own: Array, rows: Lines, columns: Lines) -> Array:
    """b times the loss's derivative by each logit."""
    if kind == "sigmoid":
        return jnp.where(own, -jax.nn.sigmoid(-logits), jax.nn.sigmoid(logits))
    # Top and total apart, not their log-sum-exp: logits are as large as 100, where float32 keeps 5 digits of them.
    of_row = jnp.exp(logits - rows.top[:, None]) / rows.total[:, None]
    of_column = jnp.exp(logits - columns.top[None, :]) / columns.total[None, :]
    return (of_row + of_column) / 2 - own


# ---------------------------------------------------------------------------------------------------------------------
# From tiles to a block: all rows of a device and the columns that are with it


def _block_lines(
    kind: str,
    tile: int,
    scale: Array,
    bias: Array,
    of_rows: tuple[Array, Array, Lines],
    of_columns: tuple[Array, Array],
) -> tuple[Lines, Lines]:
    """The rows' lines with this block's columns added, and the columns' lines of this device's rows."""
    x, row_ids, rows = of_rows

    def some_columns(rows: Lines, part: tuple[Array, Array]) -> tuple[Lines, Lines]:
        y, column_ids = part

        def some_rows(columns: Lines, part: tuple[Array, Array, Lines]) -> tuple[Lines, Lines]:
            x, row_ids, rows = part
            logits, own = _logits(x, y, row_ids, column_ids, scale, bias)
            return _add(kind, columns, logits, own, 0), _add(kind, rows, logits, own, 1)

        columns, rows = scan_in_slices(some_rows, _no_lines(len(y)), (x, row_ids, rows), tile)
        return rows, columns

    return scan_in_slices(some_columns, rows, of_columns, tile)


def _block_gradients(
    kind: str,
    tile: int,
    scale: Array,
    bias: Array,
    of_rows: tuple[Array, Array, Lines, tuple[Array, Array]],
    of_columns: tuple[Array, Array, Lines],
) -> tuple[tuple[Array, Array], Array]:
    """The rows' sums of slopes times texts, and of slopes, with this block's added; its sums of slopes times images."""
    x, row_ids, rows, sums = of_rows

    def some_columns(sums: tuple[Array, Array], part: tuple[Array, Array, Lines]) -> tuple[Any, Array]:
        y, column_ids, columns = part

        def some_rows(dy: Array, part: tuple[Array, Array, Lines, tuple[Array, Array]]) -> tuple[Array, Any]:
            x, row_ids, rows, (dx, db) = part
            logits, own = _logits(x, y, row_ids, column_ids, scale, bias)
            slopes = _slopes(kind, logits, own, rows, columns)
            dx += jnp.einsum("rc,ce->re", slopes, y, preferred_element_type=jnp.float32, precision="highest")
            dy += jnp.einsum("rc,re->ce", slopes, x, preferred_element_type=jnp.float32, precision="highest")
            return dy, (dx, db + jnp.sum(slopes, axis=1))

        dy, sums = scan_in_slices(some_rows, jnp.zeros(y.shape, jnp.float32), (x, row_ids, rows, sums), tile)
        return sums, dy

    return scan_in_slices(some_columns, sums, of_columns, tile)


def _put(whole: Array, part: Array, first: Array | int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(whole, part, first, axis=0)


def _cut(whole: Array, first: Array | int, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(whole, first, size, axis=0)


# ---------------------------------------------------------------------------------------------------------------------
# From blocks to the batch: around the devices


@dataclasses.dataclass(frozen=True)
class _Ring:
    """The devices over which the batch is split, `group` neighbours at a time.

    Without a mesh it is one device, and nothing moves. Methods are called by what runs on each device.

    Attributes:
      axes: of the mesh, in the order in which they split the batch.
      size: devices.
      group: how many of them gather their texts; divides size.
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
        """Number of the first text that is here after some steps, with `rows` texts a device."""
        return (self.index() // self.group + step) % self.steps * self.group * rows

    def hand_on(self, x: Array) -> Array:
        """To the same device of the group before; what is returned comes from the group behind."""
        pairs = [(device, (device - self.group) % self.size) for device in range(self.size)]
        return jax.lax.ppermute(x, self.axes, pairs) if self.steps > 1 else x

    def gather(self, x: Float[Array, "r e"]) -> Float[Array, "c e"]:
        """The group's rows, in order."""
        if self.group == 1:
            return x
        return jax.lax.all_gather(x, self.axes, axis_index_groups=self._groups(), tiled=True)

    def scatter(self, x: Float[Array, "c e"]) -> Float[Array, "r e"]:
        """The group's sum, of which each device gets its own rows."""
        if self.group == 1:
            return x
        return jax.lax.psum_scatter(x, self.axes, axis_index_groups=self._groups(), tiled=True)

    def _groups(self) -> list[list[int]]:
        return [list(range(first, first + self.group)) for first in range(0, self.size, self.group)]

    def combine(self, kind: str, lines: Lines) -> Lines:
        """Lines of all columns, of each device's rows -> of all rows."""
        if self.size == 1:
            return lines
        top = jax.lax.pmax(lines.top, self.axes)
        total, own = jax.lax.psum((_rescaled(kind, lines, top), lines.own), self.axes)
        return Lines(top, total, own)

    def go_round(self, visit: Callable[[Any, Array | int], tuple[Any, None]], carry: Any) -> Any:
        """The carry after `visit(carry, step)` of each step, when every text has come by."""
        return (visit(carry, 0) if self.steps == 1 else jax.lax.scan(visit, carry, jnp.arange(self.steps)))[0]


def _ring(rows: int, tile: int) -> _Ring:
    """The mesh's devices, as many to a group as have no more texts together than fill a tile."""
    axes, size = mesh_axes("batch")
    if rows % size:
        raise ValueError(
            f"a batch of {rows} rows is not divisible by the {size} shards of the mesh: the contrastive loss in tiles "
            f"needs {rows // size * size} or {(rows // size + 1) * size} rows, or config.loss.contrastive_tile=0"
        )
    groups = [group for group in range(1, size + 1) if size % group == 0 and group * (rows // size) <= tile]
    return _Ring(axes, size, max(groups, default=1))
