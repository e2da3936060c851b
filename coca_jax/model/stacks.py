"""Layers one after another: a scan over stacked parameters, or each layer by itself; what their backward pass keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from coca_jax.model.attention import KERNEL_OUTPUT
from coca_jax.model.norms import STATISTICS
from coca_jax.sharding import in_order

_keep = jax.checkpoint_policies
# What config.REMAT says is kept, by its names. Products with their biases: without them, as JAX's own policies keep
# them, adding the bias is a pass over memory of its own, forth and when it is computed again (docs/log.md). The TPU
# kernel's output is kept with the products: running it again costs more.
_REMAT = {
    "dots": _keep.save_only_these_names("qkv", "up", "outputs", KERNEL_OUTPUT, STATISTICS),
    "qkv": _keep.save_only_these_names("qkv", "outputs", KERNEL_OUTPUT, STATISTICS),
    "outputs": _keep.save_only_these_names("outputs", STATISTICS),
    "everything": _keep.nothing_saveable,
}


def rematerialised(module: Any, remat: str, *, prevent_cse: bool = True) -> Any:
    """A module class whose backward pass computes again what `remat`, a key of config.REMAT, says.

    none and attention change nothing here: the latter is `layers.Attention.recompute`.

    Args:
      module: class.
      remat: policy.
      prevent_cse: must be True but inside a scan, where it is of no use and hinders the compiler: outside, the compiler
        sees that what is computed again has been computed already, and keeps it after all.
    """
    if remat not in _REMAT:
        return module
    return nn.remat(module, prevent_cse=prevent_cse, policy=_REMAT[remat])


def stack(
    layer: type[nn.Module],
    attributes: Mapping[str, Any],
    axes: tuple[Any, ...],
    *,
    depth: int,
    remat: str,
    scan_unroll: int,
    name: str | None = None,
) -> Any:
    """`depth` layers as one module: parameters stacked on a leading axis, of the same names and values either way.

    Args:
      layer: a module whose call takes what goes through the layers, then other arguments, and returns what goes on and
        what the layer has made besides (an array, a tree or None), which is stacked.
      attributes: of each layer.
      axes: of the other arguments: 0 for what has a leading axis of layers, `nn.broadcast` for what all of them get.
      depth: layers, 1 or more.
      remat: policy, a key of config.REMAT.
      scan_unroll: layers a step of the scan holds, which compiles as many; 0, or depth and more: no scan (`Loop`).
      name: of the module.
    """
    if scan_unroll == 0 or scan_unroll >= depth:
        return Loop(layer, attributes, axes, depth, remat, name=name)
    return _scanned(layer, attributes, axes, depth, remat, scan_unroll, name=name)


def _scanned(
    layer: type[nn.Module],
    attributes: Mapping[str, Any],
    axes: tuple[Any, ...],
    depth: int,
    remat: str,
    unroll: int = 1,
    name: str | None = None,
) -> Any:
    scanned = nn.scan(
        rematerialised(layer, remat, prevent_cse=False),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=axes,
        length=depth,
        unroll=unroll,
    )
    return scanned(**attributes, name=name)


class Loop(nn.Module):
    """What the scan computes, each layer by itself, with parameters that are held `apart` once for the whole pass.

    A scan copies each layer's parameters out of their stack, what its backward pass needs into stacks and out again,
    and gradients into stacks that begin as zeros: on CPUs a tenth of a train step (docs/log.md). Nor can every program
    to which a model is exported have one. A scan is compiled in the time of one layer, a loop in that of all.

    Attributes: as the arguments of `stack`. Parameters are stacked, or each layer's under its number; an argument with
    an axis of layers is stacked or a tuple of each layer's, and what comes back is like it.
    """

    layer: type[nn.Module]
    attributes: Mapping[str, Any]
    axes: tuple[Any, ...]
    depth: int
    remat: str

    def setup(self) -> None:
        # Initial values are the scan's, and of its names.
        self.scanned = _scanned(self.layer, self.attributes, self.axes, self.depth, self.remat)
        nn.share_scope(self, self.scanned)

    def __call__(self, x: Any, *rest: Any) -> tuple[Any, Any]:
        if self.is_initializing():
            made: tuple[Any, Any] = self.scanned(x, *rest)
            return made
        held = self.variables["params"]
        params = [held[str(layer)] for layer in range(self.depth)] if "0" in held else apart(held, self.depth)
        arguments = [self._of_layers(given, axis) for given, axis in zip(rest, self.axes, strict=True)]
        layer = rematerialised(self.layer, self.remat)(**self.attributes, parent=None)
        outputs: list[Any] = []
        for layer_params, *layer_arguments in zip(params, *arguments, strict=True):
            x, made_besides = layer.apply({"params": layer_params}, in_order(x), *layer_arguments)
            outputs.append(made_besides)
        if any(isinstance(given, tuple) for given in rest):
            return x, tuple(outputs)
        # jnp.stack is a primitive of its own (jax 0.10.2), which jax2onnx does not know.
        return x, jax.tree.map(lambda *leaves: jnp.concatenate([leaf[None] for leaf in leaves]), *outputs)

    def _of_layers(self, given: Any, axis: Any) -> tuple[Any, ...]:
        if axis == nn.broadcast:
            return (given,) * self.depth
        return given if isinstance(given, tuple) else apart(given, self.depth)


def apart(stacked: Any, depth: int) -> tuple[Any, ...]:
    """The layers of a stack of parameters or of a cache, each in arrays of its own.

    A loop that goes through the layers again and again, as decoding does for each token, then reads them where they
    are. Out of a stack XLA for CPUs copies each layer first, every time: as much memory traffic again, twice over. And
    the gradient of a split is one concatenation, where that of an index is the whole stack for each layer.
    """
    leaves, tree = jax.tree.flatten(stacked)
    layers = [[layer.squeeze(0) for layer in lax.split(leaf, (1,) * depth)] for leaf in leaves]
    return tuple(jax.tree.unflatten(tree, [leaf[i] for leaf in layers]) for i in range(depth))
