"""Count the matrix products of a traced program that really run, recomputation included.

model/flops.py counts the model's own FLOPs analytically; the difference is the cost of saving memory.
"""

from __future__ import annotations

import collections
import math
from typing import Any, NamedTuple

from jax.interpreters import partial_eval


class Count(NamedTuple):
    """FLOPs, and occurrences of what cannot be counted: kernels without an estimate, loops of unknown length."""

    flops: float
    unknown: dict[str, int]


def flops(jaxpr: Any, devices: int = 1) -> Count:
    """FLOPs of all matrix products of a program over all devices, with a multiply-add as two.

    Dead code is ignored, as the compiler removes it.

    Args:
      jaxpr: A `jax.core.Jaxpr`; a scan's body counts once per iteration.
      devices: Devices of an inner `shard_map` whose mesh does not have a size.
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
                inner_times = times
                if name == "scan":
                    inner_times = times * parameters["length"]
                elif name == "shard_map":
                    inner_times = times * (parameters["mesh"].size or devices)
                elif name == "while":
                    unknown[name] += _has_products(parameters["body_jaxpr"].jaxpr)
                inner = [j for value in parameters.values() for j in _jaxprs(value)]
                if name == "cond":  # the most expensive branch
                    total += max((count(j, inner_times) for j in inner), default=0.0)
                else:
                    total += sum(count(j, inner_times) for j in inner)
        return total

    live, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return Count(count(live, 1.0), {name: n for name, n in unknown.items() if n})


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
