"""A model as StableHLO: functions that JAX alone loads and runs on CPU, CUDA and TPU, with weights beside them.

    manifest.json               what there is: inputs and outputs, preprocessing, ids, sums of the files
    encode_image.jax_export     and the other functions of coca_jax/interop/functions.py, serialized by jax.export
    model.safetensors           parameters by path, the functions' first argument: other weights of the same shapes fit
    tokenizer.model             the vocabulary (or tokenizer.json, or bpe_simple_vocab_16e6.txt.gz)

A program that uses it needs jax, numpy and safetensors:

    params = jax.device_put(safetensors.numpy.load_file("DIR/model.safetensors"))
    exported = jax.export.deserialize(bytearray(pathlib.Path("DIR/encode_image.jax_export").read_bytes()))
    image_features, image_tokens = jax.jit(exported.call)(params, pixels)  # uint8 [b, size, size, 3], any b

docs/stablehlo_coca.py is a whole one, which captions pictures.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.export
from etils import epath
from tqdm import tqdm

from coca_jax.interop import folders, functions
from coca_jax.interop.weights import ConversionError, Weights

SUFFIX = ".jax_export"
WEIGHTS_FILE = "model.safetensors"
PLATFORMS = ("cpu", "cuda", "tpu")
_KNOWN = {*PLATFORMS, "rocm"}

# https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees
_LOADS_WITH = (
    "jax releases up to 6 months newer than jax_version and up to 3 weeks older, as jax guarantees; "
    "after that, export the weights again"
)


def write(
    weights: Weights, folder: epath.PathLike, *, platforms: Sequence[str] = PLATFORMS, overwrite: bool = False
) -> None:
    """Writes the directory. It appears whole or not at all. No accelerator is needed.

    The functions take any batch. They compute in model.dtype and give float32; only the decoder's cache is of
    model.dtype. Parameters keep their dtypes.

    Args:
      weights: of any source.
      folder: local, or a bucket's.
      platforms: that the functions are lowered for: cpu, cuda, rocm, tpu.
      overwrite: whether a directory that is there may be replaced.

    Raises:
      ConversionError: there is something, it cannot be written, the parameters are not the configuration's, or a
        platform is not known.
    """
    weights.only_coca("a directory of functions")
    if not platforms or not set(platforms) <= _KNOWN:
        raise ConversionError(f"platforms={list(platforms)}: give one or more of {', '.join(sorted(_KNOWN))}")
    flat = functions.flat_parameters(weights)
    with folders.new_folder(folder, overwrite=overwrite) as new:
        files = []
        for function in tqdm(functions.functions(weights), desc="lowering", unit="function", leave=False):
            lowered = lower(function, weights, platforms)
            files.append((function, [new / f"{function.name}{SUFFIX}"]))
            files[-1][1][0].write_bytes(lowered.serialize())
        folders.write_tensors(new / WEIGHTS_FILE, flat)
        more = {
            "computed_in": weights.config.model.dtype,
            "weights": functions.file(new / WEIGHTS_FILE),
            "platforms": list(platforms),
            "jax_version": jax.__version__,
            "calling_convention_version": lowered.calling_convention_version,
            "loads_with": _LOADS_WITH,
        }
        functions.write_manifest(new, weights, "stablehlo", files, more)


def lower(function: functions.Function, weights: Weights, platforms: Sequence[str]) -> jax.export.Exported:
    """The function of (parameters by path, *inputs) for some platforms, with free sizes where its inputs have letters.

    jax.export refuses what it does not promise to keep loadable: custom calls outside its list.
    """
    inputs = functions.abstract(function.inputs, weights)
    parameters = functions.shapes_of_parameters(weights)
    return jax.export.export(jax.jit(function.call), platforms=list(platforms))(parameters, *inputs)
