"""CoCa (Contrastive Captioners) in JAX: pretraining, fine-tuning, use.

    coca = coca_jax.load(workdir)
    coca.encode_image(images), coca.encode_text(["a red apple"]), coca.caption(images)

The names are imported when they are used: `import coca_jax` loads no JAX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coca_jax.data.images import Preprocessor
    from coca_jax.data.tokenizer import Tokenizer
    from coca_jax.model.coca import CoCa
    from coca_jax.pretrained import load

__version__ = "0.1.0"
__all__ = ["CoCa", "Preprocessor", "Tokenizer", "load"]

_HOMES = {
    "CoCa": "coca_jax.model.coca",
    "Preprocessor": "coca_jax.data.images",
    "Tokenizer": "coca_jax.data.tokenizer",
    "load": "coca_jax.pretrained",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'coca_jax' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
