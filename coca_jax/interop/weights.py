"""What travels: a model's weights with all that is needed to use them, whatever they are read from or written to."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from coca_jax import config
from coca_jax.data.tokenizer import Tokenizer

Parameters = dict[str, Any]


class ConversionError(ValueError):
    """What cannot be converted. The message lists every reason, one a line."""

    def __init__(self, summary: str, reasons: Iterable[str] = ()) -> None:
        super().__init__("\n  ".join([summary, *reasons]))


@dataclasses.dataclass(frozen=True)
class Weights:
    """A model as every reader gives it and every writer takes it.

    Attributes:
      config: `model`; of `data` what the model wants of pictures (mean, std, background, eval_crop, interpolation); of
        `loss` the weights, which tell what halves there are. All else is as it comes.
      params: nested dict of arrays; `CoCa(config.model).apply({"params": params}, ...)` takes them.
      tokenizer: that the model was trained with; None where it did not come with the weights.
      step: of training that they are from; 0: not known.
      labels: the classes of model.head by number; none without it.
    """

    config: config.Config
    params: Parameters
    tokenizer: Tokenizer | None
    step: int = 0
    labels: tuple[str, ...] = ()

    @property
    def has_contrastive(self) -> bool:
        return self.config.loss.lambda_con > 0

    @property
    def has_captioning(self) -> bool:
        return self.config.loss.lambda_cap > 0

    def only_coca(self, where: str) -> None:
        """Raises ConversionError where the model has a classifier or a bridge, for which `where` has no place."""
        if self.config.model.bridge.stage:
            raise ConversionError(
                f"this model has a bridge, for which {where} has no place: keep the workdir, which coca_jax.load opens"
            )
        if self.config.loss.lambda_cls > 0:
            raise ConversionError(
                f"this model has a classifier of {len(self.labels)} classes, for which {where} has no place: keep the "
                "workdir, which coca_jax.load opens with it"
            )
