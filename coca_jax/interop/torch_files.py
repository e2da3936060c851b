"""PyTorch's own files, `.pt`, `.pth` and `.bin`: the one place that needs PyTorch, and only when one is read."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from coca_jax.data import addresses
from coca_jax.interop.folders import check_file, local_copy
from coca_jax.interop.weights import ConversionError

SUFFIXES = (".pt", ".pth", ".bin")


def read(path: epath.PathLike) -> dict[str, np.ndarray]:
    """The tensors of a file by name: a state_dict, or a training checkpoint that holds one as `state_dict`.

    It is read by PyTorch's weights-only loader, which runs no code of the file.

    Returns:
      Arrays of the dtypes that they have; bfloat16 as float32, which holds its values.

    Raises:
      ConversionError: PyTorch is not installed; the file is missing, damaged, or holds anything but weights.
    """
    path = addresses.path(path)
    check_file(path)
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError as error:
        raise ConversionError(
            f'{path} is a file of PyTorch\'s, which is not installed: pip install "coca_jax[torch]", or save the '
            "weights as safetensors"
        ) from error
    try:
        with local_copy(path) as file:
            values = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged or a malicious file raises is of many kinds
        reason = " ".join(str(error).split())[:300]
        raise ConversionError(f"{path} is damaged, or holds more than weights, which is not run: {reason}") from error
    if isinstance(values, Mapping) and isinstance(values.get("state_dict"), Mapping):
        values = values["state_dict"]
    if not isinstance(values, Mapping) or not values:
        raise ConversionError(f"{path} holds a {type(values).__name__}, not a state_dict of tensors by name")
    if wrong := [f"{name}: {type(x).__name__}" for name, x in values.items() if not isinstance(x, torch.Tensor)]:
        raise ConversionError(f"{path} holds what are no tensors:", wrong)
    return {str(name): _array(torch, x) for name, x in values.items()}


def _array(torch: Any, tensor: Any) -> np.ndarray:
    tensor = tensor.detach()
    array: np.ndarray = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).contiguous().numpy()
    return array
