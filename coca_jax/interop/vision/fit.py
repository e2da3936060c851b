"""One file's way into the image encoder: what each tensor becomes, looked at before anything is read."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence

import numpy as np
from etils import epath
from flax import traverse_util
from tqdm import tqdm

from coca_jax import config
from coca_jax.interop.vision import layouts
from coca_jax.interop.vision.files import Tensors
from coca_jax.interop.vision.layouts import Layout, Rule, Shape
from coca_jax.interop.vision.report import INITIALISED, LOADED, SKIPPED, Line, Report
from coca_jax.interop.weights import ConversionError, Parameters

_KEYS = {"d": "width", "f": "mlp_dim", "h": "heads"}  # axis -> of config.model.image


class Fit:
    """Tensors of a file, each of which is taken into our parameters, skipped with a reason, or a reason to refuse all.

    Attributes:
      model: whose encoder is filled.
      layout: of the file.
      wanted: shapes of the encoder's parameters, by path.
      names: the layout's name of a tensor -> its name in the file, of those that nothing has taken yet.
      notes: for the report.
      reasons: why it cannot be loaded.
    """

    def __init__(
        self,
        file: epath.Path,
        tensors: Tensors,
        layout: Layout,
        prefix: str,
        model: config.Model,
        params_like: Parameters,
    ) -> None:
        self.model, self.layout = model, layout
        flat = traverse_util.flatten_dict(params_like, sep="/")
        self.wanted: dict[str, Shape] = {path: tuple(leaf.shape) for path, leaf in flat.items()}
        self.names: dict[str, str] = {}
        self.notes: list[str] = []
        self.reasons: list[str] = []
        self._file, self._tensors = file, tensors
        self._ours: dict[str, Line] = {}
        self._skipped: list[Line] = []
        self._plan: list[Callable[[], None]] = []
        self._taken: set[str] = set()  # parameters that a rule fills
        self._flat: dict[str, np.ndarray] = {}
        for name in tensors.shapes:
            plain = layout.plain(name.removeprefix(prefix))
            if not name.startswith(prefix):
                self._skipped.append(Line(SKIPPED, name, tensors.shapes[name], detail=layouts.OUTSIDE))
            elif plain in self.names:
                self.reasons.append(f"twice: {name} and {self.names[plain]}")
            else:
                self.names[plain] = name

    # What the parts of an encoder are fitted with.

    def shape(self, plain: str) -> Shape:
        return tuple(self._tensors.shapes[self.names[plain]])

    def take(self, plain: str, shape: Shape | None = None) -> str:
        """The name in the file of a tensor that is there and from now on taken; of another shape it is a reason."""
        name = self.names.pop(plain)
        if shape is not None and (found := tuple(self._tensors.shapes[name])) != shape:
            self.reasons.append(f"misshapen: {name} {found}, wanted {shape}")
        return name

    def skip(self, plain: str, reason: str) -> None:
        name = self.names.pop(plain)
        self._skipped.append(Line(SKIPPED, name, tuple(self._tensors.shapes[name]), detail=reason))

    def initialise(self, path: str, reason: str) -> None:
        self._ours[path] = Line(INITIALISED, f"image_encoder/{path}", self.wanted[path], detail=reason)

    def later(self, reading: Callable[[], None]) -> None:
        """To be called once the whole file is known to fit."""
        self._plan.append(reading)

    def read(self, name: str) -> np.ndarray:
        return self._tensors.read(name)

    def put(self, path: str, array: np.ndarray, names: Sequence[str], detail: str = "", part: str = "") -> None:
        shown = names[0] if len(names) < 3 else f"{names[0]} .. {names[-1]}"
        shown = (" and ".join(names) if len(names) == 2 else shown) + part
        self._ours[path] = Line(LOADED, f"image_encoder/{path}", array.shape, tuple(names), shown, detail)
        self._flat[path] = np.asarray(array, np.float32, order="C")

    def check(self, summary: str) -> None:
        """Raises ConversionError with all reasons that there are by now."""
        if self.reasons:
            raise ConversionError(f"{self._file} ({self.layout.name}) {summary}:", self.reasons)

    # What has no place.

    def sort_out(self) -> None:
        """Skips what our encoder has no place for; what makes it another function is a reason."""
        for plain in list(self.names):
            refused = [reason for pattern, reason in self.layout.refused if re.match(pattern, plain)]
            skipped = [reason for pattern, reason in self.layout.skipped if re.match(pattern, plain)]
            if refused:
                self.reasons.append(f"refused: {self.names.pop(plain)}: {refused[0]}")
            elif skipped:
                self.skip(plain, skipped[0])

    def refuse_rest(self) -> None:
        self.reasons += [f"unknown: {name} {tuple(self._tensors.shapes[name])}" for name in self.names.values()]

    # The blocks, and the norm before them.

    def sizes(self) -> dict[str, int]:
        """Those of config.model.image that the shapes tell: depth, width, mlp_dim, and where they can heads."""
        found = {"depth": 0}
        for rule in self.layout.rules:
            if not rule.paths[0].endswith("/kernel"):
                continue
            pattern = re.compile(re.escape(rule.name).replace(r"\{i\}", r"(\d+)"))
            matches = [match for plain in self.names if (match := pattern.fullmatch(plain))]
            if not matches:
                continue
            shape, axes = self.shape(matches[0][0]), layouts.split(rule.axes)[1]
            if "{i}" in rule.name:
                found["depth"] = max(found["depth"], *(int(match[1]) + 1 for match in matches))
            elif shape:
                found["depth"], shape = shape[0], shape[1:]
            if len(shape) == len(axes):
                found |= {_KEYS[axis]: size for axis, size in zip(axes, shape, strict=True) if axis in _KEYS}
        return found

    def blocks(self) -> None:
        """Fits all that the layout has a rule for. The depth is already known to be the configuration's."""
        for rule in self.layout.rules:
            self._rule(rule)
        self._no_pre_norm()
        for name, path in self.layout.layer_scale:
            self._layer_scale(name, path)

    def _rule(self, rule: Rule) -> None:
        names = self._of_layers(rule.name)
        here = [name for name in names if name in self.names]
        if rule.paths[0] not in self.wanted:  # pre_norm, the one module of the rules that a model may lack
            for name in here:
                self.skip(name, "config.model.image.pre_norm=False")
            if here and rule.paths[0].endswith("/scale"):
                self.notes.append("config.model.image.pre_norm=False and the file has that norm: another function")
            return
        if not here and rule.optional:
            for path in rule.paths:
                self.initialise(path, "no such bias: zero, as drawn")
            return
        if not here and rule.paths[0].startswith("pre_norm/"):
            return  # see _no_pre_norm
        stacked = rule.paths[0].startswith("blocks/")
        shapes = [self.wanted[path][1:] if stacked else self.wanted[path] for path in rule.paths]
        shape = layouts.their_shape(rule.axes, shapes)
        if stacked and "{i}" not in rule.name:
            shape = (self.model.image.depth, *shape)
        self.reasons += [f"missing: {name} {shape}" for name in names if name not in here]
        taken = [self.take(name, shape) for name in here]
        self._taken |= set(rule.paths)
        self.later(lambda: self._read_rule(rule, taken, shapes, stacked))

    def _no_pre_norm(self) -> None:
        """A model that has a norm before its blocks, and a file that has none, or a layout that never has."""
        if "pre_norm/scale" in self.wanted and "pre_norm/scale" not in self._taken:
            self.notes.append("config.model.image.pre_norm=True and the file has no such norm: another function")
            for path in ("pre_norm/scale", "pre_norm/bias"):
                self.initialise(path, "the file has no norm before its blocks: config.model.image.pre_norm=True")

    def _read_rule(self, rule: Rule, names: list[str], shapes: list[Shape], stacked: bool) -> None:
        whole = [np.empty(self.wanted[path], np.float32) for path in rule.paths]
        if not stacked:
            whole = layouts.to_ours(rule.axes, self.read(names[0]), shapes)
        else:
            # A scanned stack is one tensor with the layers in front, which indexing takes apart.
            layers = self.read(names[0]) if "{i}" not in rule.name else (self.read(name) for name in names)
            for i, layer in enumerate(layers):
                for array, part in zip(whole, layouts.to_ours(rule.axes, layer, shapes), strict=True):
                    array[i] = part
        parts = len(rule.paths)
        for n, (path, array) in enumerate(zip(rule.paths, whole, strict=True)):
            self.put(path, array, names, part=f" (part {n + 1} of {parts})" if parts > 1 else "")

    def _layer_scale(self, name: str, path: str) -> None:
        names, shape = self._of_layers(name), (self.model.image.width,)
        here = [one for one in names if one in self.names]
        if not here:
            return
        self.reasons += [f"missing: {one} {shape}" for one in names if one not in here]
        taken = [self.take(one, shape) for one in here]

        def multiply() -> None:
            factors = np.stack([self.read(one) for one in taken])  # [l, d]
            for leaf in (f"{path}/kernel", f"{path}/bias"):
                if leaf not in self._flat:
                    continue  # a bias of zero stays zero
                array, line = self._flat[leaf], self._ours[leaf]
                array *= factors.reshape(len(factors), *[1] * (array.ndim - 2), -1)
                self._ours[leaf] = dataclasses.replace(
                    line, tensors=(*line.tensors, *taken), detail=f"times the layer scale {taken[0]} .. {taken[-1]}"
                )

        self.later(multiply)

    def _of_layers(self, name: str) -> list[str]:
        return [name.format(i=i) for i in range(self.model.image.depth)] if "{i}" in name else [name]

    # The end.

    def load(self) -> Parameters:
        """Reads what was taken; a nested dict."""
        for reading in tqdm(self._plan, desc="reading the image encoder", unit="tensor", disable=None, leave=False):
            reading()
        parameters: Parameters = traverse_util.unflatten_dict(self._flat, sep="/")
        return parameters

    def report(self) -> Report:
        """What came of everything, once it is loaded."""
        ours = [self._ours[path] for path in self.wanted]
        ours.sort(key=lambda line: line.status == INITIALISED)
        return Report(str(self._file), self.layout.name, (*ours, *self._skipped), tuple(self.notes))
