"""Optimiser and schedule from the configuration: optax, put together."""

from __future__ import annotations

import dataclasses
import difflib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from flax import traverse_util

from coca_jax import config
from coca_jax.config import ConfigError
from coca_jax.sharding import parameter_axes, path_of
from coca_jax.train import adam, frozen, rounding
from coca_jax.train import guard as guards


def schedule(c: config.Optimizer, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up from 0 over `warmup * steps`, then the named decay to the last step."""
    warmup = _warmup(c, steps)
    rest = max(steps - warmup, 1)
    if c.schedule == "linear":
        after = optax.linear_schedule(c.peak_lr, c.peak_lr * c.end_lr, rest)
    elif c.schedule == "cosine":
        after = optax.cosine_decay_schedule(c.peak_lr, rest, c.end_lr)
    elif c.schedule == "rsqrt":
        start = max(warmup, 1)

        def after(count: Any) -> Any:
            # The other schedule's steps come here as negative counts, and are not used.
            return c.peak_lr * jnp.sqrt(start / (start + jnp.maximum(count, 0)))
    else:
        after = optax.constant_schedule(c.peak_lr)
    if not warmup:
        return after
    # The first step already moves: warm-up reaches peak_lr at its last step.
    ramp = optax.linear_schedule(c.peak_lr / warmup, c.peak_lr, max(warmup - 1, 1))
    return optax.join_schedules([ramp, after], [warmup])


def _warmup(c: config.Optimizer, steps: int) -> int:
    return round(c.warmup * steps)


def hindrance(before: config.Config, after: config.Config) -> str:
    """What to do instead of making a run longer; empty where all that it did is the beginning of the longer one.

    That is so where the learning rate goes by the warm-up alone and the warm-up has as many steps: the bits are then
    those of a run that was meant to be so long from the start.

    Args:
      before: as the run was begun.
      after: as it is to go on; another in `steps` and `optimizer.warmup`, a share of the steps.
    """
    kind, made = before.optimizer.schedule, _warmup(before.optimizer, before.steps)
    if after.steps < before.steps:
        return "a run does not become shorter: put it back"
    if kind not in ("constant", "rsqrt") and after.steps > before.steps:
        return (
            f"config.optimizer.schedule={kind!r} has set each learning rate for {before.steps} steps (constant and "
            "rsqrt could go on): put it back"
        )
    if _warmup(after.optimizer, after.steps) != made:
        share = f"{made / after.steps:.12g}"
        return f"keep the warm-up at {made} steps, --config.optimizer.warmup={share}, or put it back"
    return ""


def of_run(c: config.Config, parameters: Any) -> optax.GradientTransformationExtraArgs:
    """`make_optimizer` of a run, with all that it freezes. Raises as that does."""
    return make_optimizer(dataclasses.replace(c.optimizer, freeze=frozen.patterns(c)), c.steps, parameters)


def make_optimizer(c: config.Optimizer, steps: int, parameters: Any) -> optax.GradientTransformationExtraArgs:
    """The whole chain: clip, scale, decay, learning rate; of the parameters that `c.freeze` leaves to train.

    `update` takes `accepted`, a bool of this step: where it is false the whole state stays as it was (None: always).

    It computes in float32. `c.state_dtype` is what the momentum is stored in (Adafactor's, AdamW's and Muon's alike).
    bfloat16 takes 2 bytes a parameter less, and rounds the momentum to 8 bits at every step, an error that is forgotten
    at the rate b1: Zhai et al. 2021 (arXiv 2106.04560) saw no effect of it on training. `c.second_moment_dtype` saves
    as much again with AdamW and Muon (rounding.py).

    Args:
      c: configuration.
      steps: of the whole run, for the schedule.
      parameters: all parameters or their shapes, for the masks. The transformation is of `frozen.split(...)[0]`.

    Raises:
      ConfigError: a freeze pattern matches no parameter, or every parameter.
    """
    for pattern in c.freeze:
        if not any(jax.tree.leaves(matching(parameters, [pattern]))):
            paths = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(parameters)]
            near = ", ".join(difflib.get_close_matches(pattern, paths, n=3, cutoff=0.0))
            raise ConfigError(
                f"config.optimizer.freeze: {pattern!r} matches no parameter's whole path; near it: {near}"
            )
    everything = parameters
    parameters, _ = frozen.split(parameters, c.freeze)
    if not parameters:
        raise ConfigError(f"config.optimizer.freeze={c.freeze} freezes every parameter: nothing is left to train")
    momentum = jnp.dtype(c.state_dtype)
    parts = [clipped(c.clip_norm)] if c.clip_norm else []
    if c.name == "adafactor":
        # Shazeer and Stern 2018 (arXiv 1804.04235): factored second moment with decay min(b2, 1 - t^-0.8), updates
        # clipped to unit root-mean-square. optax has no b1 there: momentum is a part of its own (CoCa, section 4.1).
        factored = optax.scale_by_factored_rms(
            decay_rate=0.8, decay_rate_fn=lambda count, rate: jnp.minimum(c.b2, 1.0 - (count + 1.0) ** -rate)
        )
        parts += [on_matrices(factored), optax.clip_by_block_rms(1.0)]
        parts += [optax.ema(c.b1, debias=False, accumulator_dtype=momentum)] if c.b1 else []
    elif c.name == "adamw":
        parts.append(adam.scale_by_adam(c.b1, c.b2, c.eps, momentum))
    else:
        # Jordan 2024; the scale of Liu et al. 2025 (arXiv 2502.16982) makes a learning rate mean what it means to
        # AdamW, which keeps the embeddings, the output head, biases and norms. Without a learning rate it is a
        # direction, as those above are: its own weight decay has no mask for the parameters that AdamW keeps.
        parts.append(
            optax.contrib.muon(
                None,
                beta=c.b1,
                eps=c.eps,
                mu_dtype=momentum,
                adam_b1=c.b1,
                adam_b2=c.b2,
                muon_weight_dimension_numbers=matrices(parameters),
                consistent_rms=0.2,
            )
        )
    if c.weight_decay:
        parts.append(optax.add_decayed_weights(c.weight_decay, matching(parameters, [c.decay_mask])))
    parts.append(optax.scale_by_learning_rate(schedule(c, steps)))
    if c.layer_decay < 1:
        # Levels are counted in the whole model: what is frozen stands above and below the rest all the same.
        scales, _ = frozen.split(layer_scales(everything, c.layer_decay), c.freeze)
        parts.append(scaled(scales))
    whole = optax.chain(*parts)
    if c.second_moment_dtype == "bfloat16":
        whole = rounding.second_moments_in_bfloat16(whole)
    return guarded(in_float32(whole))


def clipped(norm: float) -> optax.GradientTransformation:
    """Gradients of at most this global norm (Pascanu et al. 2012, arXiv 1211.5063): optax's, by a factor of them all.

    optax divides each number by the norm, which XLA for CPUs writes down and reads again twice; a factor, which is 1
    where nothing is clipped, is taken in by what reads the gradients.
    """

    def update(updates: Any, state: Any, parameters: Any = None) -> tuple[Any, Any]:
        del parameters
        found = optax.tree.norm(updates)
        factor = jnp.where(found < norm, 1.0, norm / found)
        return jax.tree.map(lambda leaf: leaf * factor, updates), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def layer_scales(parameters: Any, decay: float) -> Any:
    """What each parameter's learning rate is multiplied by, `decay ** (levels above it)`: one float, or one a layer.

    Each tower counts for itself (Bao et al. 2021, arXiv 2106.08254): embeddings are below its first layer; the text
    decoder's halves are one tower. What stands above a tower (poolers, projections, output head, classifier) is its
    highest level, with the full rate.
    """
    flat = traverse_util.flatten_dict(parameters, sep="/")

    def depth(blocks: str) -> int:
        return max((leaf.shape[0] for path, leaf in flat.items() if f"{blocks}/blocks/" in path), default=0)

    image, uni, multi = (depth(blocks) for blocks in ("image_encoder", "unimodal", "multimodal"))

    def scale(path: str, leaf: Any) -> Any:
        path = path.removeprefix("lora/")
        if path.startswith("image_encoder/"):
            total, first = image, 1
        elif path.startswith("text_decoder/"):
            total, first = uni + multi, 1 + uni * ("/multimodal/" in path)
        else:
            return 1.0
        if "/blocks/" in path:
            layers = first + np.arange(leaf.shape[0])
            return (decay ** (total + 1.0 - layers)).astype(np.float32)
        if "lm_head" in path or "final_norm" in path or "cls_norm" in path:
            return 1.0
        return decay ** (total + 1.0)

    return traverse_util.unflatten_dict({path: scale(path, leaf) for path, leaf in flat.items()}, sep="/")


def scaled(scales: Any) -> optax.GradientTransformation:
    """Multiplies updates: each leaf by a float, or its layers by one each."""

    def update(updates: Any, state: Any, parameters: Any = None) -> tuple[Any, Any]:
        del parameters

        def multiply(leaf: jax.Array, factor: Any) -> jax.Array:
            if isinstance(factor, float):
                return leaf * factor
            return leaf * factor.reshape(-1, *(1,) * (leaf.ndim - 1))

        return jax.tree.map(multiply, updates, scales), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def matching(parameters: Any, patterns: Any) -> Any:
    """A tree of bools: whether a parameter's whole path matches one of the patterns."""
    compiled = [re.compile(p) for p in patterns]
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(p.fullmatch(path_of(path)) for p in compiled), parameters
    )


def matrices(parameters: Any) -> Any:
    """For Muon: which axes of a hidden layer's kernel are a matrix's rows and columns; None for other parameters."""

    def axes_of(path: tuple[Any, ...], leaf: Any) -> Any:
        name = path_of(path)
        axes = parameter_axes(name, leaf.ndim)
        if not name.endswith("kernel") or "vocab" in axes or "patch" in axes:
            return None
        own = [i for i, axis in enumerate(axes) if axis != "layers"]
        rows = own[:2] if axes[own[0]] == "heads" else own[:1]
        return optax.contrib.MuonDimensionNumbers(tuple(rows), tuple(i for i in own if i not in rows))

    return jax.tree_util.tree_map_with_path(axes_of, parameters)


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Shows `inner` gradients and parameters in float32, so that its state and updates are float32 too.

    optax keeps moments in the parameters' dtype: second moments of bfloat16 parameters would hardly move.
    """

    def init(parameters: Any) -> Any:
        return inner.init(optax.tree.cast(parameters, jnp.float32))

    inner = optax.with_extra_args_support(inner)

    def update(updates: Any, state: Any, parameters: Any = None, **extra: Any) -> tuple[Any, Any]:
        updates, parameters = optax.tree.cast((updates, parameters), jnp.float32)
        return inner.update(updates, state, parameters, **extra)

    return optax.GradientTransformationExtraArgs(init, update)


def guarded(inner: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """Keeps the state of `inner` where the step is not accepted; Adam's moments see to that themselves."""

    def update(
        updates: Any, state: Any, parameters: Any = None, *, accepted: jax.Array | None = None
    ) -> tuple[Any, Any]:
        updates, new = inner.update(updates, state, parameters, accepted=accepted)
        if accepted is not None:
            new = jax.tree.map(
                lambda after, before: after if _chosen(after) else guards.choose(accepted, after, before),
                new,
                state,
                is_leaf=_chosen,
            )
        return updates, new

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _chosen(state: Any) -> bool:
    return isinstance(state, adam.Moments)


def on_matrices(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Shows `inner` kernels as matrices: attention's `[d, h, k]` as `[d, h * k]`, `[p, p, 3, d]` as `[p * p * 3, d]`.

    Adafactor factors the two largest axes if both have at least 128 elements. Of `[1024, 16, 64]` it would factor
    nothing and keep a second moment as large as the parameter.
    """

    def merged(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        axes = parameter_axes(path_of(path), x.ndim)
        shape: list[int] = []
        for i, (axis, size) in enumerate(zip(axes, x.shape, strict=True)):
            together = i > 0 and ({axis, axes[i - 1]} == {"heads", "head_width"} or axis == axes[i - 1] == "patch")
            shape = [*shape[:-1], shape[-1] * size] if together else [*shape, size]
        return x.reshape(shape)

    def merge(tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(merged, tree)

    def init(parameters: Any) -> Any:
        return inner.init(merge(parameters))

    def update(updates: Any, state: Any, parameters: Any = None) -> tuple[Any, Any]:
        new, state = inner.update(merge(updates), state, None if parameters is None else merge(parameters))
        return jax.tree.map(lambda y, x: y.reshape(x.shape), new, updates), state

    return optax.GradientTransformation(init, update)
