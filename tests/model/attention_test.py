"""Every implementation of attention is the same function; kernels run on each device for its shards alone."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coca_jax import sharding
from coca_jax.model import attention
from coca_jax.model.coca import CoCa
from coca_jax.model.text_decoder import cls_mask
from tests import tiny

TOKENS = np.array([[3, 4, 5, 6, 7, 8], [3, 4, 0, 0, 0, 0], [9, 0, 0, 0, 0, 0]], np.int32)
# How the model attends: queries, keys, mask. Lengths are not a kernel's; a token that does not count is weighed with 0.
CASES: dict[str, dict[str, Any]] = {
    "causal": {"s": 7, "m": 7, "is_causal": True},
    "to image tokens": {"s": 5, "m": 200},
    "one query": {"s": 1, "m": 17},
    "text with [CLS]": {"s": 7, "m": 7, "mask": cls_mask(TOKENS, 0, "full")},
    "text with [CLS] as open_clip masks it": {"s": 7, "m": 7, "mask": cls_mask(TOKENS, 0, "legacy")},
}


def arrays(s: int, m: int, k: int = 8, dtype: Any = jnp.float32, heads: int = 2) -> Any:
    """Queries, keys, values, and weights of the result."""
    rng = np.random.default_rng(s + m)
    return tuple(jnp.asarray(rng.normal(size=(len(TOKENS), n, heads, k)), dtype) for n in (s, m, m, s))


def result_and_gradients(implementation: str, case: dict[str, Any], **options: Any) -> Any:
    shape = {name: case[name] for name in ("s", "m")}
    how = {name: value for name, value in case.items() if name not in shape}
    *inputs, weights = arrays(**shape, **options)
    if "mask" in how:
        counts = np.concatenate([TOKENS != 0, np.ones_like(TOKENS[:, :1], bool)], axis=1)
        weights = weights * counts[:, :, None, None]

    def loss(*inputs: Any) -> tuple[jax.Array, jax.Array]:
        mixed = attention.attend(*inputs, **how, implementation=implementation)
        return jnp.sum(mixed * weights, dtype=jnp.float32), mixed * (weights != 0)

    (_, mixed), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*inputs)
    return mixed, gradients


def assert_close(found: Any, expected: Any, tolerance: float) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_the_flash_kernel_equals_xla(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "INTERPRET", True)
    assert_close(result_and_gradients("flash", CASES[name]), result_and_gradients("xla", CASES[name]), 2e-6)


def test_a_mask_without_segments_is_refused_by_the_flash_kernel() -> None:
    mask = attention.Mask(jnp.ones((1, 1, 7, 7), bool))
    query, keys, values, _ = arrays(7, 7)
    with pytest.raises(ValueError, match="takes no mask but segments"):
        attention.attend(query, keys, values, mask, implementation="flash")


def test_the_model_is_the_same_with_the_flash_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "INTERPRET", True)
    model = tiny.replace(tiny.MODEL, image__class_token=True)
    lengths = [9, 4]
    args = tiny.images(model, 2), tiny.tokens(model, lengths)

    def outputs(implementation: str) -> Any:
        coca = CoCa(tiny.replace(model, attention=implementation))
        return jax.jit(lambda p: coca.apply({"params": p}, *args))(tiny.parameters(model))

    found, expected = outputs("flash"), outputs("xla")
    assert_close((found.image_features, found.text_features), (expected.image_features, expected.text_features), 1e-5)
    for row, length in enumerate(lengths):
        scale = np.abs(expected.logits).max()
        assert_close(found.logits[row, :length] / scale, expected.logits[row, :length] / scale, 1e-5)


def check_shards() -> None:
    """Runs with 8 devices."""
    attention.INTERPRET = True
    mesh = sharding.make_mesh((2, 2, 2))
    places = [jax.NamedSharding(mesh, sharding.spec(*attention._AXES))] * 3
    inputs = [jnp.concatenate([x, x[:1]]) for x in arrays(7, 7)[:3]]
    mask = cls_mask(np.concatenate([TOKENS, TOKENS[:1]]), 0, "full")

    def loss(implementation: str, query: Any, keys: Any, values: Any) -> jax.Array:
        return jnp.sum(attention.attend(query, keys, values, mask, implementation=implementation)[:, -1] ** 2)

    expected = jax.jit(jax.grad(lambda *x: loss("xla", *x), (0, 1, 2)))(*inputs)
    for implementation in ("flash", "xla"):
        with jax.set_mesh(mesh):
            gradient = jax.jit(
                jax.grad(lambda *x, i=implementation: loss(i, *x), (0, 1, 2)), out_shardings=tuple(places)
            )
            compiled = gradient.lower(*jax.device_put(inputs, places)).compile()
            found = compiled(*jax.device_put(inputs, places))
        assert_close(found, expected, 2e-6)
        text = compiled.as_text() or ""
        gathered = [name for name in ("all-gather(", "all-reduce(", "all-to-all(") if name in text]
        assert gathered == [], f"{implementation}: batch and heads are apart already, {gathered}"


def test_each_device_computes_its_shards(run_python) -> None:
    run_python(check_shards)


@pytest.mark.parametrize("name", CASES)
def test_cudnn_is_called_with_what_it_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Lowered for a GPU, not compiled: the library asks for the cuDNN that is not here.
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    case = dict(CASES[name])
    *inputs, _ = arrays(case.pop("s"), case.pop("m"), dtype=jnp.bfloat16)

    def loss(*inputs: Any) -> jax.Array:
        return jnp.sum(attention.attend(*inputs, **case, implementation="cudnn"), dtype=jnp.float32)

    text = jax.jit(jax.grad(loss)).trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()
    kind = "ScaleBias" if "mask" in case else ""
    assert f"@__cudnn$fmha{kind}Softmax(" in text and f"@__cudnn$fmha{kind}SoftmaxBackward(" in text


def check_cudnn() -> None:
    """Runs with a GPU."""
    if jax.default_backend() != "gpu":
        print('JAX sees no GPU: pip install "jax[cuda12]"')
        return
    for name, case in CASES.items():
        for k in (64, 88):
            options = {"k": k, "dtype": jnp.bfloat16}
            found, expected = (result_and_gradients(which, case, **options) for which in ("cudnn", "xla"))
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
                scale = float(jnp.abs(b).max())
                np.testing.assert_allclose(  # bfloat16 keeps 8 bits
                    *(np.asarray(x, np.float32) for x in (a, b)), rtol=0, atol=2e-2 * scale, err_msg=f"{name}, k={k}"
                )
    print("equal")


@pytest.mark.gpu
@pytest.mark.skipif(not pathlib.Path("/dev/nvidiactl").exists(), reason="there is no NVIDIA GPU here")
def test_cudnn_equals_xla(run_python) -> None:
    said: str = run_python(check_cudnn, 1, env={"JAX_PLATFORMS": "", "XLA_FLAGS": ""}).stdout
    if "equal" not in said:
        pytest.skip(said)


COMPILE_FOR_TPU = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from coca_jax import sharding
from coca_jax.model import attention
from coca_jax.model.text_decoder import cls_mask

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
mesh = sharding.make_mesh((1, 2, 2), devices)
place = jax.NamedSharding(mesh, sharding.spec(*attention._AXES))
rows = jax.NamedSharding(mesh, sharding.spec("batch", None))

def check(s, m, k, text):
    def loss(tokens, *inputs):
        mask = cls_mask(tokens, 0, "full") if text else None
        return attention.attend(*inputs, mask, implementation="flash").astype(jnp.float32).sum()

    inputs = [jax.ShapeDtypeStruct((8, n, 4, k), jnp.bfloat16, sharding=place) for n in (s, m, m)]
    tokens = jax.ShapeDtypeStruct((8, s - 1), jnp.int32, sharding=rows)
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(loss, (1, 2, 3)), out_shardings=(place,) * 3)
        program = gradient.lower(tokens, *inputs).compile().as_text()
    # Forward, and backward for queries and for keys; and nothing is sent from chip to chip.
    assert program.count('custom_call_target="tpu_custom_call"') == 3, program
    assert "all-gather" not in program and "all-reduce" not in program, program

for s, m, k, text in ((256, 256, 64, False), (257, 257, 88, False), (1, 1024, 88, False), (65, 65, 88, True)):
    check(s, m, k, text)
"""


@pytest.mark.slow
def test_the_flash_kernel_compiles_for_tpus(run_python) -> None:
    pytest.importorskip("libtpu", reason="compiles for TPUs with libtpu: pip install libtpu")
    run_python(COMPILE_FOR_TPU, 1, env={"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"})
