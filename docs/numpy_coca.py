"""A coca_jax directory opened with NumPy and safetensors alone: what its files mean, as a program.

    python docs/numpy_coca.py exported/mine picture.npy 2,17,4,1

prints the similarity of a picture (uint8 [size, size, 3]) and of a text (ids, without padding), and what comes next in
the caption. Not fast: it is here to be read, and to be translated. docs/checkpoints.md describes the files.

Axes: b batch, n image tokens, q pooled tokens, t text tokens, d width, h heads, k head width, f MLP width.
"""

from __future__ import annotations

import json
import math
import pathlib
import sys
from typing import Any

import numpy as np
import safetensors.numpy


class Model:
    def __init__(self, folder: str):
        self.described = json.loads((pathlib.Path(folder) / "coca_jax.json").read_text())
        assert (self.described["format"], self.described["format_version"]) == ("coca_jax", 1)
        self.c = self.described["model"]
        tensors = safetensors.numpy.load_file(pathlib.Path(folder) / self.described["weights"]["file"])
        self.p = {path: x.astype(np.float64) for path, x in tensors.items()}
        # A half that was not trained has no parameters: what it would compute is None.
        self.has_contrastive = self.described["loss"]["lambda_con"] > 0
        self.has_captioning = self.described["loss"]["lambda_cap"] > 0

    def encode_image(self, pixels: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None]:
        """uint8 [b, size, size, 3] -> unit-length features [b, e], and the tokens [b, q, d] that a caption reads."""
        c, image = self.c["pooler"], self.c["image"]
        how = self.described["preprocessing"]
        x = (pixels / 255 - np.array(how["mean"])) / np.array(how["std"])
        side, patch = image["size"] // image["patch"], image["patch"]
        x = x.reshape(len(x), side, patch, side, patch, 3).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(len(x), side * side, patch, patch, 3)
        x = np.einsum("bnyxc,yxcd->bnd", x, self.p["image_encoder/patch_embedding/kernel"])
        x = x + self.p.get("image_encoder/patch_embedding/bias", 0)
        if image["class_token"]:
            x = np.concatenate([np.broadcast_to(self.p["image_encoder/class_token"], (len(x), 1, x.shape[2])), x], 1)
        if image["position"] == "learned":
            x = x + self.p["image_encoder/position_embedding"]
        else:
            x = x + _sincos_grid(side, image["width"], image["class_token"])
        if image["pre_norm"]:
            x = self.norm(x, "image_encoder/pre_norm")
        for layer in range(image["depth"]):
            at = "image_encoder/blocks"
            x = x + self.attention(self.norm(x, f"{at}/attention_norm", layer), None, f"{at}/attention", layer)
            x = x + self.mlp(self.norm(x, f"{at}/mlp_norm", layer), f"{at}/mlp", layer)
        features = tokens = None
        if self.has_captioning or c["kind"] != "parallel":
            tokens = self.pool(x, "generative_pooler")
        if c["kind"] == "single":
            pooled, tokens = tokens[:, 0], tokens[:, 1:]
        elif self.has_contrastive:
            pooled = self.pool(x if c["kind"] == "parallel" else tokens, "contrastive_pooler")[:, 0]
        if self.has_contrastive:
            features = _unit(pooled @ self.p["image_projection/kernel"])
        return features, tokens if self.has_captioning else None

    def encode_text(self, ids: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
        """ids [b, t], t = model.text.length, padded behind -> unit-length features [b, e], and the tokens [b, t, d]."""
        text = self.c["text"]
        t, pad = text["length"], text["pad_id"]
        assert ids.shape[1] == t
        x = self.p["text_decoder/token_embedding/embedding"][ids]
        x = np.concatenate([x, np.broadcast_to(self.p["text_decoder/cls_embedding"], (len(x), 1, x.shape[2]))], 1)
        if text["position"] == "learned":
            x = x + self.p["text_decoder/position_embedding"]
        else:
            x = x + _sincos(np.arange(t + 1), text["width"])
        # Text is causal. [CLS], the last, sees what is no padding; legacy masks are shifted by one (open_clip's).
        real, always = ids != pad, np.ones((len(ids), 1), bool)
        seen = np.concatenate([real, always] if text["cls_mask"] == "full" else [always, real], 1)
        allowed = np.broadcast_to(np.tri(t + 1, dtype=bool), (len(ids), t + 1, t + 1)).copy()
        allowed[:, t] = seen
        for layer in range(text["n_uni"]):
            at = "text_decoder/unimodal/blocks"
            y = self.norm(x, f"{at}/attention_norm", layer)
            x = x + self.attention(y, None, f"{at}/attention", layer, allowed)
            x = x + self.mlp(self.norm(x, f"{at}/mlp_norm", layer), f"{at}/mlp", layer)
        if not self.has_contrastive:
            return None, x[:, :t]
        cls = self.norm(x[:, t], "text_decoder/cls_norm")
        return _unit(cls @ self.p["text_projection/kernel"]), x[:, :t]

    def logits(self, text_tokens: np.ndarray, image_tokens: np.ndarray) -> np.ndarray:
        """Of the next token, after each: [b, t, v]."""
        text, x = self.c["text"], text_tokens
        allowed = np.tri(x.shape[1], dtype=bool)[None]
        at = "text_decoder/multimodal/blocks"
        for layer in range(text["n_multi"]):
            y = self.norm(x, f"{at}/attention_norm", layer)
            x = x + self.attention(y, None, f"{at}/attention", layer, allowed)
            if text["cross_mlp"]:
                x = x + self.mlp(self.norm(x, f"{at}/self_mlp_norm", layer), f"{at}/self_mlp", layer)
            read = self.norm(image_tokens, f"{at}/cross_kv_norm", layer) if text["cross_kv_norm"] else image_tokens
            x = x + self.attention(self.norm(x, f"{at}/cross_norm", layer), read, f"{at}/cross_attention", layer)
            x = x + self.mlp(self.norm(x, f"{at}/mlp_norm", layer), f"{at}/mlp", layer)
        x = self.norm(x, "text_decoder/final_norm")
        if text["tie_embeddings"]:
            return x @ self.p["text_decoder/token_embedding/embedding"].T
        return x @ self.p["text_decoder/lm_head/kernel"]

    def at(self, path: str, layer: int | None) -> np.ndarray:
        """A parameter; those of a stack of layers have a layer axis in front."""
        return self.p[path] if layer is None else self.p[path][layer]

    def norm(self, x: np.ndarray, path: str, layer: int | None = None) -> np.ndarray:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + self.c["norm_eps"])
        return x * self.at(f"{path}/scale", layer) + self.at(f"{path}/bias", layer)

    def mlp(self, x: np.ndarray, path: str, layer: int) -> np.ndarray:
        x = x @ self.at(f"{path}/up/kernel", layer) + self.at(f"{path}/up/bias", layer)
        if self.c["gelu"] == "tanh":
            x = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        else:
            x = 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
        return x @ self.at(f"{path}/down/kernel", layer) + self.at(f"{path}/down/bias", layer)

    def attention(
        self, x: np.ndarray, kv: np.ndarray | None, path: str, layer: int | None, allowed: Any = None
    ) -> np.ndarray:
        def project(what: str, x: np.ndarray) -> np.ndarray:
            kernel, bias = (self.at(f"{path}/{what}/{part}", layer) for part in ("kernel", "bias"))
            return np.einsum("bsd,dhk->bhsk", x, kernel) + bias[:, None]

        kv = x if kv is None else kv
        query, key, value = project("query", x), project("key", kv), project("value", kv)
        scores = query @ key.swapaxes(2, 3) / math.sqrt(query.shape[3])
        if allowed is not None:
            scores = np.where(allowed[:, None], scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = weights / weights.sum(-1, keepdims=True) @ value
        return np.einsum("bhsk,hkd->bsd", mixed, self.at(f"{path}/out/kernel", layer)) + self.at(
            f"{path}/out/bias", layer
        )

    def pool(self, tokens: np.ndarray, path: str) -> np.ndarray:
        query = self.norm(self.p[f"{path}/query_tokens"], f"{path}/query_norm")
        query = np.broadcast_to(query, (len(tokens), *query.shape))
        pooled = self.attention(query, self.norm(tokens, f"{path}/token_norm"), f"{path}/attention", None)
        return self.norm(pooled, f"{path}/out_norm")


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _sincos(positions: np.ndarray, width: int) -> np.ndarray:
    angle = positions[:, None] * 10_000.0 ** (-np.arange(width // 2) / (width // 2))
    return np.concatenate([np.sin(angle), np.cos(angle)], 1)


def _sincos_grid(side: int, width: int, class_token: bool) -> np.ndarray:
    one = _sincos(np.arange(side), width // 2)
    grid = np.concatenate([np.repeat(one, side, 0), np.tile(one, (side, 1))], 1)
    return np.concatenate([np.zeros((1, width)), grid]) if class_token else grid


if __name__ == "__main__":
    model = Model(sys.argv[1])
    text = model.c["text"]
    given = [int(token) for token in sys.argv[3].split(",")]
    ids = np.array([given + [text["pad_id"]] * (text["length"] - len(given))])
    image_features, image_tokens = model.encode_image(np.load(sys.argv[2])[None])
    text_features, text_tokens = model.encode_text(ids)
    if model.has_contrastive:
        print(f"similarity {image_features[0] @ text_features[0]:.4f}")
    if model.has_captioning:
        print(f"next token {model.logits(text_tokens, image_tokens)[0, len(given) - 1].argmax()}")
