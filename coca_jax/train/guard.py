"""Numbers gone bad: updates that are left out, inside the compiled step, and when a run must stop for them."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coca_jax import config

MEMORY = 0.99  # of the running statistics: about the last hundred accepted steps
# The least deviation that a spike is measured in, so that a very even run does not stop at the first uneven step: with
# the default of 10 deviations a spike is at least e^2, about 7, times the running norm.
FLOOR = 0.2


@flax.struct.dataclass
class Guard:
    """The gradients of accepted steps, and how many steps were not accepted. Part of the state, float32 and int32.

    Attributes:
      mean: running mean of the logarithm of the gradient's norm.
      deviation: running mean of its distance from that mean.
      accepted: steps whose update was made.
      skipped: steps whose update was left out.
      in_a_row: of those, the ones since the last accepted step.
    """

    mean: Float[Array, ""]
    deviation: Float[Array, ""]
    accepted: Int[Array, ""]
    skipped: Int[Array, ""]
    in_a_row: Int[Array, ""]


def fresh() -> Guard:
    """Before the first step. Pure: trace it, or jit it."""
    number, count = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
    return Guard(number, number, count, count, count)


def judge(
    c: config.Guard, guard: Guard, loss: Float[Array, ""], norm: Float[Array, ""]
) -> tuple[Guard, Bool[Array, ""], dict[str, jax.Array]]:
    """Whether a step's update is to be made: a few operations on scalars, nothing of which the host has to see.

    It is left out where the loss or the gradient is not finite (one element is enough: it makes the norm so), where the
    norm is a spike, `c.spike` deviations of its logarithm above their running mean, and from the moment on when the run
    is to stop: what is left then is the state that the last accepted step made.

    Args:
      c: bounds.
      guard: of the steps before; a step that is not accepted changes nothing in the running statistics.
      loss, norm: of this step, float32; norm is the gradient's before it is clipped.

    Returns:
      The guard after the step, whether the update is made, and metrics: steps skipped so far, those of them in a row,
      and the norm above which this step would have been a spike (infinite while there is no bound).
    """
    value = jnp.log(jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
    unit = jnp.maximum(guard.deviation, FLOOR)
    bound = jnp.float32(jnp.inf)
    if c.spike:
        # Before the first accepted step there is no mean: whatever its norm, a run would never get past it.
        bound = jnp.where(guard.accepted >= max(c.after, 1), guard.mean + c.spike * unit, bound)
    accepted = jnp.isfinite(loss) & jnp.isfinite(norm) & (value <= bound) & ~_exhausted(c, guard)

    # The first steps are averaged evenly. Later ones move the mean by three deviations at most, in either direction.
    decay = jnp.minimum(MEMORY, guard.accepted / (guard.accepted + 1.0))
    distance = jnp.where(guard.accepted > 0, value - guard.mean, 0.0)
    limit = jnp.where(guard.accepted >= c.after, 3.0 * unit, jnp.inf)
    mean = jnp.where(guard.accepted > 0, guard.mean + (1.0 - decay) * jnp.clip(distance, -limit, limit), value)
    deviation = decay * guard.deviation + (1.0 - decay) * jnp.minimum(jnp.abs(distance), limit)
    after = Guard(
        mean=jnp.where(accepted, mean, guard.mean),
        deviation=jnp.where(accepted, deviation, guard.deviation),
        accepted=guard.accepted + accepted,
        skipped=guard.skipped + ~accepted,
        in_a_row=jnp.where(accepted, 0, guard.in_a_row + 1),
    )
    metrics = {
        "guard/skipped": after.skipped.astype(jnp.float32),
        "guard/in_a_row": after.in_a_row.astype(jnp.float32),
        "guard/bound": jnp.exp(bound),
    }
    return after, accepted, metrics


def choose(accepted: Bool[Array, ""], after: Any, before: Any) -> Any:
    """One of two trees. A selection, not a branch: it is fused into the update, which reads the old values anyway."""
    return jax.tree.map(lambda new, old: jnp.where(accepted, new, old), after, before)


def _exhausted(c: config.Guard, guard: Guard) -> Bool[Array, ""]:
    """Whether as many steps were skipped as the run is to stop after."""
    exhausted = jnp.zeros((), bool)
    if c.max_in_a_row:
        exhausted |= guard.in_a_row >= c.max_in_a_row
    if c.max_skipped:
        exhausted |= guard.skipped >= c.max_skipped
    return exhausted


@jax.jit
def finite(tree: Any) -> Bool[Array, ""]:
    """Whether every number of a tree is finite; what is not a float is not looked at."""
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in floats]))
