from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from coca_jax import losses, sharding
from tests import tiny


def inputs(b: int = 3, t: int = 10, d: int = 8, v: int = 13, seed: int = 0) -> tuple[Any, Any, Any]:
    """Hidden states, head, and tokens of very different lengths (10, 3 and 1 of 10, repeating)."""
    rng = np.random.default_rng(seed)
    hidden, head = (rng.normal(size=s).astype(np.float32) for s in ((b, t, d), (d, v)))
    lengths = np.resize([t, 3, 1], (b, 1))
    tokens = np.where(np.arange(t)[None] < lengths, rng.integers(1, v, (b, t)), 0)
    return hidden, head, tokens.astype(np.int32)


def gradients(chunk: int, hidden: Any, head: Any, tokens: Any) -> Any:
    """The loss and its gradients with respect to hidden states and head, compiled."""

    def loss(hidden: Any, head: Any) -> Any:
        return losses.captioning(hidden, head, tokens, pad_id=0, chunk=chunk)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(hidden, head)


def assert_same(one: Any, other: Any, message: str) -> None:
    """float32 sums in another order: errors scale with an array's largest element. Measured: up to 3e-7 of it."""
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        largest = float(np.abs(b).max())
        assert a.dtype == b.dtype and largest > 1e-3
        np.testing.assert_allclose(a, b, rtol=0, atol=3e-6 * largest, err_msg=message)


def test_captioning_is_the_mean_over_the_real_tokens_of_the_whole_batch() -> None:
    hidden, head, tokens = inputs()
    logits = (hidden @ head).astype(np.float64)
    expected = []
    for row in range(3):
        for at in range(9):
            label = tokens[row, at + 1]
            if label != 0:
                expected.append(np.log(np.exp(logits[row, at]).sum()) - logits[row, at, label])
    assert len(expected) == 9 + 2 + 0
    for chunk in (0, 12):
        value = losses.captioning(hidden, head, tokens, pad_id=0, chunk=chunk)
        np.testing.assert_allclose(value, np.mean(expected), rtol=1e-6)


# With 3 rows: one position, the minimum; 4 and 5 of 10 positions; more than there are.
@pytest.mark.parametrize("chunk", [1, 12, 17, 99])
def test_chunks_equal_the_plain_formula_in_value_and_gradient(chunk: int) -> None:
    arrays = inputs()
    assert_same(gradients(chunk, *arrays), gradients(0, *arrays), f"chunk {chunk}")


def test_chunks_in_bfloat16_equal_the_plain_formula() -> None:
    hidden, head, tokens = inputs()
    hidden = jnp.bfloat16(hidden)
    value, (d_hidden, d_head) = gradients(12, hidden, head, tokens)
    full, (full_d_hidden, full_d_head) = gradients(0, hidden, head, tokens)
    np.testing.assert_allclose(value, full, rtol=1e-6)
    assert d_hidden.dtype == jnp.bfloat16 and d_head.dtype == jnp.float32
    for a, b in ((d_hidden, full_d_hidden), (d_head, full_d_head)):  # 8 bits, rounded at different points
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=0, atol=2**-7 * np.abs(b).max())


def check_meshes() -> None:
    """Runs with 8 devices: chunks on meshes against the plain formula on one device."""
    # Chunks of 3 of 10 positions; vocabularies that the tensor axis divides and does not divide; rows likewise.
    cases = [
        ((2, 2, 2), 8, 26, 6, ("embed", "vocab")),
        ((1, 4, 2), 8, 25, 6, ("embed", None)),
        ((1, 1, 8), 2, 24, 6, (None, "vocab")),
        ((1, 8, 1), 3, 26, 1, (None, None)),
    ]
    for shape, b, v, chunk, d_head in cases:
        arrays = inputs(b, v=v)
        mesh = sharding.make_mesh(shape)
        rows = sharding.batch_sharding(mesh) if b % (shape[0] * shape[1]) == 0 else sharding.replicated(mesh)
        shardings = rows, NamedSharding(mesh, sharding.spec(*d_head)), rows
        with jax.set_mesh(mesh):
            found = gradients(chunk, *(jax.device_put(x, p) for x, p in zip(arrays, shardings, strict=True)))
        assert_same(found, gradients(0, *arrays), f"mesh {shape}, {b} rows, vocabulary {v}")


