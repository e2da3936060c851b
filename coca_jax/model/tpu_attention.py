"""Softmax attention as a Pallas TPU kernel in the layout of the projections around it.

An image has hundreds of tokens and a caption fewer, so all scores of a query fit in the chip's scratch memory. The
softmax therefore needs no running sums. As in FlashAttention (Dao et al. 2022, arXiv 2205.14135) the weights never
reach main memory; the backward pass recomputes them, in one kernel that needs only the forward pass's inputs.

TPU registers have 128 lanes, and heads are often 64 wide. `[b, s, h, k]` is read as `[b, s, h k]`, in columns of whole
registers that hold one or several heads. For each head, the other heads' lanes of keys and values are zeroed: they add
nothing to the scores, and results appear in the head's own lanes. A product with 64 lanes would take just as long.
JAX's own TPU kernels need `[b, h, s, k]`: a transposition of each array, there and back, into a layout with half of its
lanes empty.

Axes: b batch, s query positions, m key positions, h heads, k head width, c columns (h k).
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
from coca_jax.model.heads_first import MASKED_SCORE

# Interpret the kernels in XLA, on any platform: for tests. Orders of magnitude slower.
INTERPRET = False
LANES = 128  # lanes of a TPU vector register
_SCORES = 2**18  # scores of one head computed at a time, 1 MiB
_HEADS = 8  # heads per kernel call: the code is unrolled over them
_BLOCKS = 6 * 2**20  # bytes of all arrays in one call of the backward pass, where possible


def attend(
    query: Float[Array, "b s h k"],
    keys: Float[Array, "b m h k"],
    values: Float[Array, "b m h k"],
    allowed: Bool[Array, "#b 1 s m"] | None = None,
    *,
    is_causal: bool = False,
) -> Float[Array, "b s h k"]:
    """`softmax(query keys^T / sqrt(k)) values` per head, with a float32 softmax (Vaswani et al. 2017, section 3.2.1).

    Args:
      query, keys, values: Arrays of one dtype, bfloat16 or float32, which is also the dtype of the result.
      allowed: True where query s may attend to key m; None allows all. A query without keys weighs all keys equally.
      is_causal: Each query attends to its own and earlier positions; requires s = m.

    Raises:
      ValueError: There are more keys than `config.flash_keys`.
    """
    b, s, h, k = query.shape
    m = keys.shape[1]
    if m > (limit := config.flash_keys(query.dtype.name, k)):
        raise ValueError(
            f"attention to {m} keys: model.attention='flash' supports at most {limit}; use model.attention='xla'"
        )
    width, lanes = _widths(h, k)
    query, keys, values = (
        x if width == k else jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - k))) for x in (query, keys, values)
    )
    shape = _Shape(s, m, h, width, k**-0.5, is_causal, lanes, query.dtype.itemsize, allowed is not None)
    mask = None if allowed is None else allowed[:, 0].astype(jnp.int32)
    output = _attend(shape, *(x.reshape(b, x.shape[1], -1) for x in (query, keys, values)), mask)
    return checkpoint_name(output.reshape(b, s, h, width)[..., :k], KERNEL_OUTPUT)


def _widths(h: int, k: int) -> tuple[int, int]:
    """Columns per head, and columns processed together: whole registers, or all columns if there are few."""
    if h * k < LANES:
        return k, h * k
    if LANES % k == 0 and h * k % LANES == 0:
        return k, LANES
    padded = -(-k // LANES) * LANES
    return padded, padded


@dataclasses.dataclass(frozen=True)
class _Shape:
    """Static shape of a kernel: `k` is the (padded) head width, `lanes` the number of columns processed together."""

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
        """Rows of keys and values in memory, rounded up to whole registers of scores."""
        return -(-self.m // LANES) * LANES

    @property
    def queries(self) -> int:
        """Queries in memory at a time, one of `parts`."""
        return -(-self.s // (self.parts * LANES)) * LANES

    @property
    def parts(self) -> int:
        # float32 products take several passes, and a mask needs as much memory as the scores.
        scores = _SCORES // (self.itemsize // 2) // (1 + self.masked) // -(-self.lanes // LANES)
        return math.ceil(self.s / max(LANES, scores // self.keys // LANES * LANES))

    @property
    def columns(self) -> int:
        """Columns in memory at a time."""
        # Three arrays of queries and four of keys, double-buffered for the next call, and two accumulators.
        each = 2 * self.itemsize * (3 * self.queries + 4 * self.keys) + 2 * 4 * self.keys
        limit = min(_BLOCKS // (each * self.lanes), _HEADS * self.k // self.lanes)
        count = self.h * self.k // self.lanes
        return self.lanes * max(n for n in range(1, count + 1) if count % n == 0 and n <= max(1, limit))

    def cost(self, b: int, products: int, arrays: int) -> pl.CostEstimate:
        return pl.CostEstimate(
            flops=products * 2 * b * self.s * self.m * self.h * self.k,
            transcendentals=b * self.h * self.s * self.m,
            bytes_accessed=arrays * b * max(self.s, self.m) * self.h * self.k * self.itemsize,
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(shape: _Shape, query: Array, keys: Array, values: Array, mask: Array | None) -> Array:
    blocks = _Blocks(shape, query, mask)
    output: Array = pl.pallas_call(
        functools.partial(_forward_kernel, shape),
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        in_specs=[blocks.queries, blocks.keys, blocks.keys, *blocks.mask(transposed=False)],
        out_specs=blocks.queries,
        cost_estimate=shape.cost(query.shape[0], 2, 4),
        name="attention",
        **blocks.options,
    )(query, keys, values, *([] if mask is None else [mask]))
    return output


def _forward(shape: _Shape, query: Array, keys: Array, values: Array, mask: Array | None) -> tuple[Array, Any]:
    return _attend(shape, query, keys, values, mask), (query, keys, values, mask)


def _backward(shape: _Shape, residuals: Any, d_output: Array) -> tuple[Array, Array, Array, None]:
    query, keys, values, mask = residuals
    blocks = _Blocks(shape, query, mask)
    sums = pltpu.VMEM((shape.keys, shape.columns), jnp.float32)
    grads = pl.pallas_call(
        functools.partial(_backward_kernel, shape),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, keys, values)],
        in_specs=[blocks.queries, blocks.keys, blocks.keys, blocks.queries, *blocks.mask(transposed=True)],
        out_specs=[blocks.queries, blocks.keys, blocks.keys],
        scratch_shapes=[sums, sums],
        cost_estimate=shape.cost(query.shape[0], 5, 7),
        name="attention_backward",
        **blocks.options,
    )(query, keys, values, d_output, *([] if mask is None else [mask.swapaxes(1, 2)]))
    return *grads, None


_attend.defvjp(_forward, _backward)


class _Blocks:
    """Block specs of one kernel call: one batch row, some columns, one part of the queries."""

    def __init__(self, shape: _Shape, query: Array, mask: Array | None):
        b = query.shape[0]
        self._shape, self._mask = shape, mask
        self.queries = pl.BlockSpec((1, shape.queries, shape.columns), lambda row, column, part: (row, part, column))
        self.keys = pl.BlockSpec((1, shape.keys, shape.columns), lambda row, column, part: (row, 0, column))
        self.options: dict[str, Any] = {
            "grid": (b, shape.h * shape.k // shape.columns, shape.parts),
            # Parts of the queries run in sequence, because their key gradients are accumulated.
            "compiler_params": pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
            "interpret": INTERPRET,
        }

    def mask(self, *, transposed: bool) -> Sequence[pl.BlockSpec]:
        if self._mask is None:
            return ()
        one, queries, keys = self._mask.shape[0] == 1, self._shape.queries, self._shape.keys
        if transposed:
            return (pl.BlockSpec((1, keys, queries), lambda row, column, part: (0 if one else row, 0, part)),)
        return (pl.BlockSpec((1, queries, keys), lambda row, column, part: (0 if one else row, part, 0)),)


def _forward_kernel(shape: _Shape, query_ref: Any, keys_ref: Any, values_ref: Any, *rest: Any) -> None:
    *mask_ref, output_ref = rest
    allowed = _allowed(shape, mask_ref, queries=0)

    def begin(head: _Head) -> Array:
        keys = head.select_lanes(_rows(keys_ref[0, :, head.columns], shape.m))
        return _multiply(query_ref[0, :, head.columns], keys, 1, 1) * shape.scale

    output = jnp.zeros((shape.queries, shape.lanes), jnp.float32)
    for head, scores in _pipelined_heads(shape, begin):
        scores = _mask_scores(shape, scores, allowed, queries=0)
        weights = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
        total = jnp.sum(weights, axis=1, keepdims=True)
        values = head.select_lanes(_rows(values_ref[0, :, head.columns], shape.m))
        output += _multiply(weights.astype(values.dtype), values, 1, 0) / total
        if head.last:
            output_ref[0, :, head.columns] = output.astype(output_ref.dtype)
            output = jnp.zeros_like(output)


def _backward_kernel(
    shape: _Shape, query_ref: Any, keys_ref: Any, values_ref: Any, d_output_ref: Any, *rest: Any
) -> None:
    """Backward pass. Scores are `[m, s]`, keys first, so that only one of five products needs a transposed operand."""
    *mask_ref, d_query_ref, d_keys_ref, d_values_ref, keys_sum, values_sum = rest
    part = pl.program_id(2)
    allowed = _allowed(shape, mask_ref, queries=1)

    @pl.when(part == 0)
    def _() -> None:
        keys_sum[...] = jnp.zeros_like(keys_sum)
        values_sum[...] = jnp.zeros_like(values_sum)

    valid = shape.s - part * shape.queries if shape.s % shape.queries else shape.s

    def load(columns: slice) -> tuple[Array, ...]:
        blocks = (query_ref, valid), (d_output_ref, valid), (keys_ref, shape.m), (values_ref, shape.m)
        return tuple(_rows(ref[0, :, columns], count) for ref, count in blocks)

    def begin(head: _Head) -> tuple[Array, Array]:
        query, d_output, keys, values = load(head.columns)
        scores = _multiply(head.select_lanes(keys), query, 1, 1) * shape.scale
        return scores, _multiply(head.select_lanes(values), d_output, 1, 1)

    d_query = jnp.zeros((shape.queries, shape.lanes), jnp.float32)
    for head, (scores, d_weights) in _pipelined_heads(shape, begin):
        scores = _mask_scores(shape, scores, allowed, queries=1)
        weights = jnp.exp(scores - jnp.max(scores, axis=0, keepdims=True))
        weights = weights / jnp.sum(weights, axis=0, keepdims=True)
        correction = jnp.sum(weights * d_weights, axis=0, keepdims=True)
        d_scores = weights * (d_weights - correction) * shape.scale
        if allowed is not None:
            d_scores = jnp.where(allowed, d_scores, 0)  # a query without keys has weights but no gradient
        query, d_output, keys = (head.select_lanes(x) for x in load(head.columns)[:3])
        d_scores = d_scores.astype(query.dtype)
        d_query += _multiply(d_scores, keys, 0, 0)
        keys_sum[:, head.columns] += _multiply(d_scores, query, 1, 0)
        values_sum[:, head.columns] += _multiply(weights.astype(query.dtype), d_output, 1, 0)
        if head.last:
            d_query_ref[0, :, head.columns] = d_query.astype(d_query_ref.dtype)
            d_query = jnp.zeros_like(d_query)

    @pl.when(part == shape.parts - 1)
    def _() -> None:
        d_keys_ref[0] = keys_sum[...].astype(d_keys_ref.dtype)
        d_values_ref[0] = values_sum[...].astype(d_values_ref.dtype)


class _Head(NamedTuple):
    """One head of a kernel call."""

    columns: slice  # columns that contain the head
    last: bool  # it is the last head in those columns
    select_lanes: Callable[[Array], Array]  # zeroes the other heads' lanes


def _pipelined_heads(shape: _Shape, begin: Callable[[_Head], Any]) -> Iterator[tuple[_Head, Any]]:
    """Yield each head with `begin(head)`, computed one head ahead of its use.

    The compiler keeps the program's order, so this gives the matrix unit work while the vector unit computes a softmax.
    By the compiler's schedule for a v5e (256 tokens, six heads of 64): 2,173 instead of 2,446 cycles forward and 4,984
    instead of 5,900 backward.
    """
    count = shape.lanes // shape.k
    heads = [
        _Head(slice(start, start + shape.lanes), number == count - 1, _lane_selector(shape, number))
        for start in range(0, shape.columns, shape.lanes)
        for number in range(count)
    ]
    upcoming = begin(heads[0])
    for number, head in enumerate(heads):
        current = upcoming
        upcoming = begin(heads[number + 1]) if number + 1 < len(heads) else None
        yield head, current


def _lane_selector(shape: _Shape, head: int) -> Callable[[Array], Array]:
    """Function that keeps the lanes of one head and zeroes the other lanes of its columns."""

    def select_lanes(x: Array) -> Array:
        if shape.lanes == shape.k:
            return x
        lane = lax.broadcasted_iota(jnp.int32, x.shape, 1)
        valid = (lane >= head * shape.k) & (lane < (head + 1) * shape.k)
        return jnp.where(valid, x.astype(jnp.float32), 0).astype(x.dtype)

    return select_lanes


def _rows(x: Array, count: Any) -> Array:
    """Zero the rows beyond `count`, where a block's contents are undefined and could be NaN."""
    if isinstance(count, int) and count >= x.shape[0]:
        return x
    valid = lax.broadcasted_iota(jnp.int32, x.shape, 0) < count
    return jnp.where(valid, x.astype(jnp.float32), 0).astype(x.dtype)


