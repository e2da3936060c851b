"""A model written by `coca_jax.convert --to=onnx`, run by ONNX Runtime alone: no coca_jax, no JAX.

    pip install onnxruntime numpy
    python docs/onnx_coca.py exported/mine pictures.npy

prints the token ids of a caption for each picture (uint8 [b, size, size, 3]); manifest.json names the tokenizer's file,
which turns them into text. Of a model that was trained without captions it prints the pictures' features.
docs/checkpoints.md describes the files.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import sys
from typing import Any

import numpy as np
import onnxruntime


class Model:
    """Functions by name, e.g. `model("encode_text", tokens=ids)["text_features"]`."""

    def __init__(self, folder: str):
        self.folder = pathlib.Path(folder)
        self.manifest = json.loads((self.folder / "manifest.json").read_text())
        assert (self.manifest["format"], self.manifest["format_version"]) == ("coca_jax/onnx", 1)
        self.sessions = {name: self.load(entry) for name, entry in self.manifest["functions"].items()}

    def load(self, entry: dict[str, Any]) -> onnxruntime.InferenceSession:
        for part in (entry, *entry["data"]):
            with (self.folder / part["file"]).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != part["sha256"]:
                    sys.exit(f"{self.folder / part['file']} is cut off or damaged: copy it again")
        path = str(self.folder / entry["file"])
        return onnxruntime.InferenceSession(path, providers=onnxruntime.get_available_providers())

    def __call__(self, name: str, **inputs: Any) -> dict[str, np.ndarray]:
        session = self.sessions[name]
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, inputs), strict=True))

    def caption(self, pixels: np.ndarray) -> np.ndarray:
        """Token ids [b, length] of the likeliest captions: bos, tokens, eos, padding."""
        decoding = self.manifest["decoding"]
        if decoding is None:
            sys.exit(f"{self.folder} is of a model without captions (lambda_cap=0): it has {', '.join(self.sessions)}")
        if decoding["bos_id"] is None:
            sys.exit(f"{self.folder} came without its tokenizer: export it again, of weights that have one")
        tokens = np.full((len(pixels), decoding["length"]), decoding["pad_id"], np.int32)
        tokens[:, 0] = decoding["bos_id"]
        image_tokens = self("encode_image", images=pixels)["image_tokens"]
        cache = self("prefill", tokens=tokens[:, :1], image_tokens=image_tokens)
        logits = cache.pop("logits")
        done = np.zeros(len(pixels), bool)
        for index in range(1, decoding["length"]):
            logits[:, -1, decoding["never"]] = -np.inf
            tokens[:, index] = np.where(done, decoding["pad_id"], logits[:, -1].argmax(axis=1))
            done |= tokens[:, index] == decoding["eos_id"]
            if done.all():
                break
            new = self("decode_step", tokens=tokens[:, index : index + 1], index=np.array(index, np.int32), **cache)
            logits = new.pop("logits")
            cache |= {decoding["carried"][name]: value for name, value in new.items()}
        return tokens


if __name__ == "__main__":
    model, pixels = Model(sys.argv[1]), np.load(sys.argv[2])
    if model.manifest["decoding"] is None:
        rows = model("encode_image", images=pixels)["image_features"]  # the half that there is
    else:
        rows = model.caption(pixels)
    for row in rows:
        print(*row)
