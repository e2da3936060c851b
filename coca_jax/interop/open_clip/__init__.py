"""open_clip's CoCa to and from ours: weights, configuration, preprocessing and tokenizer.

    weights = open_clip.read("CoCa-ViT-L-14/")  # a directory in the Hugging Face layout, or a file of weights
    open_clip.write(weights, "exported/")  # open_clip.create_model_and_transforms("local-dir:exported/") opens it
    open_clip.explain(model)  # what open_clip can express, what is rewritten for it, what it cannot be

Facts about open_clip are those of open_clip_torch 3.3.0.
"""

from coca_jax.interop.open_clip.configuration import CONFIGS, inferred_config, model_config, open_clip_config
from coca_jax.interop.open_clip.reading import read
from coca_jax.interop.open_clip.rewriting import explain, rewrite
from coca_jax.interop.open_clip.table import export_parameters, import_parameters, tensor_shapes
from coca_jax.interop.open_clip.writing import write
from coca_jax.interop.weights import ConversionError

__all__ = [
    "CONFIGS",
    "ConversionError",
    "explain",
    "export_parameters",
    "import_parameters",
    "inferred_config",
    "model_config",
    "open_clip_config",
    "read",
    "rewrite",
    "tensor_shapes",
    "write",
]