def _allowed(shape: _Shape, mask_ref: Sequence[Any], *, queries: int) -> Array | None:
    """Attention mask of this part of the queries, which are axis `queries` of the result."""
    sizes = [shape.keys, shape.keys]
    sizes[queries] = shape.queries
    allowed = mask_ref[0][0] != 0 if mask_ref else None
    if shape.is_causal:
        position = lax.broadcasted_iota(jnp.int32, sizes, queries) + pl.program_id(2) * shape.queries
        causal = lax.broadcasted_iota(jnp.int32, sizes, 1 - queries) <= position
        allowed = causal if allowed is None else allowed & causal
    return allowed


def _mask_scores(shape: _Shape, scores: Array, allowed: Array | None, *, queries: int) -> Array:
    if allowed is not None:
        scores = jnp.where(allowed, scores, MASKED_SCORE)
    if shape.m < shape.keys:  # padding keys: lower than any other score, so that they never get weight
        valid = lax.broadcasted_iota(jnp.int32, scores.shape, 1 - queries) < shape.m
        scores = jnp.where(valid, scores, -jnp.inf)
    return scores


def _multiply(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
    """Matrix product in float32, contracted over one axis of each operand."""
    # The only bfloat16 precision in TPU kernels, whatever jax.default_matmul_precision says.
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    numbers = (((x_axis,), (y_axis,)), ((), ()))
    return lax.dot_general(x, y, numbers, precision=precision, preferred_element_type=jnp.float32)
