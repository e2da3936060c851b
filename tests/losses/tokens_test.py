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
    """Hidden states, head, and tokens of very different lengths (10, 3 and 1 of 10, over and over)."""
    rng = np.random.default_rng(seed)
    hidden, head = (rng.normal(size=s).astype(np.float32) for s in ((b, t, d), (d, v)))
    lengths = np.resize([t, 3, 1], (b, 1))
    tokens = np.where(np.arange(t)[None] < lengths, rng.integers(1, v, (b, t)), 0)
    return hidden, head, tokens.astype(np.int32)


def gradients(chunk: int, hidden: Any, head: Any, tokens: Any) -> Any:
    """The loss, and its gradients by hidden states and head, compiled."""

    def loss(hidden: Any, head: Any) -> Any:
        return losses.captioning(hidden, head, tokens, pad_id=0, chunk=chunk)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(hidden, head)


def assert_same(one: Any, other: Any, message: str) -> None:
    """float32 sums in another order: the error goes with an array's largest element. Measured: up to 3e-7 of it."""
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


# Of 3 rows: one position, the least there is; 4 and 5 of 10 positions; more than there are.
@pytest.mark.parametrize("chunk", [1, 12, 17, 99])
def test_chunked_captioning_equals_full_in_value_and_gradient(chunk: int) -> None:
    arrays = inputs()
    assert_same(gradients(chunk, *arrays), gradients(0, *arrays), f"chunk {chunk}")


def test_chunked_captioning_in_bfloat16_equals_full() -> None:
    hidden, head, tokens = inputs()
    hidden = jnp.bfloat16(hidden)
    value, (of_hidden, of_head) = gradients(12, hidden, head, tokens)
    full, (full_of_hidden, full_of_head) = gradients(0, hidden, head, tokens)
    np.testing.assert_allclose(value, full, rtol=1e-6)
    assert of_hidden.dtype == jnp.bfloat16 and of_head.dtype == jnp.float32
    for a, b in ((of_hidden, full_of_hidden), (of_head, full_of_head)):  # 8 bits, rounded at other places
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=0, atol=2**-7 * np.abs(b).max())


def check_meshes() -> None:
    """With 8 devices: in chunks on meshes against all at once on one device."""
    # Chunks of 3 of 10 positions; a vocabulary that the tensor axis divides, one that it does not; rows likewise.
    cases = [
        ((2, 2, 2), 8, 26, 6, ("embed", "vocab")),
        ((1, 4, 2), 8, 25, 6, ("embed", None)),
        ((1, 1, 8), 2, 24, 6, (None, "vocab")),
        ((1, 8, 1), 3, 26, 1, (None, None)),
    ]
    for shape, b, v, chunk, of_head in cases:
        arrays = inputs(b, v=v)
        mesh = sharding.make_mesh(shape)
        rows = sharding.batch_sharding(mesh) if b % (shape[0] * shape[1]) == 0 else sharding.replicated(mesh)
        places = rows, NamedSharding(mesh, sharding.spec(*of_head)), rows
        with jax.set_mesh(mesh):
            found = gradients(chunk, *(jax.device_put(x, p) for x, p in zip(arrays, places, strict=True)))
        assert_same(found, gradients(0, *arrays), f"mesh {shape}, {b} rows, vocabulary {v}")


def test_every_mesh_equals_one_device(run_python) -> None:
    run_python(check_meshes)


def check_collectives() -> None:
    """With 8 devices, (fsdp, tensor) = (4, 2): what moves between devices, and what is held."""
    b, t, d, v = 16, 12, 6, 34
    mesh = sharding.make_mesh((1, 4, 2))
    rows, of_head = sharding.batch_sharding(mesh), NamedSharding(mesh, sharding.spec(None, "vocab"))
    shapes = [
        jax.ShapeDtypeStruct((b, t, d), jnp.float32, sharding=rows),
        jax.ShapeDtypeStruct((d, v), jnp.float32, sharding=of_head),
        jax.ShapeDtypeStruct((b, t), jnp.int32, sharding=rows),
    ]

    def text(chunk: int) -> str:
        def gradient(hidden: Any, head: Any, tokens: Any) -> Any:
            loss = lambda x, w: losses.captioning(x, w, tokens, pad_id=0, chunk=chunk)  # noqa: E731
            return jax.grad(loss, argnums=(0, 1))(hidden, head)

        compiled = jax.jit(gradient, out_shardings=(rows, of_head)).lower(*shapes).compile().as_text()
        assert compiled is not None
        return compiled

    with jax.set_mesh(mesh):
        chunked, full = text(8), text(0)
    # 34 is nothing but the whole vocabulary, 17 a device's part: no logits of more than 2 positions of 4 rows.
    assert "17]" in full and re.search(r"\[4,12,17\]|\[12,4,17\]|\[48,17\]", full)
    assert not re.search(r"\d,34\]", chunked), "a device holds logits or a head of the whole vocabulary"
    assert not re.search(r"\[4,12,17\]|\[12,4,17\]|\[48,17\]", chunked), "a device holds the logits of all its tokens"
    # The head's gradient [6, 17] is summed over the devices once, in the program, and not in the loops over the chunks.
    inside, where = [], ""
    for line in chunked.splitlines():
        if line and not line.startswith(" "):
            where = line.split()[0]
        if re.search(r"\[6,17\]\S* (all-reduce|reduce-scatter|all-gather|all-to-all)(-start)?\(", line):
            inside.append(where)
    assert inside == ["ENTRY"], inside


def test_the_head_and_its_gradient_cross_the_network_once_and_no_device_holds_the_vocabulary(run_python) -> None:
    run_python(check_collectives)


def test_chunking_keeps_the_logits_out_of_memory() -> None:
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((64, 32, 16), (16, 4000))]
    tokens = jax.ShapeDtypeStruct((64, 32), jnp.int32)

    def temporaries(chunk: int) -> int:
        def loss(hidden: Any, head: Any, tokens: Any) -> Any:
            return losses.captioning(hidden, head, tokens, pad_id=0, chunk=chunk)

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes, tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(128) * 8 < temporaries(0)


@pytest.mark.parametrize("chunk", [0, 6])
def test_a_batch_of_padding_alone_costs_nothing_and_is_finite(chunk: int) -> None:
    hidden, head, tokens = inputs()
    value, slopes = gradients(chunk, hidden, head, np.zeros_like(tokens))
    assert value == 0 and not any(np.any(slope) for slope in slopes)


def test_losses_are_float32_whatever_the_model_computes_in() -> None:
    hidden, head, tokens = inputs()
    value = losses.captioning(jnp.bfloat16(hidden), head, tokens, pad_id=0, chunk=12)
    assert value.dtype == jnp.float32
    full = losses.captioning(hidden, head, tokens, pad_id=0, chunk=0)
    np.testing.assert_allclose(value, full, rtol=2e-2)  # the hidden states' 8 bits, not the sum's


def test_targets_are_the_next_tokens() -> None:
    tokens = tiny.tokens(tiny.MODEL, [9, 4])
    labels, weights = losses.targets(tokens, 0)
    np.testing.assert_array_equal(labels[:, :-1], tokens[:, 1:])
    np.testing.assert_array_equal(weights.sum(axis=1), [8, 3])
