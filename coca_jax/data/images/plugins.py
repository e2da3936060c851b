"""The decoders besides simplejpeg: one of Pillow's plugins for each kind, and what some of them need."""

from __future__ import annotations

import ctypes
import functools
import io
import pathlib
import warnings
from typing import Any

import PIL.features
import PIL.Image

from coca_jax.data import kinds
from coca_jax.data.records import BadExample

_EXTRA = "pip install 'coca_jax[heic]'"


def check(kind: str, length: int) -> None:
    """Raises BadExample where images of a kind are not read here.

    Args:
      kind: Of kinds.sniff; empty, which Pillow refuses, is let through.
      length: Bytes of the file, for the message.
    """
    if kind and kind not in kinds.READ:
        fix = "write it as JPEG, PNG or WebP"
    elif kind in ("AVIF", "WEBP") and not PIL.features.check(kind.lower()):
        fix = f"this Pillow was built without {kind}: pip install --upgrade pillow"
    elif kind == "HEIC" and _heif() is None:
        fix = _EXTRA
    else:
        return
    raise BadExample("unsupported", f"{length} bytes of a kind that is not read: {kind}; {fix}")


def open_image(data: bytes, kind: str) -> PIL.Image.Image:
    """The opened image; whatever Pillow or a plugin raises passes.

    Args:
      data: An encoded image, of a kind that `check` let through.
      kind: Of kinds.sniff.
    """
    if kind == "HEIC":
        image: PIL.Image.Image = _heif()(io.BytesIO(data))
        return image
    if kind == "TIFF":
        _quiet_tiff()
    return PIL.Image.open(io.BytesIO(data), formats=(kind,) if kind else ())


@functools.cache
def _heif() -> Any:
    """The plugin's class, None without its package. Registered with Pillow it would open the caller's files, too."""
    try:
        from pillow_heif.as_plugin import HeifImageFile
    except ImportError:
        return None
    return HeifImageFile


@functools.cache
def _quiet_tiff() -> None:
    """Stops libtiff and Pillow's plugin from writing what they think of a file to the terminal; errors are raised.

    libtiff's messages go to stderr by functions that its users can take away, which Pillow does not. Where Pillow was
    not installed as a wheel, with a libtiff of its own, they stay.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.TiffImagePlugin")
    package = pathlib.Path(PIL.__file__).parent
    for path in (*package.parent.glob("pillow.libs/libtiff*"), *package.glob(".dylibs/libtiff*")):
        library = ctypes.CDLL(str(path))
        for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
            function = getattr(library, name)
            function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_void_p
            function(None)
