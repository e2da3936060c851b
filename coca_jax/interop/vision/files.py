"""Files of a vision transformer's weights: what is in them, read tensor by tensor, and what is written beside them.

Nothing is decompressed or copied before its shape has been looked at: a file of a few bytes can claim any size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
from etils import epath

from coca_jax.interop import folders, torch_files
from coca_jax.interop.weights import ConversionError

Shape = tuple[int, ...]

# What a folder's weights are called, in the order in which they are looked for.
_IN_FOLDERS = ("model.safetensors", "open_clip_model.safetensors", "open_clip_pytorch_model.bin", "pytorch_model.bin")
_SAFETENSORS_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True)
class Tensors:
    """The tensors of an open file.

    Attributes:
      shapes: of all of them, by name.
      read: a tensor by its name, as float32. Raises ConversionError where it is damaged or holds no floating-point
        numbers.
    """

    shapes: Mapping[str, Shape]
    read: Callable[[str], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Description:
    """What the JSON beside the weights says of how they were trained; None: it does not say.

    Attributes:
      source: the file that says it.
      heads: of the attention.
      gelu: as config.model.gelu, or another activation's name.
      norm_eps: of LayerNorm.
      mean, std: of the pictures' normalisation, of values in 0..1, red, green, blue.
      interpolation: `bicubic` or another.
    """

    source: str = ""
    heads: int | None = None
    gelu: str | None = None
    norm_eps: float | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    interpolation: str | None = None


def find(path: epath.PathLike) -> epath.Path:
    """The file of weights: the path itself, or the one in that folder.

    Raises:
      ConversionError: there is none, or it is not known which.
    """
    path = folders.named(path).expanduser()
    if not path.is_dir():
        if not path.exists():
            raise ConversionError(f"{path}: no such file or folder")
        folders.check_file(path)
        return path
    for name in _IN_FOLDERS:
        if (path / name).is_file():
            return path / name
    if (path / "checkpoints").is_dir():
        raise ConversionError(
            f"{path} is a run's workdir: write its weights out first, with python -m coca_jax.convert --input={path} "
            "--output=FOLDER"
        )
    found = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".npz"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or f"none of {', '.join(_IN_FOLDERS)}, *.safetensors, *.npz"
        raise ConversionError(f"{path}: it is not known which file is meant (there are: {names}): name one")
    return found[0]


@contextlib.contextmanager
def opened(path: epath.Path) -> Iterator[Tensors]:
    """The tensors of a safetensors, npz or PyTorch file, as long as the block lasts; a bucket's file is copied first.

    Raises:
      ConversionError: the file is damaged, or of no kind that is known.
    """
    if path.suffix in torch_files.SUFFIXES:
        arrays = torch_files.read(path)
        yield Tensors({k: v.shape for k, v in arrays.items()}, lambda name: _float32(path, name, arrays[name]))
        return
    reader = {".safetensors": _safetensors, ".npz": _npz}.get(path.suffix)
    if reader is None:
        raise ConversionError(f"{path}: weights are read from .safetensors, .npz, {', '.join(torch_files.SUFFIXES)}")
    folders.check_file(path)
    with folders.local_copy(path) as file, reader(path, file) as tensors:
        yield tensors


@contextlib.contextmanager
def _safetensors(path: epath.Path, file: pathlib.Path) -> Iterator[Tensors]:
    try:
        opened_file = safetensors.safe_open(file, "numpy")
    except (safetensors.SafetensorError, OSError) as error:
        raise ConversionError(f"{path} is cut off or no safetensors ({error}): copy it again") from error
    with opened_file as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118  (not a mapping)

        def read(name: str) -> np.ndarray:
            # Asked first: of a dtype that numpy does not have, safetensors raises errors of many kinds.
            if (dtype := slices[name].get_dtype()) not in _SAFETENSORS_FLOATS:
                raise ConversionError(f"{path}: {name} is of dtype {dtype}: {_WANTED}")
            return _float32(path, name, tensors.get_tensor(name))

        yield Tensors({name: tuple(one.get_shape()) for name, one in slices.items()}, read)


@contextlib.contextmanager
def _npz(path: epath.Path, file: pathlib.Path) -> Iterator[Tensors]:
    damaged = (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError, NotImplementedError, RuntimeError)
    hint = "is cut off or no npz of arrays"
    try:
        archive = zipfile.ZipFile(file)
        members = {name.removesuffix(".npy"): name for name in archive.namelist() if name.endswith(".npy")}
        headers = {name: _header(archive, member) for name, member in members.items()}
    except damaged as error:
        raise ConversionError(f"{path} {hint} ({error}): copy it again") from error
    with archive:

        def read(name: str) -> np.ndarray:
            if (dtype := headers[name][1]).hasobject:
                raise ConversionError(f"{path}: {name} holds Python objects, which are never loaded: {_WANTED}")
            try:
                with archive.open(members[name]) as stream:
                    array = np.lib.format.read_array(stream, allow_pickle=False)
            except damaged as error:
                raise ConversionError(f"{path}: {name} is damaged ({error}): copy the file again") from error
            # numpy has no name for bfloat16, and writes it as two bytes of nothing.
            return _float32(path, name, array.view(jnp.bfloat16) if dtype.str == "|V2" else array)

        yield Tensors({name: shape for name, (shape, _) in headers.items()}, read)


def _header(archive: zipfile.ZipFile, member: str) -> tuple[Shape, np.dtype]:
    """Shape and dtype of an array, of which no more than the header is read."""
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = reader(stream)
    return tuple(shape), dtype


_WANTED = "weights are float32, or of 16 or 64 bits"


def _float32(path: epath.Path, name: str, array: np.ndarray) -> np.ndarray:
    if not jnp.issubdtype(array.dtype, jnp.floating) or array.dtype.itemsize < 2:
        raise ConversionError(f"{path}: {name} is of dtype {array.dtype}: {_WANTED}")
    return np.asarray(array, np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Beside the file

# timm's heads by the name of an architecture, where its state_dict does not tell (vision_transformer.py of 1.0.31).
_TIMM_HEADS = {"tiny": 3, "small": 6, "base": 12, "large": 16, "huge": 16, "so400m": 16}
_TIMM_NAME = re.compile(r"vit_(\w+?)_patch\d+_(?:(?:clip|clip_quickgelu|siglip|dinov2)(?:_\d+)?|\d+)")


def describe(file: epath.Path, layout: str) -> Description:
    """What the JSON beside a file of weights says, in the place where this layout has it.

    Args:
      file: the weights.
      layout: timm | big_vision | open_clip | coca_jax.

    Raises:
      ConversionError: it is damaged.
    """
    for name, reader in _BESIDE.get(layout, {}).items():
        if (file.parent / name).is_file():
            values = folders.read_json(file.parent / name)
            try:
                return Description(name, **{key: value for key, value in reader(values).items() if value is not None})
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise ConversionError(
                    f"{file.parent / name} lacks a part or has another in its place: {error!r}"
                ) from error
    return Description()


def _timm(values: dict[str, Any]) -> dict[str, Any]:
    arguments, pretrained = values.get("model_args") or {}, values.get("pretrained_cfg") or {}
    name = str(values.get("architecture", ""))
    match = _TIMM_NAME.fullmatch(name)
    heads = arguments.get("num_heads", _TIMM_HEADS.get(match[1]) if match else None)
    activation = str(arguments.get("act_layer") or ("quick_gelu" if "quickgelu" in name else ""))
    return _preprocessing(pretrained) | {
        "heads": None if heads is None else int(heads),
        "gelu": {"gelu": "exact", "gelu_tanh": "tanh", "": None}.get(activation, activation),
    }


def _open_clip(values: dict[str, Any]) -> dict[str, Any]:
    model, preprocessing = values["model_cfg"], _preprocessing(values.get("preprocess_cfg") or {})
    vision = model["vision_cfg"]
    if name := vision.get("timm_model_name"):  # the tower is one of timm's
        return _timm({"architecture": name, "model_args": vision.get("timm_model_kwargs")}) | preprocessing
    return preprocessing | {
        "heads": int(vision.get("width", 768)) // int(vision.get("head_width", 64)),
        "gelu": "quick_gelu" if model.get("quick_gelu") else "exact",
    }


def _ours(values: dict[str, Any]) -> dict[str, Any]:
    model = values["model"]
    return _preprocessing(values["preprocessing"]) | {
        "heads": int(model["image"]["heads"]),
        "gelu": str(model["gelu"]),
        "norm_eps": float(model["norm_eps"]),
    }


def _preprocessing(values: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in ("mean", "std"):
        if (three := values.get(key)) is not None:
            red, green, blue = three
            found[key] = (float(red), float(green), float(blue))
    interpolation = values.get("interpolation")
    if not isinstance(interpolation, str | None):
        raise TypeError(f"interpolation={interpolation!r} is not a name")
    return found | {"interpolation": interpolation}


_BESIDE: dict[str, dict[str, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "timm": {"open_clip_config.json": _open_clip, "config.json": _timm},
    "open_clip": {"open_clip_config.json": _open_clip},
    "coca_jax": {"coca_jax.json": _ours},
}