def test_every_mesh_equals_one_device(run_python) -> None:
    run_python(check_meshes)


def check_collectives() -> None:
    """Runs with 8 devices, (fsdp, tensor) = (4, 2): checks communication and array sizes."""
    b, t, d, v = 16, 12, 6, 34
    mesh = sharding.make_mesh((1, 4, 2))
    rows, d_head = sharding.batch_sharding(mesh), NamedSharding(mesh, sharding.spec(None, "vocab"))
    shapes = [
        jax.ShapeDtypeStruct((b, t, d), jnp.float32, sharding=rows),
        jax.ShapeDtypeStruct((d, v), jnp.float32, sharding=d_head),
        jax.ShapeDtypeStruct((b, t), jnp.int32, sharding=rows),
    ]

    def text(chunk: int) -> str:
        def gradient(hidden: Any, head: Any, tokens: Any) -> Any:
            loss = lambda x, w: losses.captioning(x, w, tokens, pad_id=0, chunk=chunk)  # noqa: E731
            return jax.grad(loss, argnums=(0, 1))(hidden, head)

        compiled = jax.jit(gradient, out_shardings=(rows, d_head)).lower(*shapes).compile().as_text()
        assert compiled is not None
        return compiled

    with jax.set_mesh(mesh):
        chunked, full = text(8), text(0)
    # Only the whole vocabulary has size 34, and a device's part 17: no logits of more than 2 positions of 4 rows.
    assert "17]" in full and re.search(r"\[4,12,17\]|\[12,4,17\]|\[48,17\]", full)
    assert not re.search(r"\d,34\]", chunked), "a device holds logits or a head of the whole vocabulary"
    assert not re.search(r"\[4,12,17\]|\[12,4,17\]|\[48,17\]", chunked), "a device holds the logits of all its tokens"
    # The head's gradient [6, 17] is reduced over devices once, not in the loops over the chunks.
    inside, where = [], ""
    for line in chunked.splitlines():
        if line and not line.startswith(" "):
            where = line.split()[0]
        if re.search(r"\[6,17\]\S* (all-reduce|reduce-scatter|all-gather|all-to-all)(-start)?\(", line):
            inside.append(where)
    assert inside == ["ENTRY"], inside


def test_the_head_is_communicated_once_and_no_device_holds_the_whole_vocabulary(run_python) -> None:
    run_python(check_collectives)


def test_chunks_reduce_the_memory_of_the_logits() -> None:
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((64, 32, 16), (16, 4000))]
    tokens = jax.ShapeDtypeStruct((64, 32), jnp.int32)

    def temporaries(chunk: int) -> int:
        def loss(hidden: Any, head: Any, tokens: Any) -> Any:
            return losses.captioning(hidden, head, tokens, pad_id=0, chunk=chunk)

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes, tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(128) * 8 < temporaries(0)


@pytest.mark.parametrize("chunk", [0, 6])
def test_a_batch_of_padding_alone_has_zero_loss_and_gradients(chunk: int) -> None:
    hidden, head, tokens = inputs()
    value, grads = gradients(chunk, hidden, head, np.zeros_like(tokens))
    assert value == 0 and not any(np.any(grad) for grad in grads)


def test_losses_are_float32_for_any_compute_dtype() -> None:
    hidden, head, tokens = inputs()
    value = losses.captioning(jnp.bfloat16(hidden), head, tokens, pad_id=0, chunk=12)
    assert value.dtype == jnp.float32
    full = losses.captioning(hidden, head, tokens, pad_id=0, chunk=0)
    np.testing.assert_allclose(value, full, rtol=2e-2)  # the 8 bits of the hidden states, not of the sum


def test_targets_are_the_next_tokens() -> None:
    tokens = tiny.tokens(tiny.MODEL, [9, 4])
    labels, weights = losses.targets(tokens, 0)
    np.testing.assert_array_equal(labels[:, :-1], tokens[:, 1:])
    np.testing.assert_array_equal(weights.sum(axis=1), [8, 3])
