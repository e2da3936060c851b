"""All implementations of attention agree, and each device runs a kernel on its own shards only."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coca_jax import sharding
from coca_jax.model import attention, tpu_attention
from coca_jax.model.bridge import CAPTION_TEXT, CONTRASTIVE_TEXT, objective_mask
from coca_jax.model.coca import CoCa
from coca_jax.model.text_decoder import cls_mask
from tests import tiny

TOKENS = np.array([[3, 4, 5, 6, 7, 8], [3, 4, 0, 0, 0, 0], [9, 0, 0, 0, 0, 0]], np.int32)
# The model's uses of attention: queries, keys, mask. The lengths are not multiples of a kernel's block size.
CASES: dict[str, dict[str, Any]] = {
    "causal": {"s": 7, "m": 7, "is_causal": True},
    "to image tokens": {"s": 5, "m": 200},
    "one query": {"s": 1, "m": 17},
    "text with [CLS]": {"s": 7, "m": 7, "mask": cls_mask(TOKENS, 0, "full")},
    "text with [CLS] as open_clip masks it": {"s": 7, "m": 7, "mask": cls_mask(TOKENS, 0, "legacy")},
    "a bridge's texts": {
        "s": 14,
        "m": 14,
        "mask": objective_mask(TOKENS, 0, (CONTRASTIVE_TEXT, CAPTION_TEXT), queries=2),
    },
    "one mask for the whole batch": {
        "s": 3,
        "m": 4,
        "mask": np.arange(4)[None, None, None] <= np.arange(3)[None, None, :, None],
    },
    "a query without keys": {
        "s": 3,
        "m": 4,
        "mask": np.arange(4)[None, None, None] < np.arange(3)[None, None, :, None],
    },
}


def arrays(s: int, m: int, k: int = 8, dtype: Any = jnp.float32, heads: int = 2) -> Any:
    """Queries, keys, values, and output weights for the loss."""
    rng = np.random.default_rng(s + m)
    return tuple(jnp.asarray(rng.normal(size=(len(TOKENS), n, heads, k)), dtype) for n in (s, m, m, s))


def result_and_gradients(implementation: str, case: dict[str, Any], **sizes: Any) -> Any:
    shape = {name: case[name] for name in ("s", "m")}
    options = {name: value for name, value in case.items() if name not in shape}
    *inputs, weights = arrays(**shape, **sizes)

    def loss(*inputs: Any) -> tuple[jax.Array, jax.Array]:
        output = attention.attend(*inputs, **options, implementation=implementation)
        return jnp.sum(output * weights, dtype=jnp.float32), output

    (_, output), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*inputs)
    return output, gradients


def assert_close(found: Any, expected: Any, tolerance: float) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_flash_rejects_too_many_keys() -> None:
    query, keys, values, _ = arrays(1, 1025)
    with pytest.raises(ValueError, match=r"1025 keys: .*flash.* at most 1024.*xla"):
        attention.attend(query, keys, values, implementation="flash")


# Layouts of heads in registers of 128 lanes: (heads, width, queries, keys). The last is computed in parts.
LAYOUTS = {
    "two heads per register": (4, 64, 65, 65),
    "all heads in one register": (3, 8, 20, 40),
    "odd number of heads": (3, 64, 33, 129),
    "two registers per head": (2, 192, 7, 7),
    "register partly filled": (2, 88, 20, 20),
    "four heads per register": (4, 32, 400, 700),
}


@pytest.mark.parametrize(
    ("name", "is_causal"),
    [*((name, False) for name in LAYOUTS), ("two heads per register", True), ("four heads per register", True)],
)
def test_flash_equals_xla_for_any_head_layout(name: str, is_causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory behind an array is never read either: the interpreter fills it with NaN."""
    monkeypatch.setattr(tpu_attention, "INTERPRET", True)
    heads, k, s, m = LAYOUTS[name]
    case = {"s": s, "m": s if is_causal else m, "is_causal": is_causal}
    found, expected = (result_and_gradients(which, case, k=k, heads=heads) for which in ("flash", "xla"))
    assert_close(found, expected, 5e-6)  # sums of up to 700 float32 numbers in another order


def test_flash_rounds_bfloat16_no_more_than_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tpu_attention, "INTERPRET", True)
    case = {"s": 33, "m": 50}
    exact = result_and_gradients("xla", case)
    ours, xla = (result_and_gradients(which, case, dtype=jnp.bfloat16) for which in ("flash", "xla"))
    for a, b, c in zip(*(jax.tree.leaves(x) for x in (ours, xla, exact)), strict=True):
        errors = [float(jnp.sqrt(jnp.mean((x.astype(jnp.float32) - c) ** 2))) for x in (a, b)]
        assert errors[0] < 1.2 * errors[1], errors  # the two round at different points: not the size of the error


@pytest.mark.parametrize("name", CASES)
def test_flash_equals_xla_for_every_use_in_the_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tpu_attention, "INTERPRET", True)
    assert_close(result_and_gradients("flash", CASES[name]), result_and_gradients("xla", CASES[name]), 2e-6)


