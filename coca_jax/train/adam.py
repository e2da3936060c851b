"""Adam's moments, written in place: what the step's memory traffic is mostly made of on one device."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from coca_jax.train import guard as guards


class Moments(optax.ScaleByAdamState):
    """Adam's state, which is the old one already where the step is not accepted."""


def scale_by_adam(b1: float, b2: float, eps: float, mu_dtype: Any) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam` (Kingma and Ba 2015, arXiv 1412.6980, algorithm 1), bit for bit, in an order of its own.

    First the moments, then the direction from the new moments, so that nothing reads the old ones any more when they
    are overwritten. XLA for CPUs (jaxlib 0.10 to 0.12) copies all of them first where something does.

    `update` takes `accepted`, a bool of this step: where it is false the moments and their count stay.
    """
    optax_adam = optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype)

    def init(parameters: Any) -> Moments:
        return Moments(*optax_adam.init(parameters))

    def update(
        gradients: Any, state: Moments, parameters: Any = None, *, accepted: jax.Array | None = None, **_: Any
    ) -> tuple[Any, Moments]:
        del parameters
        count = optax.safe_increment(state.count)
        new = (
            optax.tree.update_moment(gradients, state.mu, b1, 1),
            optax.tree.update_moment_per_elem_norm(gradients, state.nu, b2, 2),
        )
        kept = count
        if accepted is not None:
            new = guards.choose(accepted, new, (state.mu, state.nu))
            kept = guards.choose(accepted, count, state.count)
        mu, nu = in_order(new)
        mean = optax.tree.bias_correction(mu, b1, count)
        variance = optax.tree.bias_correction(nu, b2, count)
        direction = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mean, variance)
        return direction, Moments(kept, optax.tree.cast(mu, mu_dtype), nu)

    return optax.GradientTransformationExtraArgs(init, update)


def in_order(values: Any) -> Any:
    """The values, made on CPUs before anything that is made of them, and never again for it."""
    return jax.lax.platform_dependent(values, cpu=jax.lax.optimization_barrier, default=lambda x: x)


def after(accepted: jax.Array, norm: jax.Array) -> jax.Array:
    """`accepted`, known on CPUs only after the update's norm: what is chosen by it is overwritten after the norm's last
    look at it. (XLA for CPUs drops barriers before it looks at the order of reads and writes; a comparison stays. Where
    the moments are finite the update is.)"""
    return jax.lax.platform_dependent(accepted, norm, cpu=lambda a, n: a & ~jnp.isnan(n), default=lambda a, _: a)
