"""The training state: abstract first, then sharded, then real."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key

from coca_jax import config
from coca_jax.model import lora
from coca_jax.model.coca import CoCa
from coca_jax.sharding import tree_shardings
from coca_jax.train import frozen
from coca_jax.train import guard as guards
from coca_jax.train.guard import Guard

Parameters = dict[str, Any]


@flax.struct.dataclass
class TrainState:
    """All that a run is, but for its place in the data.

    Attributes:
      step: steps made so far, those with a skipped update included.
      params: parameters by path.
      opt_state: optax's, of the parameters that are trained.
      ema: moving average of the parameters in float32, or None.
      rng: the run's key; what a step draws is keyed on (rng, step).
      guard: running statistics that tell a bad step, and how many were skipped.
    """

    step: Int[Array, ""]
    params: Parameters
    opt_state: Any
    ema: Parameters | None
    rng: Key[Array, ""]
    guard: Guard


def abstract_parameters(c: config.Config) -> Parameters:
    """Shapes of the parameters; those of a part whose loss weight is 0 do not exist."""
    # No kernel is run: a GPU's or TPU's model can be looked at anywhere.
    model = dataclasses.replace(c.model, attention="xla")
    # Nothing else changes a shape; a start asks several times, and the model takes half a second to trace.
    return jax.tree.map(lambda leaf: leaf, _traced(config.Config(model=model, loss=c.loss, lora=c.lora)))


@functools.lru_cache(8)
def _traced(c: config.Config) -> Parameters:
    image, text = c.model.image, c.model.text
    images = jax.ShapeDtypeStruct((1, *frames_of(c), image.size, image.size, 3), jnp.float32)
    tokens = jax.ShapeDtypeStruct((1, text.length), jnp.int32)
    return jax.eval_shape(lambda i, t: init_parameters(c, jax.random.key(0), i, t), images, tokens)


def placed_parameters(c: config.Config, mesh: Mesh) -> Parameters:
    """Shapes of the parameters and where each belongs on a mesh."""
    shapes = abstract_parameters(c)
    places = tree_shardings(shapes, shapes, mesh)
    placed: Parameters = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, places
    )
    return placed


def init_parameters(c: config.Config, rng: Key[Array, ""], images: Any = None, tokens: Any = None) -> Parameters:
    """Parameters as a plain nested dict, drawn from a key."""
    image, text = c.model.image, c.model.text
    images = jnp.zeros((1, *frames_of(c), image.size, image.size, 3)) if images is None else images
    tokens = jnp.full((1, text.length), text.pad_id, jnp.int32) if tokens is None else tokens

    def everything(model: CoCa, images: Any, tokens: Any) -> Any:
        loss, captioning = c.loss, c.loss.lambda_cap > 0
        more: Any = {"matching": True, "key": jax.random.key(0)} if loss.lambda_match > 0 else {}
        output = model.forward(
            *(images, tokens),
            **{"contrastive": loss.lambda_con > 0, "captioning": captioning, "classes": loss.lambda_cls > 0, **more},
        )
        later = model.second_stage(tokens) if c.model.bridge.stage == 1 else None
        return output, model.head() if captioning else None, later

    params = CoCa(c.model).init(rng, images, tokens, method=everything)["params"]
    return lora.with_updates(c.lora, params, jax.random.fold_in(rng, 1))


def frames_of(c: config.Config) -> tuple[int, ...]:
    frames = c.model.head.frames
    return (frames,) if frames > 1 else ()


def create(c: config.Config, optimizer: optax.GradientTransformation) -> TrainState:
    """A fresh state from the configured seed. Pure: trace it, or jit it with out_shardings."""
    init_key, run_key = jax.random.split(jax.random.key(c.seed))
    return _begun(c, optimizer, init_parameters(c, init_key), run_key)


def _begun(
    c: config.Config, optimizer: optax.GradientTransformation, params: Parameters, run_key: Key[Array, ""]
) -> TrainState:
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(frozen.split(params, frozen.patterns(c))[0]),
        # float32 even of bfloat16 parameters: the share of a step in a slow average is less than bfloat16 can add.
        ema=jax.tree.map(lambda p: jnp.array(p, jnp.float32), params) if c.optimizer.ema_decay else None,
        rng=run_key,
        guard=guards.fresh(),
    )


def abstract(c: config.Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state; nothing is allocated."""
    shapes = jax.eval_shape(lambda params: _begun(c, optimizer, params, jax.random.key(c.seed)), abstract_parameters(c))
    shardings = tree_shardings(shapes, shapes.params, mesh)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, shardings
    )


def real(c: config.Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """A fresh state, each device holding its own shards from the start. Needs `jax.set_mesh(mesh)`."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract(c, optimizer, mesh))
    return jax.jit(lambda: create(c, optimizer), out_shardings=shardings)()


def parameter_count(params: Parameters) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))
