"""Pictures: encoded bytes -> RGB pixels -> augmented or fitted squares -> normalised floats."""

from coca_jax.data.images.augmentation import augment, decode_and_augment
from coca_jax.data.images.decoding import MAX_PIXELS, decode
from coca_jax.data.images.geometry import fit, resize
from coca_jax.data.images.preprocessor import Preprocessor, decode_and_fit, normalize

__all__ = [
    "MAX_PIXELS",
    "Preprocessor",
    "augment",
    "decode",
    "decode_and_augment",
    "decode_and_fit",
    "fit",
    "normalize",
    "resize",
]
