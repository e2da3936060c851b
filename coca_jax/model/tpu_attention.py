"""Softmax attention as a TPU kernel that leaves queries, keys and values as the products around it write them.

A picture has hundreds of tokens and a caption fewer: a head's scores fit in the chip's scratch memory with all keys of
a query side by side. So the softmax needs no running sums (as in Dao et al. 2022, FlashAttention, arXiv 2205.14135,
whose point it keeps: the weights are never in the main memory, and the backward pass computes them again), and the
backward pass is one kernel that needs nothing but what the forward pass was given.

A TPU's registers have 128 lanes, and heads are often 64 wide. `[b, s, h, k]` is read as `[b, s, h k]`, in columns of
whole registers that hold one head or several. The others' lanes of keys and values are set to zero for each: what they
add to the scores is then nothing, and results come out in their own lanes. A product with 64 lanes would take as long.
JAX's kernels for TPUs want `[b, h, s, k]`, which is a transposition of each array, there and back, into a form with
half of its lanes empty.

Axes: b batch, s queries, m keys, h heads, k head width, c the columns h k.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from coca_jax import config
from coca_jax.model.attention import KERNEL_OUTPUT
from coca_jax.model.heads_first import HIDDEN

# Runs the kernels step by step in XLA, on any platform: for tests. Orders of magnitude slower.
INTERPRET = False
LANES = 128  # of a TPU's vector unit
_SCORES = 2**18  # of one head that are computed at a time, 1 MiB
_HEADS = 8  # that one call of a kernel goes through: each is code of its own
_BLOCKS = 6 * 2**20  # bytes that one call of the backward pass may hold of all arrays, where that is possible


def attend(
    query: Float[Array, "b s h k"],
    keys: Float[Array, "b m h k"],
    values: Float[Array, "b m h k"],
    allowed: Bool[Array, "#b 1 s m"] | None = None,
    *,
    is_causal: bool = False,
) -> Float[Array, "b s h k"]:
    """`softmax(query keys^T / sqrt(k)) values` for each head, softmax in float32 (Vaswani et al. 2017, section 3.2.1).

    Args:
      query, keys, values: of one dtype, bfloat16 or float32, which the result has too.
      allowed: True where query s may see key m; None: everywhere. A query that sees no key weighs them all the same.
      is_causal: a query sees its own position and those before; s = m.

    Raises:
      ValueError: there are more keys than `config.flash_keys`.
    """
    b, s, h, k = query.shape
    m = keys.shape[1]
    if m > (most := config.flash_keys(query.dtype.name, k)):
        raise ValueError(f"attention to {m} keys: the flash kernel takes up to {most}; model.attention='xla' any")
    width, lanes = _widths(h, k)
    query, keys, values = (
        x if width == k else jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - k))) for x in (query, keys, values)
    )
    shape = _Shape(s, m, h, width, k**-0.5, is_causal, lanes, query.dtype.itemsize, allowed is not None)
    mask = None if allowed is None else allowed[:, 0].astype(jnp.int32)
    mixed = _attend(shape, *(x.reshape(b, x.shape[1], -1) for x in (query, keys, values)), mask)
    return checkpoint_name(mixed.reshape(b, s, h, width)[..., :k], KERNEL_OUTPUT)


def _widths(h: int, k: int) -> tuple[int, int]:
    """Columns that a head takes, and that are taken together: whole heads in whole registers, or all where few are."""
    if h * k < LANES:
        return k, h * k
    if LANES % k == 0 and h * k % LANES == 0:
        return k, LANES
    whole = -(-k // LANES) * LANES
    return whole, whole


@dataclasses.dataclass(frozen=True)
class _Shape:
    """What a kernel is compiled for; `k` is the width that a head takes, `lanes` the columns taken together."""

    s: int
    m: int
    h: int
    k: int
    scale: float
    is_causal: bool
    lanes: int
    itemsize: int
    masked: bool

    @property
    def keys(self) -> int:
        """Rows that are held of keys and values: whole registers of scores."""
        return -(-self.m // LANES) * LANES

    @property
    def queries(self) -> int:
        """Queries that are held at a time, of `parts`."""
        return -(-self.s // (self.parts * LANES)) * LANES

    @property
    def parts(self) -> int:
        # Products of float32 are made of several, and a mask is held like scores.
        scores = _SCORES // (self.itemsize // 2) // (1 + self.masked) // -(-self.lanes // LANES)
        return math.ceil(self.s / max(LANES, scores // self.keys // LANES * LANES))

    @property
    def columns(self) -> int:
        """Columns that are held at a time."""
        # Three arrays of queries and four of keys, each twice: the next call's come while this one computes. Two sums.
        each = 2 * self.itemsize * (3 * self.queries + 4 * self.keys) + 2 * 4 * self.keys
        most = min(_BLOCKS // (each * self.lanes), _HEADS * self.k // self.lanes)
        count = self.h * self.k // self.lanes
        return self.lanes * max(n for n in range(1, count + 1) if count % n == 0 and n <= max(1, most))

    def cost(self, b: int, products: int, arrays: int) -> pl.CostEstimate:
        return pl.CostEstimate(
            flops=products * 2 * b * self.s * self.m * self.h * self.k,
            transcendentals=b * self.h * self.s * self.m,
            bytes_accessed=arrays * b * max(self.s, self.m) * self.h * self.k * self.itemsize,
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(shape: _Shape, query: Array, keys: Array, values: Array, mask: Array | None) -> Array:
    blocks = _Blocks(shape, query, mask)
    mixed: Array = pl.pallas_call(
        functools.partial(_forward_kernel, shape),
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        in_specs=[blocks.queries, blocks.keys, blocks.keys, *blocks.mask(turned=False)],
        out_specs=blocks.queries,
        cost_estimate=shape.cost(query.shape[0], 2, 4),
        name="attention",
        **blocks.options,
    )(query, keys, values, *([] if mask is None else [mask]))
    return mixed


def _forward(shape: _Shape, query: Array, keys: Array, values: Array, mask: Array | None) -> tuple[Array, Any]:
    return _attend(shape, query, keys, values, mask), (query, keys, values, mask)


def _backward(shape: _Shape, kept: Any, slopes: Array) -> tuple[Array, Array, Array, None]:
    query, keys, values, mask = kept
    blocks = _Blocks(shape, query, mask)
    sums = pltpu.VMEM((shape.keys, shape.columns), jnp.float32)
    found = pl.pallas_call(
        functools.partial(_backward_kernel, shape),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, keys, values)],
        in_specs=[blocks.queries, blocks.keys, blocks.keys, blocks.queries, *blocks.mask(turned=True)],
        out_specs=[blocks.queries, blocks.keys, blocks.keys],
        scratch_shapes=[sums, sums],
        cost_estimate=shape.cost(query.shape[0], 5, 7),
        name="attention_backward",
        **blocks.options,
    )(query, keys, values, slopes, *([] if mask is None else [mask.swapaxes(1, 2)]))
    return *found, None


_attend.defvjp(_forward, _backward)


class _Blocks:
    """What of each array one call of a kernel sees: a row of the batch, some columns, a part of the queries."""

    def __init__(self, shape: _Shape, query: Array, mask: Array | None):
        b = query.shape[0]
        self._shape, self._mask = shape, mask
        self.queries = pl.BlockSpec((1, shape.queries, shape.columns), lambda row, column, part: (row, part, column))
        self.keys = pl.BlockSpec((1, shape.keys, shape.columns), lambda row, column, part: (row, 0, column))
        self.options: dict[str, Any] = {
            "grid": (b, shape.h * shape.k // shape.columns, shape.parts),
            # Parts of the queries come one after the other: their gradients of the keys are added up.
            "compiler_params": pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
            "interpret": INTERPRET,
        }

    def mask(self, *, turned: bool) -> Sequence[pl.BlockSpec]:
        if self._mask is None:
            return ()
        one, queries, keys = self._mask.shape[0] == 1, self._shape.queries, self._shape.keys
        if turned:
            return (pl.BlockSpec((1, keys, queries), lambda row, column, part: (0 if one else row, 0, part)),)
        return (pl.BlockSpec((1, queries, keys), lambda row, column, part: (0 if one else row, part, 0)),)


def _forward_kernel(shape: _Shape, query_ref: Any, keys_ref: Any, values_ref: Any, *rest: Any) -> None:
    *mask_ref, mixed_ref = rest
    allowed = _allowed(shape, mask_ref, queries=0)

    def scores_of(head: _Head) -> Array:
        keys = head.own(_rows(keys_ref[0, :, head.columns], shape.m))
        return _multiply(query_ref[0, :, head.columns], keys, 1, 1) * shape.scale

    mixed = jnp.zeros((shape.queries, shape.lanes), jnp.float32)
    for head, scores in _ahead(shape, scores_of):
        scores = _hide(shape, scores, allowed, queries=0)
        shares = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
        total = jnp.sum(shares, axis=1, keepdims=True)
        values = head.own(_rows(values_ref[0, :, head.columns], shape.m))
        mixed += _multiply(shares.astype(values.dtype), values, 1, 0) / total
        if head.last:
            mixed_ref[0, :, head.columns] = mixed.astype(mixed_ref.dtype)
            mixed = jnp.zeros_like(mixed)


def _backward_kernel(
    shape: _Shape, query_ref: Any, keys_ref: Any, values_ref: Any, slopes_ref: Any, *rest: Any
) -> None:
    """Scores stand with keys in front, `[m, s]`: of five products only one then wants an operand turned around."""
    *mask_ref, d_query_ref, d_keys_ref, d_values_ref, keys_sum, values_sum = rest
    part = pl.program_id(2)
    allowed = _allowed(shape, mask_ref, queries=1)

    @pl.when(part == 0)
    def _() -> None:
        keys_sum[...] = jnp.zeros_like(keys_sum)
        values_sum[...] = jnp.zeros_like(values_sum)

    there = shape.s - part * shape.queries if shape.s % shape.queries else shape.s

    def load(columns: slice) -> tuple[Array, ...]:
        blocks = (query_ref, there), (slopes_ref, there), (keys_ref, shape.m), (values_ref, shape.m)
        return tuple(_rows(ref[0, :, columns], count) for ref, count in blocks)

    def products_of(head: _Head) -> tuple[Array, Array]:
        query, slopes, keys, values = load(head.columns)
        scores = _multiply(head.own(keys), query, 1, 1) * shape.scale
        return scores, _multiply(head.own(values), slopes, 1, 1)

    d_query = jnp.zeros((shape.queries, shape.lanes), jnp.float32)
    for head, (scores, of_shares) in _ahead(shape, products_of):
        scores = _hide(shape, scores, allowed, queries=1)
        shares = jnp.exp(scores - jnp.max(scores, axis=0, keepdims=True))
        shares = shares / jnp.sum(shares, axis=0, keepdims=True)
        taken = jnp.sum(shares * of_shares, axis=0, keepdims=True)
        of_scores = shares * (of_shares - taken) * shape.scale
        if allowed is not None:
            of_scores = jnp.where(allowed, of_scores, 0)  # a query that sees no key has weights, and no gradient
        query, slopes, keys = (head.own(x) for x in load(head.columns)[:3])
        of_scores = of_scores.astype(query.dtype)
        d_query += _multiply(of_scores, keys, 0, 0)
        keys_sum[:, head.columns] += _multiply(of_scores, query, 1, 0)
        values_sum[:, head.columns] += _multiply(shares.astype(query.dtype), slopes, 1, 0)
        if head.last:
            d_query_ref[0, :, head.columns] = d_query.astype(d_query_ref.dtype)
            d_query = jnp.zeros_like(d_query)

    @pl.when(part == shape.parts - 1)
    def _() -> None:
        d_keys_ref[0] = keys_sum[...].astype(d_keys_ref.dtype)
        d_values_ref[0] = values_sum[...].astype(d_values_ref.dtype)


class _Head(NamedTuple):
    """One head of those that a call goes through: its columns, whether it is the last in them, and its own lanes."""

    columns: slice
    last: bool
    own: Callable[[Array], Array]


def _ahead(shape: _Shape, begin: Callable[[_Head], Any]) -> Iterator[tuple[_Head, Any]]:
    """The heads of a call with what `begin` gives for each; that of the next one stands before a head's own work.

    The compiler keeps to the order that things are written in: so the matrix unit has something to do while the vector
    unit works at a softmax. By its own schedule for a v5e, of 256 tokens and six heads of 64, 2,173 instead of 2,446
    cycles forth and 4,984 instead of 5,900 back.
    """
    count = shape.lanes // shape.k
    heads = [
        _Head(slice(start, start + shape.lanes), number == count - 1, _own(shape, number))
        for start in range(0, shape.columns, shape.lanes)
        for number in range(count)
    ]
    following = begin(heads[0])
    for number, head in enumerate(heads):
        begun = following
        following = begin(heads[number + 1]) if number + 1 < len(heads) else None
        yield head, begun


def _own(shape: _Shape, head: int) -> Callable[[Array], Array]:
    """Leaves the lanes of a head and sets the others of its columns to 0."""

    def own(x: Array) -> Array:
        if shape.lanes == shape.k:
            return x
        lane = lax.broadcasted_iota(jnp.int32, x.shape, 1)
        there = (lane >= head * shape.k) & (lane < (head + 1) * shape.k)
        return jnp.where(there, x.astype(jnp.float32), 0).astype(x.dtype)

    return own


def _rows(x: Array, count: Any) -> Array:
    """The rows that an array has. Nobody knows what a block holds beyond them, and 0 times that need not be 0."""
    if isinstance(count, int) and count >= x.shape[0]:
        return x
    there = lax.broadcasted_iota(jnp.int32, x.shape, 0) < count
    return jnp.where(there, x.astype(jnp.float32), 0).astype(x.dtype)


def _allowed(shape: _Shape, mask_ref: Sequence[Any], *, queries: int) -> Array | None:
    """Who may see whom in this part of the queries, which are an axis of the result."""
    sizes = [shape.keys, shape.keys]
    sizes[queries] = shape.queries
    allowed = mask_ref[0][0] != 0 if mask_ref else None
    if shape.is_causal:
        position = lax.broadcasted_iota(jnp.int32, sizes, queries) + pl.program_id(2) * shape.queries
        causal = lax.broadcasted_iota(jnp.int32, sizes, 1 - queries) <= position
        allowed = causal if allowed is None else allowed & causal
    return allowed


def _hide(shape: _Shape, scores: Array, allowed: Array | None, *, queries: int) -> Array:
    if allowed is not None:
        scores = jnp.where(allowed, scores, HIDDEN)
    if shape.m < shape.keys:  # keys that are not there: less than any other, so that they have no share in any case
        there = lax.broadcasted_iota(jnp.int32, scores.shape, 1 - queries) < shape.m
        scores = jnp.where(there, scores, -jnp.inf)
    return scores


def _multiply(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
    """The product of two matrices in float32, summed up over one axis of each."""
    # Of bfloat16 a TPU's kernel knows no other, whatever jax.default_matmul_precision says.
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    numbers = (((x_axis,), (y_axis,)), ((), ()))
    return lax.dot_general(x, y, numbers, precision=precision, preferred_element_type=jnp.float32)
