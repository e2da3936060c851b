"""One training step, pure: jit, donation and shardings are put around it in `compile_step`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from coca_jax import config, losses
from coca_jax.data.records import REASONS
from coca_jax.model.coca import MAX_LOG_SCALE
from coca_jax.sharding import batch_sharding, replicated
from coca_jax.train import adam, frozen
from coca_jax.train import guard as guards
from coca_jax.train.accumulate import Batch, Metrics, accumulated_gradients, forward, parts
from coca_jax.train.optimizer import schedule
from coca_jax.train.state import Parameters, TrainState


def loss_function(
    c: config.Config, params: Parameters, batch: Batch, key: jax.Array | None = None
) -> tuple[jax.Array, Metrics]:
    """The loss of a global batch, and its parts.

    Args:
      c: configuration.
      params: of the model.
      batch: `images` uint8 `[b, size, size, 3]`, `tokens` int32 `[b, t]`, and of a task `labels` int32 `[b]`.
      key: of what the loss draws (matching's wrong pairs); None: always the same.
    """
    output, head = forward(c, params, batch, key=jax.random.key(0) if key is None else key, **parts(c))
    pad_id, labels = c.model.text.pad_id, batch.get("labels")
    return losses.total(output, head, batch["tokens"], c.loss, pad_id=pad_id, labels=labels)


def gradients_of(
    c: config.Config, params: Parameters, batch: Batch, key: jax.Array | None = None
) -> tuple[Parameters, Metrics]:
    """Gradients of the global batch's loss with respect to what is trained, and its metrics.

    At once, or microbatch by microbatch. Of frozen parameters there are none: the backward pass ends where nothing
    before it is trained.
    """
    trained, fixed = frozen.split(params, frozen.patterns(c))
    if c.microbatches > 1:
        return accumulated_gradients(c, trained, fixed, batch)
    return jax.grad(lambda p: loss_function(c, frozen.join(p, fixed), batch, key), has_aux=True)(trained)


def train_step(
    c: config.Config, optimizer: optax.GradientTransformationExtraArgs, state: TrainState, batch: Batch
) -> tuple[TrainState, Metrics]:
    """Loss, gradients, update; the update is left out, and all but the step's count stays, where the guard refuses it.

    Metrics are float32 scalars of the global batch; and, where the batch has `problem` (int8 `[b]`), `problems`: int32
    `[len(REASONS)]`, the number of examples with each.
    """
    gradients, metrics = gradients_of(c, state.params, batch, jax.random.fold_in(state.rng, state.step))
    # The norm and all that the optimiser makes of bfloat16 gradients (of bfloat16 parameters) is computed in float32.
    gradients = optax.tree.cast(gradients, jnp.float32)
    norm, made = optax.tree.norm(gradients), state.step - state.guard.skipped  # updates made so far
    guard, accepted, judged = guards.judge(c.guard, state.guard, metrics["loss"], norm)
    trained, fixed = frozen.split(state.params, frozen.patterns(c))
    updates, opt_state = optimizer.update(gradients, state.opt_state, trained, accepted=accepted)
    update_norm = optax.tree.norm(updates)
    accepted = adam.after(accepted, update_norm)
    after = optax.apply_updates(trained, updates)
    if "logit_scale" in after:
        after["logit_scale"] = jnp.clip(after["logit_scale"], 0.0, MAX_LOG_SCALE)
    ema = state.ema
    if ema is not None:
        # Early on the average forgets faster, so that it does not remember the initialisation.
        decay = jnp.minimum(c.optimizer.ema_decay, (1.0 + made) / (10.0 + made))
        averaged, same = frozen.split(ema, frozen.patterns(c))
        averaged = jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new, averaged, after)
        ema = frozen.join(averaged, same)
    trained, ema = guards.choose(accepted, (after, ema), (trained, state.ema))
    metrics |= judged | {
        "gradient_norm": norm,
        "update_norm": jnp.where(accepted, update_norm, 0.0),
        "learning_rate": jnp.asarray(schedule(c.optimizer, c.steps)(made), jnp.float32),
    }
    if "problem" in batch:
        # After all else: as the first of the collectives, which depends on nothing, it met others out of turn where
        # several processes compute on CPUs (jaxlib 0.10.2 and 0.12, Gloo).
        problem = jax.lax.optimization_barrier((batch["problem"], metrics["update_norm"], metrics["loss"]))[0]
        reasons = 1 + jnp.arange(len(REASONS), dtype=problem.dtype)
        metrics["problems"] = jnp.sum(problem[:, None] == reasons[None], axis=0, dtype=jnp.int32)
    params = frozen.join(trained, fixed)
    return TrainState(state.step + 1, params, opt_state, ema, state.rng, guard), metrics


def compile_step(
    c: config.Config, optimizer: optax.GradientTransformationExtraArgs, mesh: Mesh, state: TrainState
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The step over a mesh: jitted, the old state's buffers given to the new one.

    Args:
      c: configuration.
      optimizer: made for these parameters.
      mesh: of sharding.MESH_AXES; must be the one set by `jax.set_mesh` when the step is called or lowered.
      state: real or abstract, with shardings. Given again as out_shardings: left to the compiler, gradients and moments
        can lose the fsdp axis.
    """
    places: Any = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(
        lambda state, batch: train_step(c, optimizer, state, batch),
        in_shardings=(places, batch_sharding(mesh)),
        out_shardings=(places, replicated(mesh)),
        donate_argnums=0,
    )
