from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coca_jax.train.checkpoint import digest


def whole(array: np.ndarray) -> int:
    """The definition, element by element, in Python's integers."""
    words = array.reshape(*array.shape, 1).view(np.uint32) if array.dtype.itemsize == 8 else array
    if array.dtype.itemsize != 8:
        words = array.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[array.dtype.itemsize])
    weights = [digest._weights(axis, 0, size).tolist() for axis, size in enumerate(words.shape)]
    total = 0
    for index in itertools.product(*map(range, words.shape)):
        value = int(words[index])
        for axis, i in enumerate(index):
            value *= weights[axis][i]
        total += value
    return total % 2**64


def drawn(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    size = int(np.prod(shape)) * jnp.dtype(dtype).itemsize
    return np.random.default_rng(0).integers(0, 256, size, np.uint8).view(jnp.dtype(dtype)).reshape(shape)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (4, 1), (2, 3, 4, 5), (0, 3)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8", "float64", "int32"])
def test_it_is_the_sum_of_its_blocks(shape: tuple[int, ...], dtype: str) -> None:
    array = drawn(shape, dtype)
    assert digest.of_array(array) == whole(array)
    cuts = [sorted({0, size // 3, size // 2, size}) for size in shape]
    total = 0
    for block in itertools.product(*(itertools.pairwise(cut) for cut in cuts)):
        total += digest.of_array(array[tuple(slice(*span) for span in block)], [start for start, _ in block])
    assert total % 2**64 == whole(array)


def test_long_rows_and_long_columns() -> None:
    for shape in ((3, 70_000), (70_000, 3), (300, 300, 2)):
        array = drawn(shape, "float32")
        half = shape[0] // 2
        parts = digest.of_array(array[:half]) + digest.of_array(array[half:], [half] + [0] * (len(shape) - 1))
        assert parts % 2**64 == digest.of_array(array)


def test_every_bit_counts() -> None:
    array = drawn((5, 7), "float32")
    before, bits = digest.of_array(array), array.view(np.uint32)
    seen = set()
    for row, column, bit in itertools.product(range(5), range(7), range(32)):
        bits[row, column] ^= np.uint32(1 << bit)
        seen.add(digest.of_array(array))
        bits[row, column] ^= np.uint32(1 << bit)
    assert before not in seen and len(seen) == 5 * 7 * 32
    assert digest.of_array(array[::-1]) != before != digest.of_array(array[:, [1, 0, 2, 3, 4, 5, 6]])
    assert digest.of_array(np.float32(0.0)) != digest.of_array(np.float32(-0.0))


def test_a_tree_of_device_and_host_arrays() -> None:
    array = drawn((4, 6), "bfloat16")
    sums = digest.of_process({"a": {"b": jnp.asarray(array)}, "c": array, "step": jnp.int32(7)})
    assert sums["a/b"] == sums["c"] == {0: digest.of_array(array)}
    halves = [{"x": {"0": 2**63}}, {"x": {"0": 2**63 + 5, "1": 1}}]
    assert digest.combined(halves) == {"x": {0: 5, 1: 1}}
    assert jax.tree.leaves(sums)


def test_one_text_for_a_whole_tree() -> None:
    a, b = drawn((4, 6), "float32"), {"c": drawn((3,), "bfloat16")}

    def text(tree: Any) -> str:
        return digest.of_whole(digest.combined([digest.of_process(tree)]))

    wanted = text({"a": a, "b": b})
    assert text(jax.tree.map(jnp.asarray, {"b": b, "a": a})) == wanted
    other = a.copy()
    other.view(np.uint32)[3, 5] ^= np.uint32(1)  # the last bit of the last value
    assert len({wanted, text({"a": other, "b": b}), text({"z": a, "b": b})}) == 3
    # Of process 0's half and of process 1's, each there twice.
    halves = [{"a": {"1": 3, "0": 3}}, {"a": {"0": 4, "1": 4}}]
    assert digest.of_whole(digest.combined(halves)) == digest.of_whole({"a": {0: 7}})
