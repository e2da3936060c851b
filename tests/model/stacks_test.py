"""A loop over layers equals the scan: same parameters, values and gradients, and no whole stack per layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coca_jax.model import layers, stacks
from tests import tiny

DEPTH = 3


def stack(scan_unroll: int, remat: str = "none") -> Any:
    sizes: dict[str, Any] = {"width": 16, "heads": 2, "mlp_dim": 32, "causal": True, "cross": True}
    return layers.stack(tiny.MODEL, depth=DEPTH, remat=remat, scan_unroll=scan_unroll, **sizes)


def inputs() -> tuple[jax.Array, None, jax.Array, None, None]:
    rng = np.random.default_rng(0)
    x, image_tokens = (jnp.asarray(rng.normal(size=(2, length, 16)), jnp.float32) for length in (7, 4))
    return x, None, image_tokens, None, None


def initial(scan_unroll: int) -> Any:
    params: Any = stack(scan_unroll).init(jax.random.key(0), *inputs())
    return params


def gradient(scan_unroll: int, remat: str = "none") -> Any:
    def loss(params: Any, x: jax.Array, *rest: Any) -> jax.Array:
        return jnp.mean(jnp.sin(stack(scan_unroll, remat).apply(params, x, *rest)[0]))

    return jax.value_and_grad(loss, argnums=(0, 1))


@pytest.mark.parametrize("scan_unroll", [0, 2, DEPTH, DEPTH + 1])
def test_the_loop_initializes_the_scans_parameters(scan_unroll: int) -> None:
    jax.tree.map(np.testing.assert_array_equal, initial(scan_unroll), initial(1))


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_the_loop_gives_the_scans_values_and_gradients(remat: str) -> None:
    params = initial(1)
    found, wanted = (jax.jit(gradient(scan_unroll, remat))(params, *inputs()) for scan_unroll in (0, 1))
    # The same operations, fused differently: compare on the scale of a tensor's largest element. A key's bias has no
    # gradient (it shifts all scores equally); its values are rounding errors.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()) + 1e-8), found, wanted
    )


def outputs_of(jaxpr: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Primitive names and output shapes of a program, including its inner programs."""
    for equation in jaxpr.eqns:
        inner = [getattr(value, "jaxpr", value) for value in jax.tree.leaves(list(equation.params.values()))]
        programs = [value for value in inner if hasattr(value, "eqns")]
        for program in programs:
            yield from outputs_of(program)
        if not programs:
            yield from ((equation.primitive.name, variable.aval.shape) for variable in equation.outvars)


def test_the_gradient_of_one_layer_creates_no_whole_stack() -> None:
    params = initial(0)
    program = jax.make_jaxpr(gradient(0))(params, *inputs())
    stacked = [name for name, shape in outputs_of(program.jaxpr) if shape[:1] == (DEPTH,) and math.prod(shape) > DEPTH]
    assert stacked == ["concatenate"] * len(jax.tree.leaves(params))


def test_unstacked_layers_give_the_outputs_of_the_stack() -> None:
    params = initial(1)
    unstacked = stacks.unstack(params["params"], DEPTH)
    assert len(unstacked) == DEPTH
    for i, layer in enumerate(unstacked):
        jax.tree.map(lambda part, whole, i=i: np.testing.assert_array_equal(part, whole[i]), layer, params["params"])
    named = {"params": {str(i): layer for i, layer in enumerate(unstacked)}}
    found, wanted = (stack(0).apply(parameters, *inputs())[0] for parameters in (named, params))
    np.testing.assert_array_equal(found, wanted)
