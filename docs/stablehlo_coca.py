"""A model written by `coca_jax.convert --to=stablehlo`, run by JAX alone: no coca_jax, no Flax.

    pip install jax flatbuffers numpy safetensors
    python docs/stablehlo_coca.py exported/mine pictures.npy

prints the token ids of a caption for each picture (uint8 [b, size, size, 3]); manifest.json names the tokenizer's file,
which turns them into text. Of a model that was trained without captions it prints the pictures' features.
docs/checkpoints.md describes the files.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import numpy as np
import safetensors.numpy


class Model:
    """Functions by name, e.g. `model["encode_text"](tokens)`, which take and give arrays in the manifest's order."""

    def __init__(self, folder: str):
        self.folder = pathlib.Path(folder)
        self.manifest = json.loads((self.folder / "manifest.json").read_text())
        assert (self.manifest["format"], self.manifest["format_version"]) == ("coca_jax/stablehlo", 1)
        tensors = safetensors.numpy.load(self.read(self.manifest["weights"]))
        self.params = jax.device_put(tensors)
        self.functions = {name: self.load(entry) for name, entry in self.manifest["functions"].items()}

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return lambda *arrays: self.functions[name](self.params, *arrays)

    def load(self, entry: dict[str, Any]) -> Callable[..., Any]:
        return jax.jit(jax.export.deserialize(bytearray(self.read(entry))).call)

    def read(self, entry: dict[str, Any]) -> bytes:
        content = (self.folder / entry["file"]).read_bytes()
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            sys.exit(f"{self.folder / entry['file']} is cut off or damaged: copy it again")
        return content

    def caption(self, pixels: np.ndarray) -> np.ndarray:
        """Token ids [b, length] of the likeliest captions: bos, tokens, eos, padding."""
        decoding = self.manifest["decoding"]
        if decoding is None:
            sys.exit(f"{self.folder} is of a model without captions (lambda_cap=0): it has {', '.join(self.functions)}")
        if decoding["bos_id"] is None:
            sys.exit(f"{self.folder} came without its tokenizer: export it again, of weights that have one")
        outputs = [output["name"] for output in self.manifest["functions"]["encode_image"]["outputs"]]
        image_tokens = self["encode_image"](pixels)[outputs.index("image_tokens")]
        tokens = np.full((len(pixels), decoding["length"]), decoding["pad_id"], np.int32)
        tokens[:, 0] = decoding["bos_id"]
        logits, *cache = self["prefill"](tokens[:, :1], image_tokens)
        done = np.zeros(len(pixels), bool)
        for index in range(1, decoding["length"]):
            scores = np.array(logits[:, -1])
            scores[:, decoding["never"]] = -np.inf
            tokens[:, index] = np.where(done, decoding["pad_id"], scores.argmax(axis=1))
            done |= tokens[:, index] == decoding["eos_id"]
            if done.all():
                break
            # Keys and values of the text grow, those of the picture (the last two) stay.
            logits, *grown = self["decode_step"](tokens[:, index : index + 1], *cache, np.int32(index))
            cache[: len(grown)] = grown
        return tokens


if __name__ == "__main__":
    model, pixels = Model(sys.argv[1]), np.load(sys.argv[2])
    if model.manifest["decoding"] is None:
        (rows,) = model["encode_image"](pixels)  # the half that there is
    else:
        rows = model.caption(pixels)
    for row in np.asarray(rows):
        print(*row)
