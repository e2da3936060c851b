"""What PyTorch's libraries need before they can be imported here."""

from __future__ import annotations

import functools
import importlib
from typing import Any


@functools.cache
def torchvision() -> Any:
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
