"""Weights that a run begins from: `config.init`, read before anything is trained, and never when a run goes on."""

from __future__ import annotations

import dataclasses
import json
import zlib

import jax
import numpy as np
from etils import epath

from coca_jax import config, distributed
from coca_jax.config import ConfigError
from coca_jax.interop import vision
from coca_jax.interop.weights import ConversionError
from coca_jax.train import checkpoint
from coca_jax.train import state as states

REPORT_FILE = "init.json"


@dataclasses.dataclass(frozen=True)
class Start:
    """What a run begins from.

    Attributes:
      params: some of the model's parameters, a nested dict of numpy arrays.
      report: what came of each of them, and of each tensor of the file.
    """

    params: states.Parameters
    report: vision.Report

    def tell(self, workdir: epath.Path) -> None:
        """Prints the report in brief and writes all of it into the workdir, from the first process."""
        if distributed.is_first():
            print(self.report.brief())
            (workdir / REPORT_FILE).write_text(json.dumps(self.report.to_json(), indent=1) + "\n")


def read(c: config.Config, workdir: epath.Path) -> Start | None:
    """Reads what `c.init` names; None where it names nothing, or where the workdir holds a checkpoint.

    Each process reads the whole file, and all must find the same in it.

    Raises:
      ConfigError: the file cannot be used, with every reason.
      DistributedError: the processes have different files.
    """
    if not c.init.image_encoder:
        return None
    with checkpoint.Checkpoints(workdir) as found:
        if distributed.gather(found.latest() is not None)[0]:
            return None
    encoder, report, problem = None, None, ""
    try:
        abstract = states.abstract_parameters(c)["image_encoder"]
        encoder, report = vision.load_encoder(c.init.image_encoder, c.model, abstract, c.data)
    except ConversionError as error:
        problem = str(error)
    for index, one in enumerate(distributed.gather(problem)):
        if one:
            who = f" in process {index}" if jax.process_count() > 1 else ""
            raise ConfigError(f"config.init.image_encoder={c.init.image_encoder!r}{who}: {one}")
    assert encoder is not None and report is not None
    if jax.process_count() > 1:
        distributed.check_same({f"the checksum of config.init.image_encoder={c.init.image_encoder!r}": _sum(encoder)})
    return Start({"image_encoder": encoder}, report)


def _sum(params: states.Parameters) -> int:
    total = 0
    for leaf in jax.tree.leaves(params):
        total = zlib.crc32(np.ascontiguousarray(leaf).data, total)
    return total
