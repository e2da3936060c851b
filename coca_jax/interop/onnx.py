"""A model as ONNX, for ONNX Runtime and whatever else reads it; `pip install "coca_jax[onnx]"` writes it.

    manifest.json      what there is: inputs and outputs, preprocessing, ids, sums of the files
    image.onnx         encode_image of coca_jax/interop/functions.py; text.onnx encode_text
    prefill.onnx       the start of a caption; step.onnx decode_step, its next token
    *.onnx.data        weights beside a graph with which they would be too large for one file
    tokenizer.model    the vocabulary (or tokenizer.json, or bpe_simple_vocab_16e6.txt.gz)

docs/onnx_coca.py is a program that captions pictures with these and onnxruntime.

jax2onnx translates, primitive by primitive. What it is given is the traced program with every call written out, so that
neither its replacements of Flax's and NumPy's functions nor JAX's representation of loops are met.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.extend import core
from jax.extend.core import primitives
from tqdm import tqdm

from coca_jax.interop import folders, functions
from coca_jax.interop.weights import ConversionError, Weights

FILES = {
    "encode_image": "image.onnx",
    "encode_text": "text.onnx",
    "prefill": "prefill.onnx",
    "decode_step": "step.onnx",
}
DTYPE = "float32"
OPSET = 23
EXTERNAL_ABOVE = 1_900_000_000  # bytes of constants; a file of protocol buffers holds 2 GiB
# Constants of fewer bytes stay in the graph in any case: shapes and axes, which a reader needs to see.
_SMALL = 1024


def check_installed() -> None:
    """Raises ConversionError where jax2onnx is not."""
    try:
        import jax2onnx  # noqa: F401  (needed by `graph`)
        import onnx  # noqa: F401
    except ImportError as error:
        raise ConversionError(f'ONNX is written by jax2onnx ({error}): pip install "coca_jax[onnx]"') from error


def write(weights: Weights, folder: epath.PathLike, *, overwrite: bool = False) -> None:
    """Writes the directory. It appears whole or not at all, and every graph has passed onnx's checker.

    The graphs take any batch, and compute in float32 whatever model.dtype is.

    Args:
      weights: of any source; parameters of other dtypes are taken to float32, which holds them exactly.
      folder: local, or a bucket's.
      overwrite: whether a directory that is there may be replaced.

    Raises:
      ConversionError: jax2onnx is not installed, there is something, it cannot be written, or the parameters are not
        the configuration's.
    """
    weights.only_coca("a directory of functions")
    check_installed()
    import onnx

    flat = {path: x.astype(np.float32) for path, x in functions.flat_parameters(weights).items()}
    with folders.new_folder(folder, overwrite=overwrite) as new:
        files = []
        for function in tqdm(
            functions.functions(weights, dtype=DTYPE, scan=False), desc="converting", unit="graph", leave=False
        ):
            path = new / FILES[function.name]
            files.append((function, _save(graph(function, flat, weights), path)))
            onnx.checker.check_model(str(path), full_check=True)
        more = {
            "computed_in": DTYPE,
            "opset": OPSET,
            "written_by": {name: importlib.metadata.version(name) for name in ("jax2onnx", "onnx", "jax")},
        }
        functions.write_manifest(new, weights, "onnx", files, more)


def graph(function: functions.Function, flat: functions.FlatParameters, weights: Weights) -> Any:
    """The function with its parameters as constants, an onnx_ir.Model with the function's names."""
    import jax2onnx

    inputs = functions.abstract(function.inputs, weights)
    traced = jax.make_jaxpr(lambda *arrays: function.call(flat, *arrays))(*inputs)
    with _quiet("jax2onnx", "onnx_ir"):
        model = jax2onnx.to_onnx(
            lambda *arrays: tuple(_run(traced.jaxpr, traced.consts, arrays)),
            inputs,
            model_name=function.name,
            opset=OPSET,
            return_mode="ir",
            input_names=[array.name for array in function.inputs],
            output_names=[array.name for array in function.outputs],
        )
    # Shapes but those of inputs and outputs are a courtesy, and jax2onnx 0.13 gets some wrong: readers infer them.
    values = [*model.graph.initializers.values(), *(value for node in model.graph for value in node.outputs)]
    for value in values:
        if not value.is_graph_output():
            value.shape = value.type = None
    return model


def _run(jaxpr: Any, constants: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    """Runs a traced program primitive by primitive, those inside calls too, in what ONNX Runtime has kernels for."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *arguments], strict=True))

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, core.Literal) else values[variable]

    for equation in jaxpr.eqns:
        given = [read(variable) for variable in equation.invars]
        primitive, options = equation.primitive, equation.params
        inner = options.get("jaxpr", options.get("call_jaxpr"))
        if inner is not None:
            result = _run(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), given)
        elif primitive is primitives.select_n_p and equation.outvars[0].aval.dtype == bool:
            result = [_choose(*given)]  # ONNX Runtime 1.32 has no Where of booleans
        else:
            made = primitive.bind(*given, **options)
            result = made if primitive.multiple_results else [made]
        values.update(zip(equation.outvars, result, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _choose(which: Any, if_false: Any, if_true: Any) -> Any:
    both = primitives.and_p.bind(which, if_true), primitives.and_p.bind(primitives.not_p.bind(which), if_false)
    return primitives.or_p.bind(*both)


def _save(model: Any, path: pathlib.Path) -> list[pathlib.Path]:
    """Writes a graph; gives its file, and that of its constants if they are too large."""
    import onnx_ir

    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    if size <= EXTERNAL_ABOVE:
        onnx_ir.save(model, path)
        return [path]
    data = path.with_name(f"{path.name}.data")
    onnx_ir.save(model, path, external_data=data.name, size_threshold_bytes=_SMALL)
    return [path, data]


@contextlib.contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Without warnings in the log: of translations that cannot be loaded and are not used, of values without a type."""
    levels = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
