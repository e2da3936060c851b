"""Which layout a file has, and whether it is of the same kind as the configuration says."""

from __future__ import annotations

import re
from collections.abc import Mapping

from etils import epath

from coca_jax import config
from coca_jax.interop.vision import files
from coca_jax.interop.vision.embedding import fit_embedding
from coca_jax.interop.vision.files import Description
from coca_jax.interop.vision.fit import Fit
from coca_jax.interop.vision.layouts import LAYOUTS, Layout, Shape
from coca_jax.interop.vision.report import Report
from coca_jax.interop.weights import ConversionError, Parameters

_NEAR = 1e-3  # of mean and std, of values in 0..1: a quarter of one of the 255 levels of a picture


def load_encoder(
    path: epath.PathLike, model: config.Model, params_like: Parameters, data: config.Data | None = None
) -> tuple[Parameters, Report]:
    """Weights of a vision transformer as parameters of our image encoder.

    Learned positions of another grid are resized bicubically (arXiv 2010.11929, section 3.2), a patch embedding of
    another patch size by the pseudo-inverse (arXiv 2212.08013). Layer scale goes into the weights that it
    multiplies, and a patch bias that our encoder does not have into its positions: both are exact.

    Args:
      path: file of weights (.safetensors, .npz, .bin, .pt, .pth), or a folder that holds one.
      model: whose encoder is to be filled.
      params_like: the encoder's parameters, or their shapes: `parameters["image_encoder"]`, a nested dict.
      data: compared with how the weights were trained, as far as JSON beside them says it.

    Returns:
      The parameters that the file has, a nested dict of new float32 arrays; those that it does not have are left out.
      And what came of each of them, and of each tensor of the file.

    Raises:
      ConversionError: the file is damaged or of no known layout; its sizes are not the model's; it is another function
        than our encoder can be; or its pictures had another mean and std. Every reason is listed.
    """
    file = files.find(path)
    with files.opened(file) as tensors:
        layout, prefix = _recognise(file, tensors.shapes)
        fit = Fit(file, tensors, layout, prefix, model, params_like)
        description = files.describe(file, layout.name)
        _compare_sizes(fit, description)
        _compare_function(fit, description)
        if data is not None:
            _compare_pictures(fit, description, data)
        fit.sort_out()
        fit.check("does not fit this configuration")
        fit_embedding(fit)
        fit.blocks()
        fit.refuse_rest()
        fit.check("has other tensors than an image encoder of this configuration")
        return fit.load(), fit.report()


def _recognise(file: epath.Path, names: Mapping[str, Shape]) -> tuple[Layout, str]:
    """The layout of a file, and what stands before its names."""
    found = [
        (layout, prefix) for layout in LAYOUTS for name in names if (prefix := layout.prefix(name, names)) is not None
    ]
    # A whole state of training has moments beside the weights, of the same names.
    found = [one for one in found if not re.search(r"(^|/)(opt/(?!target/)|mu/|nu/)", one[1])]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConversionError(
            f"{file} holds {len(found)} vision transformers, and it is not known which is meant:",
            [f"{layout.name}: {prefix}{layout.anchor}" for layout, prefix in found],
        )
    has = ", ".join(list(names)[:5])
    raise ConversionError(
        f"{file} holds no vision transformer that is known; it would be known by the name of its patch embedding:",
        [*(f"{layout.name}: {layout.anchor}" for layout in LAYOUTS), f"and it has {has}"],
    )


def _compare_sizes(fit: Fit, description: Description) -> None:
    found, image = fit.sizes(), fit.model.image
    if "heads" not in found and description.heads is not None:
        found["heads"] = description.heads
    for key, there in found.items():
        if (here := getattr(image, key)) != there:
            fit.reasons.append(
                f"config.model.image.{key}={here}: this file has {there}: config.model.image.{key}={there}"
            )
    if "heads" not in found:
        fit.notes.append(
            f"the file does not say how many heads it has: config.model.image.heads={image.heads} is taken, and "
            "another number is another function"
        )


def _compare_function(fit: Fit, description: Description) -> None:
    """What the weights were trained to compute: close enough to begin from, but said."""
    norm_eps = fit.layout.norm_eps
    if fit.layout.name == "timm" and "norm_pre.weight" in fit.names:
        norm_eps = 1e-5  # of its CLIP models
    for key, there in (("gelu", description.gelu or fit.layout.gelu), ("norm_eps", description.norm_eps or norm_eps)):
        here = getattr(fit.model, key)
        if not there:
            fit.notes.append(f"the file does not say its {key}: config.model.{key}={here!r} is taken")
        elif here != there:
            said = getattr(description, key) is not None
            who = f"{description.source} says" if said else f"{fit.layout.name}'s models usually have"
            fit.notes.append(f"config.model.{key}={here!r} and {who} {there!r}: not quite the same function")


def _compare_pictures(fit: Fit, description: Description, data: config.Data) -> None:
    for key in ("mean", "std"):
        there, here = getattr(description, key), getattr(data, key)
        if there is None:
            fit.notes.append(f"the file does not say the {key} of its pictures: config.data.{key}={here} is taken")
        elif max(abs(a - b) for a, b in zip(there, here, strict=True)) > _NEAR:
            fit.reasons.append(
                f"config.data.{key}={here}: {description.source} says that this file wants config.data.{key}={there}"
            )
    there = description.interpolation
    if there and there.removeprefix("pillow-") != data.interpolation.removeprefix("pillow-"):
        fit.notes.append(f"config.data.interpolation={data.interpolation!r} and {description.source} says {there!r}")
