"""A vision transformer from elsewhere as our image encoder: timm's, big_vision's, open_clip's, or one of ours.

    params, report = vision.load_encoder("vit_base_patch16_224/model.safetensors", c.model, encoder, c.data)
    print(report)

What is the same function is loaded; what has no place in our encoder is named, with the reason; what would make it
another function than ours can be is refused.
"""

from coca_jax.interop.vision.embedding import resize_patches
from coca_jax.interop.vision.loading import load_encoder
from coca_jax.interop.vision.report import Line, Report

__all__ = ["Line", "Report", "load_encoder", "resize_patches"]