def test_the_model_gives_equal_outputs_with_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tpu_attention, "INTERPRET", True)
    model = tiny.replace(tiny.MODEL, image__class_token=True)
    args = tiny.images(model, 2), tiny.tokens(model, [9, 4])

    def outputs(implementation: str) -> Any:
        coca = CoCa(tiny.replace(model, attention=implementation))
        return jax.jit(lambda p: coca.apply({"params": p}, *args))(tiny.parameters(model))

    found, expected = outputs("flash"), outputs("xla")
    assert_close((found.image_features, found.text_features), (expected.image_features, expected.text_features), 1e-5)
    scale = np.abs(expected.logits).max()
    assert_close(found.logits / scale, expected.logits / scale, 1e-5)


def check_shards() -> None:
    """Runs with 8 devices."""
    tpu_attention.INTERPRET = True
    mesh = sharding.make_mesh((2, 2, 2))
    shardings = [jax.NamedSharding(mesh, sharding.spec(*attention._AXES))] * 3
    inputs = [jnp.concatenate([x, x[:1]]) for x in arrays(7, 7)[:3]]
    mask = cls_mask(np.concatenate([TOKENS, TOKENS[:1]]), 0, "full")

    def loss(implementation: str, query: Any, keys: Any, values: Any) -> jax.Array:
        return jnp.sum(attention.attend(query, keys, values, mask, implementation=implementation)[:, -1] ** 2)

    expected = jax.jit(jax.grad(lambda *x: loss("xla", *x), (0, 1, 2)))(*inputs)
    for implementation in ("flash", "xla"):
        with jax.set_mesh(mesh):
            gradient = jax.jit(
                jax.grad(lambda *x, i=implementation: loss(i, *x), (0, 1, 2)), out_shardings=tuple(shardings)
            )
            compiled = gradient.lower(*jax.device_put(inputs, shardings)).compile()
            found = compiled(*jax.device_put(inputs, shardings))
        assert_close(found, expected, 2e-6)
        text = compiled.as_text() or ""
        gathered = [name for name in ("all-gather(", "all-reduce(", "all-to-all(") if name in text]
        assert gathered == [], f"{implementation}: batch and heads are already sharded, but found {gathered}"


def test_each_device_computes_its_own_shards(run_python) -> None:
    run_python(check_shards)


@pytest.mark.parametrize("name", CASES)
def test_cudnn_accepts_every_use_in_the_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Lowered for a GPU, not compiled; skip the version check, because cuDNN is not installed here.
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
                np.testing.assert_allclose(  # bfloat16 has 8 significant bits
                    *(np.asarray(x, np.float32) for x in (a, b)), rtol=0, atol=2e-2 * scale, err_msg=f"{name}, k={k}"
                )
    print("equal")


@pytest.mark.gpu
@pytest.mark.skipif(not pathlib.Path("/dev/nvidiactl").exists(), reason="there is no NVIDIA GPU here")
def test_cudnn_equals_xla(run_python) -> None:
    output: str = run_python(check_cudnn, 1, env={"JAX_PLATFORMS": "", "XLA_FLAGS": ""}).stdout
    if "equal" not in output:
        pytest.skip(output)


COMPILE_FOR_TPU = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from coca_jax import sharding
from coca_jax.model import attention
from coca_jax.model.text_decoder import cls_mask
from coca_jax.plan import topology

def check(mesh, s, m, k, text=False, is_causal=False, dtype="bfloat16", heads=4):
    place = jax.NamedSharding(mesh, sharding.spec(*attention._AXES))
    rows = jax.NamedSharding(mesh, sharding.spec("batch", None))

    def loss(tokens, *inputs):
        mask = cls_mask(tokens, 0, "full") if text else None
        mixed = attention.attend(*inputs, mask, is_causal=is_causal, implementation="flash")
        return (mixed.astype(jnp.float32) ** 2).sum()

    inputs = [jax.ShapeDtypeStruct((4, n, heads, k), dtype, sharding=place) for n in (s, m, m)]
    tokens = jax.ShapeDtypeStruct((4, s - 1), jnp.int32, sharding=rows)
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(loss, (1, 2, 3)), out_shardings=(place,) * 3)
        program = gradient.lower(tokens, *inputs).compile().as_text()
    # Forward and backward; and nothing is sent from chip to chip.
    assert program.count('custom_call_target="tpu_custom_call"') == 2, program
    assert "all-gather" not in program and "all-reduce" not in program, program

for name in ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"):
    devices = topologies.get_topology_desc(**topology.parse_topology(name).options()).devices
    mesh = sharding.make_mesh((1, 2, 2), devices)
    check(mesh, 256, 256, 64)
    check(mesh, 257, 257, 88)
    check(mesh, 1, 1024, 88)
    check(mesh, 65, 65, 64, text=True)
    check(mesh, 76, 76, 32, is_causal=True)
    # What config.flash_keys permits.
    check(mesh, 300, 2048, 128)
    check(mesh, 2048, 2048, 64, text=True, heads=24)
    check(mesh, 1024, 1024, 192, text=True)
    check(mesh, 1024, 1024, 64, text=True, dtype="float32", heads=24)
    check(mesh, 512, 512, 256, text=True, dtype="float32")
    check(mesh, 256, 256, 512, text=True, dtype="float32")
"""


@pytest.mark.slow
def test_flash_compiles_for_every_tpu_without_communication(run_python) -> None:
    pytest.importorskip("libtpu", reason="compiles for TPUs with libtpu: pip install libtpu")
    run_python(COMPILE_FOR_TPU, 1, env={"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"})
