"""Stacks of layers, as a scan over stacked parameters or as a loop, and their rematerialization policies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from coca_jax.model.attention import KERNEL_OUTPUT
from coca_jax.model.norms import STATISTICS
from coca_jax.sharding import keep_axis_order

_policies = jax.checkpoint_policies
# Tensors that each policy of config.REMAT saves. Products are saved with their bias added: saved without it, as by
# JAX's own policies, adding the bias costs another pass over memory, forward and in recomputation (docs/log.md). The
# TPU kernel's output is saved with the products, because running it again costs more.
_REMAT = {
    "dots": _policies.save_only_these_names("qkv", "up", "outputs", KERNEL_OUTPUT, STATISTICS),
    "qkv": _policies.save_only_these_names("qkv", "outputs", KERNEL_OUTPUT, STATISTICS),
    "outputs": _policies.save_only_these_names("outputs", STATISTICS),
    "everything": _policies.nothing_saveable,
}


def rematerialize(module: Any, remat: str, *, prevent_cse: bool = True) -> Any:
    """Module class whose backward pass recomputes what the policy `remat`, a key of config.REMAT, does not save.

    The policies none and attention change nothing here; the latter is handled by `layers.Attention.recompute`.

    Args:
      module: Module class.
      remat: Policy name.
      prevent_cse: Must be True outside a scan, where the compiler would otherwise merge the recomputation with the
        original and keep its result. Inside a scan it is unnecessary and slows the program.
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
    """`depth` layers as one module, scanned or looped over with the same stacked parameters.

    Args:
      layer: Module class. Its call takes the carried value and further arguments, and returns the new carried value and
        an extra output (an array, a tree or None), which is stacked.
      attributes: Attributes of every layer.
      axes: One entry per further argument: 0 if it has a leading layer axis, `nn.broadcast` if all layers share it.
      depth: Number of layers, 1 or more.
      remat: Policy, a key of config.REMAT.
      scan_unroll: Layers per scan step, all of which are compiled; 0, or `depth` and more: no scan (`Loop`).
      name: Module name.
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
        rematerialize(layer, remat, prevent_cse=False),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=axes,
        length=depth,
        unroll=unroll,
    )
    return scanned(**attributes, name=name)


class Loop(nn.Module):
    """The computation of the scan as a Python loop, with the parameters unstacked once for the whole pass.

    A scan copies each layer's parameters out of their stack, residuals into and out of stacks, and gradients into
    zero-initialized stacks: a tenth of a training step on CPUs (docs/log.md). Some export formats do not support scans.
    A scan compiles in the time of one layer, a loop in that of all layers.

    Attributes are the arguments of `stack`. Parameters are either stacked or stored per layer under its number. An
    argument with a layer axis is stacked or a tuple with one entry per layer; the output has the same form.
    """

    layer: type[nn.Module]
    attributes: Mapping[str, Any]
    axes: tuple[Any, ...]
    depth: int
    remat: str

    def setup(self) -> None:
        # Initialize through the scan, for the same values and names.
        self.scanned = _scanned(self.layer, self.attributes, self.axes, self.depth, self.remat)
        nn.share_scope(self, self.scanned)

    def __call__(self, x: Any, *rest: Any) -> tuple[Any, Any]:
        if self.is_initializing():
            initialized: tuple[Any, Any] = self.scanned(x, *rest)
            return initialized
        held = self.variables["params"]
        params = [held[str(layer)] for layer in range(self.depth)] if "0" in held else unstack(held, self.depth)
        arguments = [self._per_layer(argument, axis) for argument, axis in zip(rest, self.axes, strict=True)]
        layer = rematerialize(self.layer, self.remat)(**self.attributes, parent=None)
        outputs: list[Any] = []
        for layer_params, *layer_arguments in zip(params, *arguments, strict=True):
            x, output = layer.apply({"params": layer_params}, keep_axis_order(x), *layer_arguments)
            outputs.append(output)
        if any(isinstance(argument, tuple) for argument in rest):
            return x, tuple(outputs)
        # jnp.stack is a primitive (jax 0.10.2) that jax2onnx does not support.
        return x, jax.tree.map(lambda *leaves: jnp.concatenate([leaf[None] for leaf in leaves]), *outputs)

    def _per_layer(self, argument: Any, axis: Any) -> tuple[Any, ...]:
        if axis == nn.broadcast:
            return (argument,) * self.depth
        return argument if isinstance(argument, tuple) else unstack(argument, self.depth)


def unstack(stacked: Any, depth: int) -> tuple[Any, ...]:
    """Split stacked parameters, or a stacked cache, into separate arrays per layer.

    Decoding runs all layers for every token and reads separate arrays in place. From a stack, XLA for CPUs first copies
    each layer every time, an additional read and write. The gradient of a split is one concatenation; that of an index
    is a whole stack per layer.
    """
    leaves, tree = jax.tree.flatten(stacked)
    layers = [[layer.squeeze(0) for layer in lax.split(leaf, (1,) * depth)] for leaf in leaves]
    return tuple(jax.tree.unflatten(tree, [leaf[i] for leaf in layers]) for i in range(depth))
