"""Names and layouts of vision transformers' weights: timm's, big_vision's, open_clip's and ours.

Facts are those of timm 1.0.31 (vision_transformer.py), big_vision (models/vit.py) with google-research's
vision_transformer before it (models_vit.py), and open_clip_torch 3.3.0 (transformer.py).

A layout is written `ours->theirs`: theirs has the axes of ours in another order, those in parentheses as one. Where
several of our parameters make one tensor of theirs, they lie one after the other along its first axis. Axes: d width,
h heads, k head width, f MLP width, y x c rows, columns and channels of a patch, n image positions.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence

import numpy as np

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Rule:
    """Tensors of a file that make parameters of ours.

    Attributes:
      name: of the tensor, or with `{i}` those of the layers, one each. Without it, a tensor that makes parameters of
        the blocks has the layers as its first axis, as ours have.
      paths: of our parameters, inside the encoder.
      axes: layout, of one layer.
    """

    name: str
    paths: tuple[str, ...]
    axes: str

    @property
    def optional(self) -> bool:
        """Whether a file may be without it: biases, which are then zero."""
        return all(path.endswith("/bias") for path in self.paths)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one library names and lays out a vision transformer.

    Attributes:
      name: of the library.
      anchor: the patch embedding's kernel, by which the layout and the prefix of its names are known.
      patch: its layout.
      class_token, positions, patch_bias: names.
      rules: for all other parameters.
      layer_scale: factors of what a sublayer adds (Touvron et al. 2021, arXiv 2103.17239), and the sublayer's last
        module, into which they go.
      skipped: patterns of names that our encoder has no place for, and why that is as it should be.
      refused: patterns of names that make it another function, and how.
      gelu, norm_eps: what the library computes, unless the file's description says otherwise; "" and 0: any.
    """

    name: str
    anchor: str
    patch: str
    class_token: str
    positions: str
    patch_bias: str
    rules: tuple[Rule, ...]
    gelu: str
    norm_eps: float
    layer_scale: tuple[tuple[str, str], ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    refused: tuple[tuple[str, str], ...] = ()

    def prefix(self, name: str, names: Iterable[str]) -> str | None:
        """What stands before the layout's names, if a tensor of this name is its anchor; else None."""
        if not name.endswith(self.anchor):
            return None
        before = name.removesuffix(self.anchor)
        block = re.escape(before + self.rules[-1].name.split("{i}")[0])
        is_one = (before == "" or before[-1] in "./") and any(re.match(block, other) for other in names)
        return before if is_one else None

    def plain(self, name: str) -> str:
        """A tensor's name as the rules have it: big_vision's has changed with time."""
        if self.name != "big_vision":
            return name
        for pattern, new in _EARLIER:
            name = re.sub(pattern, new, name)
        return name


def _norm(theirs: str, ours: str, weight: str = "weight") -> tuple[Rule, ...]:
    return (
        Rule(f"{theirs}{weight}", (f"{ours}/scale",), "d->d"),
        Rule(f"{theirs}bias", (f"{ours}/bias",), "d->d"),
    )


def _torch_mlp(up: str, down: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{up}.weight", ("blocks/mlp/up/kernel",), "df->fd"),
        Rule(f"{up}.bias", ("blocks/mlp/up/bias",), "f->f"),
        Rule(f"{down}.weight", ("blocks/mlp/down/kernel",), "fd->df"),
        Rule(f"{down}.bias", ("blocks/mlp/down/bias",), "d->d"),
    )


def _torch_attention(qkv_weight: str, qkv_bias: str, out: str) -> tuple[Rule, ...]:
    qkv = [f"blocks/attention/{part}" for part in ("query", "key", "value")]
    return (
        Rule(qkv_weight, tuple(f"{part}/kernel" for part in qkv), "dhk->(hk)d"),
        Rule(qkv_bias, tuple(f"{part}/bias" for part in qkv), "hk->(hk)"),
        Rule(f"{out}.weight", ("blocks/attention/out/kernel",), "hkd->d(hk)"),
        Rule(f"{out}.bias", ("blocks/attention/out/bias",), "d->d"),
    )


OUTSIDE = "not of the image encoder"
_FINAL_NORM = "the final norm: our encoder has none, the poolers normalise what they read"
_CLASSIFIER = "the classifier"
_POOLING = "the pooling: our poolers are other ones, and begin as drawn"

TIMM = Layout(
    name="timm",
    anchor="patch_embed.proj.weight",
    patch="yxcd->dcyx",
    class_token="cls_token",
    positions="pos_embed",
    patch_bias="patch_embed.proj.bias",
    rules=(
        *_norm("norm_pre.", "pre_norm"),
        *_norm("blocks.{i}.norm1.", "blocks/attention_norm"),
        *_torch_attention("blocks.{i}.attn.qkv.weight", "blocks.{i}.attn.qkv.bias", "blocks.{i}.attn.proj"),
        *_norm("blocks.{i}.norm2.", "blocks/mlp_norm"),
        *_torch_mlp("blocks.{i}.mlp.fc1", "blocks.{i}.mlp.fc2"),
    ),
    gelu="exact",
    norm_eps=1e-6,
    layer_scale=(("blocks.{i}.ls1.gamma", "blocks/attention/out"), ("blocks.{i}.ls2.gamma", "blocks/mlp/down")),
    skipped=(
        (r"(fc_)?norm\.", _FINAL_NORM),
        (r"(head|head_dist|pre_logits)\.", _CLASSIFIER),
        (r"attn_pool\.", _POOLING),
        (r"mask_token$", "stands for hidden patches in some trainings"),
    ),
    refused=(
        (r"reg_token$", "register tokens, which every layer attends to and our encoder does not have"),
        (r"dist_token$", "a distillation token, which every layer attends to and our encoder does not have"),
        (r"blocks\.\d+\.attn\.[qk]_norm\.", "queries and keys are normalised, ours are not"),
        (r"blocks\.\d+\.attn\..*(rel_pos|relative_position)", "positions relative to each other, ours are not"),
        (r"blocks\.\d+\.mlp\.(w\d+|fc1_[gx])\.", "a gated MLP, ours has no gate"),
    ),
)

OPEN_CLIP = Layout(
    name="open_clip",
    anchor="conv1.weight",
    patch="yxcd->dcyx",
    class_token="class_embedding",
    positions="positional_embedding",
    patch_bias="conv1.bias",
    rules=(
        *_norm("ln_pre.", "pre_norm"),
        *_norm("transformer.resblocks.{i}.ln_1.", "blocks/attention_norm"),
        *_torch_attention(
            "transformer.resblocks.{i}.attn.in_proj_weight",
            "transformer.resblocks.{i}.attn.in_proj_bias",
            "transformer.resblocks.{i}.attn.out_proj",
        ),
        *_norm("transformer.resblocks.{i}.ln_2.", "blocks/mlp_norm"),
        *_torch_mlp("transformer.resblocks.{i}.mlp.c_fc", "transformer.resblocks.{i}.mlp.c_proj"),
    ),
    gelu="exact",
    norm_eps=1e-5,
    layer_scale=(
        ("transformer.resblocks.{i}.ls_1.gamma", "blocks/attention/out"),
        ("transformer.resblocks.{i}.ls_2.gamma", "blocks/mlp/down"),
    ),
    skipped=(
        (r"ln_post\.", _FINAL_NORM),
        (r"proj$", "the projection into that model's contrastive space"),
        (r"attn_pool(_contrastive)?\.", _POOLING),
        (r"mask_token$", "stands for hidden patches in some trainings"),
    ),
    refused=((r"transformer\.resblocks\.\d+\.attn\.(ln|logit_scale|head_scale)", "another attention than ours"),),
)


def _flax(block: str) -> tuple[Rule, ...]:
    attention = f"{block}MultiHeadDotProductAttention_0"
    return (
        *_norm(f"{block}LayerNorm_0/", "blocks/attention_norm", "scale"),
        *(
            rule
            for part in ("query", "key", "value")
            for rule in (
                Rule(f"{attention}/{part}/kernel", (f"blocks/attention/{part}/kernel",), "dhk->dhk"),
                Rule(f"{attention}/{part}/bias", (f"blocks/attention/{part}/bias",), "hk->hk"),
            )
        ),
        Rule(f"{attention}/out/kernel", ("blocks/attention/out/kernel",), "hkd->hkd"),
        Rule(f"{attention}/out/bias", ("blocks/attention/out/bias",), "d->d"),
        *_norm(f"{block}LayerNorm_1/", "blocks/mlp_norm", "scale"),
        Rule(f"{block}MlpBlock_0/Dense_0/kernel", ("blocks/mlp/up/kernel",), "df->df"),
        Rule(f"{block}MlpBlock_0/Dense_0/bias", ("blocks/mlp/up/bias",), "f->f"),
        Rule(f"{block}MlpBlock_0/Dense_1/kernel", ("blocks/mlp/down/kernel",), "fd->fd"),
        Rule(f"{block}MlpBlock_0/Dense_1/bias", ("blocks/mlp/down/bias",), "d->d"),
    )


# google-research/vision_transformer's names, and big_vision's before they were numbered by kind.
_EARLIER = (
    (r"^Transformer/posembed_input/pos_embedding$", "pos_embedding"),
    (r"^Transformer/encoderblock_0+(?=\d)", "Transformer/encoderblock_"),
    (r"^(Transformer/encoderblock\w*)/LayerNorm_2/", r"\1/LayerNorm_1/"),
    (r"^(Transformer/encoderblock\w*)/MlpBlock_3/", r"\1/MlpBlock_0/"),
    (r"^(Transformer/encoderblock\w*)/MultiHeadDotProductAttention_1/", r"\1/MultiHeadDotProductAttention_0/"),
)

BIG_VISION = Layout(
    name="big_vision",
    anchor="embedding/kernel",
    patch="yxcd->yxcd",
    class_token="cls",
    positions="pos_embedding",
    patch_bias="embedding/bias",
    rules=_flax("Transformer/encoderblock_{i}/"),
    gelu="tanh",  # flax.linen.gelu's default
    norm_eps=1e-6,
    skipped=(
        (r"Transformer/encoder_norm/", _FINAL_NORM),
        (r"(head|pre_logits)/", _CLASSIFIER),
        (r"MAPHead_0/", _POOLING),
    ),
    refused=(
        (r"Transformer/encoderblock\w*/.*/(query|key)_(ln|norm)/", "queries and keys are normalised, ours are not"),
    ),
)
SCANNED = dataclasses.replace(BIG_VISION, rules=_flax("Transformer/encoderblock/"))


def _same(path: str, axes: str) -> Rule:
    return Rule(path, (path,), f"{axes}->{axes}")


OURS = Layout(
    name="coca_jax",
    anchor="image_encoder/patch_embedding/kernel",
    patch="yxcd->yxcd",
    class_token="image_encoder/class_token",
    positions="image_encoder/position_embedding",
    patch_bias="image_encoder/patch_embedding/bias",
    rules=tuple(
        dataclasses.replace(rule, name=f"image_encoder/{rule.paths[0]}")
        for rule in (*_norm("", "pre_norm"), *_flax(""))
    ),
    gelu="",
    norm_eps=0.0,
    skipped=((r"(?!image_encoder/)", OUTSIDE),),
)

LAYOUTS = (TIMM, OPEN_CLIP, BIG_VISION, SCANNED, OURS)


# ---------------------------------------------------------------------------------------------------------------------
# Axes


def split(axes: str) -> tuple[str, list[str]]:
    """`dhk->(hk)d` is `dhk` and `[hk, d]`."""
    ours, theirs = axes.split("->")
    return ours, [merged or single for merged, single in re.findall(r"\((\w+)\)|(\w)", theirs)]


def their_shape(axes: str, shapes: Sequence[Shape]) -> Shape:
    """Of the tensor that parameters of ours with these shapes make."""
    ours, theirs = split(axes)
    sizes = [dict(zip(ours, shape, strict=True)) for shape in shapes]
    parts = [tuple(math.prod(size[axis] for axis in merged) for merged in theirs) for size in sizes]
    return parts[0] if len(parts) == 1 else (sum(part[0] for part in parts), *parts[0][1:])


def to_ours(axes: str, tensor: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
    """A tensor as the parameters of ours, of these shapes, that it is made of."""
    ours, theirs = split(axes)
    order = "".join(theirs)
    back = [order.index(axis) for axis in ours]
    pieces = np.split(tensor, len(shapes))
    return [
        piece.reshape([dict(zip(ours, shape, strict=True))[axis] for axis in order]).transpose(back)
        for piece, shape in zip(pieces, shapes, strict=True)
    ]
