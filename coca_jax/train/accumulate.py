"""The gradient of a large batch, contrastive negatives included, with the activations of one microbatch in memory.

A microbatch's own loss would see only its own negatives. Instead (Gao et al. 2021, GradCache, arXiv 2101.06983; Pham et
al. 2021, BASIC, arXiv 2111.10050):

1. every microbatch is embedded, and of it nothing is kept but the features;
2. the contrastive loss of the whole batch is differentiated with respect to the features;
3. every microbatch is embedded again and backpropagated from `sum(feature * gradient of that feature)`, whose gradient
   is, by the chain rule, that of the whole batch's loss.

Captions need no other example: in 3 each microbatch's mean is weighted by its share of the batch's real tokens. So the
result is the gradient of the single-batch loss but for rounding.

The price is one more forward pass of the contrastive half, and on a mesh that parameters are gathered and gradients
reduced for every microbatch instead of once: as few microbatches as fit are the fastest.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, Shaped

from coca_jax import config, losses
from coca_jax.data.images import normalize
from coca_jax.model import lora
from coca_jax.model.coca import CoCa, Output
from coca_jax.sharding import shard, tree_shardings
from coca_jax.train import frozen
from coca_jax.train.state import Parameters

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def parts(c: config.Config) -> dict[str, bool]:
    """What of the model is computed and exists: the parts whose loss has a weight."""
    loss = c.loss
    return {
        "contrastive": loss.lambda_con > 0,
        "captioning": loss.lambda_cap > 0,
        "classes": loss.lambda_cls > 0,
        "matching": loss.lambda_match > 0,
    }


def forward(
    c: config.Config,
    params: Parameters,
    batch: Batch,
    *,
    contrastive: bool,
    captioning: bool,
    classes: bool,
    matching: bool = False,
    key: Key[Array, ""] | None = None,
) -> tuple[Output, jax.Array | None]:
    """The model's training pass over a batch as it comes from the data.

    Args:
      c: configuration.
      params: of the model.
      batch: `images` uint8 `[b, size, size, 3]` (with frames `[b, f, size, size, 3]`), `tokens` int32 `[b, t]`.
      contrastive, captioning, classes, matching: the parts that are computed.
      key: of what matching draws.

    Returns:
      CoCa.forward's output, and with captioning the output softmax's kernel `[d, v]`, else None.
    """
    model, variables = CoCa(c.model), {"params": lora.merged(c.lora, params)}
    images = normalize(batch["images"], c.data.mean, c.data.std)
    images = shard(images, "batch", *(None,) * (images.ndim - 1))
    wanted: Any = {"contrastive": contrastive, "captioning": captioning, "classes": classes}
    if matching:
        wanted |= {"matching": True, "key": key}
    output: Any = model.apply(variables, images, batch["tokens"], **wanted, method="forward")
    head: Any = model.apply(variables, method="head") if captioning else None
    return output, head


def accumulated_gradients(
    c: config.Config, trained: Parameters, fixed: Parameters, batch: Batch
) -> tuple[Parameters, Metrics]:
    """Gradients and metrics of a global batch, `c.microbatches` parts after one another.

    With `lambda_con` 0 there is no first pass; with `lambda_cap` 0 the decoder's captioning half is not computed. The
    classification loss, like the captioning one, needs no other example.

    Args:
      c: configuration; `c.microbatches` divides b.
      trained, fixed: the model's parameters, as `frozen.split` parts them.
      batch: `images` uint8 `[b, size, size, 3]`, `tokens` int32 `[b, t]`, and of a task `labels` int32 `[b]`.

    Returns:
      float32 gradients of those that are trained, each placed on the mesh like its parameter, and the metrics of
      `losses.total`.
    """
    weights, pad_id, count = c.loss, c.model.text.pad_id, c.microbatches
    wanted: Any = parts(c)
    cut = {name: split(x, count) for name, x in batch.items()}
    metrics: Metrics = {"loss": jnp.zeros((), jnp.float32)}

    def part(at: jax.Array) -> Batch:
        """One microbatch. Cut out of the split batch where it is used: a scan over it would copy the images first."""
        of_it = {name: jax.lax.dynamic_index_in_dim(x, at, axis=1, keepdims=False) for name, x in cut.items()}
        return {name: shard(x, "batch", *(None,) * (x.ndim - 1)) for name, x in of_it.items()}

    def whole_model(trained: Parameters) -> Parameters:
        return frozen.join(trained, fixed)

    numbers = jnp.arange(count)
    slopes = None  # of the contrastive loss with respect to the features, the logit scale and whatever else it reads
    if wanted["contrastive"]:
        alone: Any = {"contrastive": True, "captioning": False, "classes": False}

        def embed(_: None, at: jax.Array) -> tuple[None, Output]:
            with jax.named_scope("microbatch_embed"):
                return None, _embedding(forward(c, whole_model(trained), part(at), **alone)[0])

        def contrastive(stacked: Output) -> tuple[jax.Array, Metrics]:
            contrastive_alone = dataclasses.replace(weights, lambda_cap=0.0, lambda_cls=0.0)
            # What is not of an example (the logit scale) is the same in every microbatch, and read from the first.
            whole: Any = jax.tree.map(lambda x: join(x) if x.ndim > 1 else x[0], stacked)
            return losses.total(whole, None, batch["tokens"], contrastive_alone, pad_id=pad_id)

        slopes, metrics = jax.grad(contrastive, has_aux=True)(jax.lax.scan(embed, None, numbers)[1])

    tokens = jnp.sum(split(losses.targets(batch["tokens"], pad_id)[1], count), axis=(0, 2))
    shares = tokens / jnp.maximum(jnp.sum(tokens), 1.0)

    def surrogate(trained: Parameters, at: jax.Array, slope: Output | None, share: jax.Array) -> tuple[Any, Metrics]:
        """Its gradient, summed over the microbatches, is the loss's; also this microbatch's share of the metrics."""
        microbatch = part(at)
        output, head = forward(c, whole_model(trained), microbatch, **wanted)
        value = jnp.zeros((), jnp.float32)
        own: Metrics = {}
        # Products and sums, not a dot product: its operands would be rounded to bfloat16 on a TPU, the gradients too.
        for a, b in zip(jax.tree.leaves(slope), jax.tree.leaves(_embedding(output)), strict=True):
            value += jnp.sum(jax.lax.stop_gradient(a) * b)
        if wanted["captioning"]:
            assert output.hidden is not None and head is not None
            mean = losses.captioning(
                output.hidden, head, microbatch["tokens"], pad_id=pad_id, chunk=weights.caption_chunk
            )
            own["loss/captioning"] = share * mean
            value += weights.lambda_cap * own["loss/captioning"]
        if wanted["classes"]:
            assert output.class_logits is not None
            _, found = losses.classification(
                output.class_logits, microbatch["labels"], smoothing=weights.label_smoothing
            )
            own |= {name: metric / count for name, metric in found.items()}
            value += weights.lambda_cls * own["loss/classification"]
        return value, own

    def accumulate(total: Parameters, step: Any) -> tuple[Parameters, Metrics]:
        with jax.named_scope("microbatch_gradients"):
            gradients, own = jax.grad(surrogate, has_aux=True)(trained, *step)
            total = jax.tree.map(lambda a, b: a + b.astype(jnp.float32), total, _placed(gradients, trained))
            return _placed(total, trained), own

    zeros = _placed(jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), trained), trained)
    gradients, of_parts = jax.lax.scan(accumulate, zeros, (numbers, slopes, shares))
    metrics |= {name: jnp.sum(values) for name, values in of_parts.items()}
    for name, weight in (("loss/captioning", weights.lambda_cap), ("loss/classification", weights.lambda_cls)):
        if name in metrics:
            metrics["loss"] += weight * metrics[name]
    return gradients, metrics


def split(x: Shaped[Array, "b ..."], count: int) -> Shaped[Array, "m n ..."]:
    """`[b, ...]` -> `[b / count, count, ...]`; `[:, i]` is microbatch i: rows i, i + count, i + 2 count and so on.

    Every microbatch has the same number of rows of every device, so that none of them moves. Rows `i * b / count` and
    following would all lie on the same few devices.
    """
    return shard(x.reshape(x.shape[0] // count, count, *x.shape[1:]), "batch", *(None,) * x.ndim)


def join(x: Shaped[Array, "n m ..."]) -> Shaped[Array, "b ..."]:
    """Microbatches stacked in front, `[count, b / count, ...]` -> `[b, ...]` in the order that `split` found."""
    x = shard(x, None, "batch", *(None,) * (x.ndim - 2)).swapaxes(0, 1)
    return shard(x.reshape(-1, *x.shape[2:]), "batch", *(None,) * (x.ndim - 2))


def _embedding(output: Output) -> Output:
    """What the contrastive loss reads of an output: everything but the captioning half's and the classifier's."""
    return dataclasses.replace(output, image_tokens=None, hidden=None, logits=None, class_logits=None)


def _placed(tree: Parameters, params: Parameters) -> Parameters:
    """Pins values to where their parameters live; left to the compiler, gradients can lose the fsdp axis."""
    mesh: Any = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    placed: Parameters = jax.lax.with_sharding_constraint(tree, tree_shardings(tree, params, mesh))
    return placed
