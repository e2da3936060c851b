"""Second moments in bfloat16, rounded up or down by chance.

Their steps are small: with b2 = 0.999 a thousandth of the value, where bfloat16 tells apart what differs by a 256th.
Rounded to the nearest they stand still (Zhai et al. 2021, arXiv 2106.04560, section 3.4, saw trainings fail of it).
Rounded up with the probability of what would be lost, they move as far as in float32 in the mean (Gupta et al. 2015,
arXiv 1502.02551, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

_SEED = 0x2C0CA


def stochastically_rounded(x: Float[Array, "*shape"], key: Array) -> Float[Array, "*shape"]:
    """float32 as bfloat16: one of its two neighbours, the nearer one the likelier, x itself in the mean.

    What bfloat16 has exactly stays as it is; what is not finite too.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # bfloat16 is the upper half of float32: noise in the lower half carries into it as often as that half is large.
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    upper = ((bits + noise) >> 16).astype(jnp.uint16)
    rounded = jax.lax.bitcast_convert_type(upper, jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def second_moments_in_bfloat16(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`inner`, whose Adam states (those in Muon's too) keep `nu` in bfloat16; it computes with them in float32.

    The chance depends on the number of the update alone: a run that is taken up again, and one on another mesh, rounds
    alike.
    """

    def stored(state: Any) -> Any:
        def round_all(adam: optax.ScaleByAdamState) -> optax.ScaleByAdamState:
            key = jax.random.fold_in(jax.random.key(_SEED), adam.count)
            leaves, tree = jax.tree.flatten(adam.nu)
            rounded = [stochastically_rounded(x, jax.random.fold_in(key, i)) for i, x in enumerate(leaves)]
            return adam._replace(nu=jax.tree.unflatten(tree, rounded))

        return _in_adam(round_all, state)

    def shown(state: Any) -> Any:
        return _in_adam(lambda adam: adam._replace(nu=optax.tree.cast(adam.nu, jnp.float32)), state)

    def init(parameters: Any) -> Any:
        return _in_adam(lambda adam: adam._replace(nu=optax.tree.cast(adam.nu, jnp.bfloat16)), inner.init(parameters))

    inner = optax.with_extra_args_support(inner)

    def update(updates: Any, state: Any, parameters: Any = None, **extra: Any) -> tuple[Any, Any]:
        new, state = inner.update(updates, shown(state), parameters, **extra)
        return new, stored(state)

    return optax.GradientTransformationExtraArgs(init, update)


def _in_adam(change: Callable[[optax.ScaleByAdamState], optax.ScaleByAdamState], state: Any) -> Any:
    def is_adam(x: Any) -> bool:
        return isinstance(x, optax.ScaleByAdamState)

    return jax.tree.map(lambda x: change(x) if is_adam(x) else x, state, is_leaf=is_adam)
