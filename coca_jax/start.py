"""What a run begins from: `config.init`, read before anything is trained, and never when a run goes on."""

from __future__ import annotations

import dataclasses
import json
import zlib
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh

from coca_jax import config, distributed, stored
from coca_jax.config import ConfigError
from coca_jax.data import side_files
from coca_jax.data.records import DataError
from coca_jax.data.tokenizer import Tokenizer
from coca_jax.interop import matching, vision
from coca_jax.interop.weights import ConversionError, Weights
from coca_jax.train import checkpoint
from coca_jax.train import state as states

REPORT_FILE = "init.json"


@dataclasses.dataclass(frozen=True)
class Start:
    """What a run begins from.

    Attributes:
      config: the run's; with init.model=checkpoint, the checkpoint's model and what it wants of pictures.
      params: some of the model's parameters, a nested dict of arrays; None: all are drawn from the seed, or the run
        goes on.
      report: what came of each of them, and of what else was read.
      tokenizer: the checkpoint's; None without one.
    """

    config: config.Config
    params: states.Parameters | None = None
    report: vision.Report | None = None
    tokenizer: Tokenizer | None = None

    def tell(self, workdir: epath.Path) -> None:
        """Prints the report in brief and writes all of it into the workdir, from the first process."""
        if self.report and distributed.is_first():
            print(self.report.brief())
            text = json.dumps(self.report.to_json(), indent=1) + "\n"
            try:
                side_files.write_text(workdir / REPORT_FILE, text)
            except OSError as error:  # it is printed, and the run needs it no more
                logging.warning("%s cannot be written: %s", workdir / REPORT_FILE, error)


def read(
    c: config.Config, workdir: epath.Path, mesh: Mesh, labels: tuple[str, ...] = (), *, parameters: bool = True
) -> Start:
    """Reads what `c.init` names. Where the workdir holds a checkpoint already, no more than the workdir is read.

    Each process reads, and all must find the same.

    Args:
      c: the configuration as it was given.
      workdir: of the run.
      mesh: the run's; a workdir's parameters come placed on it.
      labels: the classes of the run's model.head, by number.
      parameters: whether there will be training: only then there may be something to read them for.

    Raises:
      ConfigError: what is named cannot be used, with every reason.
      DistributedError: the processes have different files.
    """
    with checkpoint.Checkpoints(workdir) as found:
        going_on = distributed.gather(found.latest() is not None)[0]
    if c.init.checkpoint:
        if going_on or not parameters:
            return _going_on(c, workdir)
        return _from_checkpoint(c, mesh, labels)
    if not c.init.image_encoder or going_on or not parameters:
        return Start(c)
    abstract = states.abstract_parameters(c)["image_encoder"]
    with _Said("image_encoder", c.init.image_encoder) as said:
        encoder, report = vision.load_encoder(c.init.image_encoder, c.model, abstract, c.data)
    said.together()
    _check_same("image_encoder", c.init.image_encoder, encoder)
    return Start(c, {"image_encoder": encoder}, report)


def _going_on(c: config.Config, workdir: epath.Path) -> Start:
    """A run that goes on needs nothing but its workdir, whatever has become of the checkpoint that it began from."""
    path = workdir / checkpoint.TOKENIZER_FILE
    tokenizer = Tokenizer(path) if path.exists() else None
    if c.init.model == "checkpoint":
        before = checkpoint.read_config(workdir)
        c = matching.adopt(c, before.model, before.data)
    return Start(c, tokenizer=tokenizer)


def _from_checkpoint(c: config.Config, mesh: Mesh, labels: tuple[str, ...]) -> Start:
    path = c.init.checkpoint
    with _Said("checkpoint", path) as said:
        weights = stored.read_weights(path, step=c.init.step or None, mesh=mesh)
    said.together()
    with _Said("checkpoint", path) as said:
        if c.init.model == "checkpoint":
            c = matching.adopt(c, weights.config.model, weights.config.data)
        config.check(c)
        params, report = matching.match(weights, c, states.abstract_parameters(c), labels, file=path)
        tokenizer = _tokenizer(c, weights) if "text_decoder" in params else weights.tokenizer
    said.together()
    _check_same("checkpoint", path, params)
    return Start(c, params, report, tokenizer)


def _tokenizer(c: config.Config, weights: Weights) -> Tokenizer | None:
    """The checkpoint's, which the configuration's must be, if it names one."""
    mine, theirs = c.data.tokenizer, weights.tokenizer
    if mine and theirs and Tokenizer(mine).to_bytes() != theirs.to_bytes():
        raise ConversionError(
            f"config.data.tokenizer={mine!r} is another vocabulary than the checkpoint's text decoder knows: leave it "
            "empty, or leave the decoder out with config.init.skip=('text_decoder/.*',)"
        )
    return theirs


class _Said:
    """Keeps what is wrong in one process until all of them know of it."""

    def __init__(self, key: str, value: str) -> None:
        self._key, self._value, self._problem = key, value, ""

    def __enter__(self) -> _Said:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> bool:
        if isinstance(error, ConversionError | checkpoint.CheckpointError | DataError | ConfigError):
            self._problem = str(error)
            return True
        return False

    def together(self) -> None:
        """Raises ConfigError in all processes where there was a problem in one."""
        for index, one in enumerate(distributed.gather(self._problem)):
            if one:
                who = f" in process {index}" if jax.process_count() > 1 else ""
                raise ConfigError(f"config.init.{self._key}={self._value!r}{who}: {one}")


def _check_same(key: str, value: str, params: states.Parameters) -> None:
    """Of what each process has read for itself; a workdir's parameters lie on the mesh, and no process has them all."""
    if jax.process_count() > 1:
        leaves = [leaf for leaf in jax.tree.leaves(params) if not isinstance(leaf, jax.Array)]
        distributed.check_same({f"the checksum of config.init.{key}={value!r}": _sum(leaves)})


def _sum(leaves: list[np.ndarray]) -> int:
    total = 0
    for leaf in leaves:
        total = zlib.crc32(np.ascontiguousarray(leaf).data, total)
    return total
