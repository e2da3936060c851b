"""What stands before the blocks of a vision transformer: the patch embedding, the class token, the positions."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from coca_jax.interop.vision import layouts
from coca_jax.interop.vision.fit import Fit
from coca_jax.model.image_encoder import resize_positions

_MOST_POSITIONS, _LARGEST_PATCH = 2**16, 256  # of a file: a damaged one may claim any number

_PATCHES, _BIAS = "patch_embedding/kernel", "patch_embedding/bias"
_CLASS, _POSITIONS = "class_token", "position_embedding"


def fit_embedding(fit: Fit) -> None:
    """Fits all that stands before the blocks (but for a norm), resized where the model's grid or patches are others."""
    _patches(fit)
    _class_token(fit)
    _positions(fit, _bias(fit))


def resize_patches(kernel: np.ndarray, patch: int) -> np.ndarray:
    """A patch embedding for patches of another size.

    `w' = (B^T)^+ w` of FlexiViT (arXiv 2212.08013), B being the bilinear resizing of a patch: for larger
    patches, a resized patch gives with w' what the patch gave with w.

    Args:
      kernel: `[p, p, 3, d]`.
      patch: the new p, pixels.

    Returns:
      `[patch, patch, 3, d]`, float32; the very same array where the size does not change.
    """
    old = kernel.shape[0]
    if old == patch:
        return kernel
    at = np.clip((np.arange(patch) + 0.5) * old / patch - 0.5, 0, old - 1)[:, None]
    one_axis = np.maximum(0.0, 1.0 - np.abs(at - np.arange(old)[None]))  # [patch, old], between middles of pixels
    # Resizing a plane is resizing its rows and its columns, and so it is with the pseudo-inverse.
    inverse = np.linalg.pinv(one_axis.T)
    return np.einsum("Yy,Xx,yxcd->YXcd", inverse, inverse, kernel, optimize=True).astype(np.float32)


def _patches(fit: Fit) -> None:
    plain = fit.layout.anchor
    ours, theirs = layouts.split(fit.layout.patch)
    shape, width = fit.shape(plain), fit.model.image.width
    name = fit.take(plain)
    sizes = dict(zip(theirs, shape, strict=False))
    side = sizes.get("y", 0)
    if len(shape) != 4 or sizes != {"y": side, "x": side, "c": 3, "d": width} or not 0 < side <= _LARGEST_PATCH:
        wanted = layouts.their_shape(fit.layout.patch, [fit.wanted[_PATCHES]])
        fit.reasons.append(f"misshapen: {name} {shape}, wanted {wanted}, or such with other square patches")
        return

    def read() -> None:
        kernel = fit.read(name).transpose([theirs.index(axis) for axis in ours])
        new = fit.model.image.patch
        detail = f"resized from patches of {side}x{side} to {new}x{new} pixels" if side != new else ""
        fit.put(_PATCHES, resize_patches(kernel, new), [name], detail)

    fit.later(read)


def _class_token(fit: Fit) -> None:
    plain, key = fit.layout.class_token, "config.model.image.class_token"
    if plain not in fit.names:
        if _CLASS in fit.wanted:
            fit.initialise(_CLASS, f"the file has none: {key}=True")
            fit.notes.append(f"{key}=True and the file has no class token: a new one is read by all layers")
        return
    if _CLASS not in fit.wanted:
        fit.skip(plain, f"the class token: {key}=False")
        fit.notes.append(f"{key}=False and the file has a class token, which all its layers read: another function")
        return
    shape = fit.shape(plain)
    name = fit.take(plain)
    if math.prod(shape) != fit.model.image.width:
        fit.reasons.append(f"misshapen: {name} {shape}, wanted {fit.wanted[_CLASS]}")
    fit.later(lambda: fit.put(_CLASS, fit.read(name).reshape(-1), [name]))


def _bias(fit: Fit) -> str | None:
    """Fits the patch embedding's bias; returns its name where it goes into the positions."""
    plain, key = fit.layout.patch_bias, "config.model.image.patch_bias"
    width = (fit.model.image.width,)
    if plain not in fit.names:
        if _BIAS in fit.wanted:
            fit.initialise(_BIAS, "no such bias: zero, as drawn")
        return None
    if _BIAS in fit.wanted:
        name = fit.take(plain, width)
        fit.later(lambda: fit.put(_BIAS, fit.read(name), [name]))
        return None
    if _POSITIONS in fit.wanted and fit.layout.positions in fit.names:
        return fit.take(plain, width)
    fit.skip(plain, f"the bias of the patches: {key}=False")
    fit.notes.append(f"{key}=False, and the file's bias has no positions to go into: another function")
    return None


def _positions(fit: Fit, bias: str | None) -> None:
    plain, key = fit.layout.positions, "config.model.image.position"
    image = fit.model.image
    if plain not in fit.names:
        if _POSITIONS in fit.wanted:
            fit.initialise(_POSITIONS, f"the file has none: {key}='learned'")
            fit.notes.append(f"{key}='learned' and the file has no learned positions: another function")
        elif fit.layout.name != "coca_jax":
            fit.notes.append(f"{key}={image.position!r}: the file has no positions, whose kind is not known")
        return
    if _POSITIONS not in fit.wanted:
        fit.skip(plain, f"learned positions: {key}={image.position!r}")
        fit.notes.append(f"{key}={image.position!r} and the file's are learned: another function")
        return
    shape = fit.shape(plain)
    name = fit.take(plain)
    rows = shape[-2] if len(shape) > 1 else 0
    has_class = not _is_square(rows)  # its row comes first
    side = math.isqrt(rows - has_class) if rows else 0
    if shape != (*[1] * (len(shape) - 2), rows, image.width) or side < 1 or rows > _MOST_POSITIONS:
        fit.reasons.append(f"misshapen: {name} {shape}, wanted rows of {image.width} numbers for a square grid")
    elif has_class and not _is_square(rows - 1):
        fit.reasons.append(f"misshapen: {name} {shape}, its {rows} rows are no square grid, with a class token or not")

    def read() -> None:
        table = fit.read(name).reshape(rows, image.width)
        details = []
        if has_class and not image.class_token:
            table = table[1:]
            details.append("without the class token's row")
        elif image.class_token and not has_class:
            # timm's no_embed_class, big_vision's cls: the token has no position.
            table = np.concatenate([np.zeros((1, image.width), np.float32), table])
            details.append("with a row of zeros for the class token")
        new = image.size // image.patch
        table = np.array(resize_positions(jnp.asarray(table), new, class_token=image.class_token))
        if side != new:
            details.append(f"resized from {side}x{side} to {new}x{new}")
        if bias is not None:
            table[int(image.class_token) :] += fit.read(bias)[None]
            details.append("with the bias of the patches, for which config.model.image.patch_bias=False has no place")
        fit.put(_POSITIONS, table, [name] if bias is None else [name, bias], "; ".join(details))

    fit.later(read)


def _is_square(n: int) -> bool:
    return n > 0 and math.isqrt(n) ** 2 == n
