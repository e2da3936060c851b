"""Counts the matrix products of a traced program: what is really computed, recomputation included.

The model's own FLOPs are counted by hand in model/flops.py; the difference is what saving memory costs.
"""

from __future__ import annotations

import collections
import math
from typing import Any, NamedTuple

from jax.interpreters import partial_eval


class Count(NamedTuple):
    """Operations, and names of what could not be counted: kernels without an estimate, loops of unknown length."""

    flops: float
    unknown: dict[str, int]


def flops(jaxpr: Any, devices: int = 1) -> Count:
    """Operations of all matrix products of a program, over all devices, a multiply-add as two.

    What no result needs is left out, as the compiler leaves it out.

    Args:
      jaxpr: a `jax.core.Jaxpr`; scans count as often as they run.
      devices: that a `shard_map` inside runs on, where its mesh does not say.
    """
    unknown: collections.Counter[str] = collections.Counter()

    def count(jaxpr: Any, times: float) -> float:
        total = 0.0
        for equation in jaxpr.eqns:
            name, parameters = equation.primitive.name, equation.params
            if name == "dot_general":
                total += times * _dot(equation)
            elif name == "conv_general_dilated":
                unknown[name] += 1
            elif name == "pallas_call":
                estimate = parameters.get("cost_estimate")
                total += times * (estimate.flops if estimate is not None else 0)
                unknown[f"kernel {parameters.get('name', '')}"] += estimate is None
            else:
                more = times
                if name == "scan":
                    more = times * parameters["length"]
                elif name == "shard_map":
                    more = times * (parameters["mesh"].size or devices)
                elif name == "while":
                    unknown[name] += _has_products(parameters["body_jaxpr"].jaxpr)
                inner = [j for value in parameters.values() for j in _jaxprs(value)]
                if name == "cond":  # the dearest branch
                    total += max((count(j, more) for j in inner), default=0.0)
                else:
                    total += sum(count(j, more) for j in inner)
        return total

    needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return Count(count(needed, 1.0), {name: n for name, n in unknown.items() if n})


def _dot(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)


def _jaxprs(value: Any) -> list[Any]:
    values = value if isinstance(value, (tuple, list)) else [value]
    return [inner for v in values if hasattr(inner := getattr(v, "jaxpr", v), "eqns")]


def _has_products(jaxpr: Any) -> bool:
    return any(
        e.primitive.name in ("dot_general", "pallas_call")
        or any(_has_products(j) for v in e.params.values() for j in _jaxprs(v))
        for e in jaxpr.eqns
    )
