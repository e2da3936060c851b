"""Tests here import PyTorch, and are looked at only where they are asked for: `pytest -m peers`."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import pytest


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    if "peers" not in config.option.markexpr.replace("not peers", ""):
        return True
    _torchvision()
    return None


@functools.cache
def _torchvision() -> Any:
    """Makes torchvision importable beside PyTorch's build for processors.

    The package index has torchvision for GPUs, whose compiled operators do not load there. They are for detection, and
    are not used here; but torchvision describes two of them when it is imported, and so they must have been declared.
    """
    try:
        importlib.import_module("torchvision")
        return None
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
    torch: Any = importlib.import_module("torch")
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library  # kept: with it, its operators would go
