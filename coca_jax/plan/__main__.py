"""Compile the training step for TPU chips without having them; report memory, estimated speed and cost.

    python -m coca_jax.plan --config=configs/coca_giant.py --topology=v4:8x16x16
    python -m coca_jax.plan --config=configs/coca_large.py --topology=v5e:16x16 --search --json=plans.json

Needs libtpu (pip install "coca_jax[plan]") but no TPU. Configuration keys can be set as for training:
--config.batch_size=16384. Exit status: 0 if the plan fits (with --search: if any does), 3 if it is too large (with
--search: if all are), 4 if that is unknown because the compiler failed or --timeout stopped it, 1 for invalid input.
docs/planner.md explains the figures.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable

import tqdm
from absl import flags
from ml_collections import config_flags

from coca_jax import commandline, config
from coca_jax.plan import compiled, estimate, recipe, report
from coca_jax.plan import search as searching
from coca_jax.plan import topology as topologies
from coca_jax.plan.estimate import Plan

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file in configs/.", lock_config=True)
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Type and shape of one TPU slice, e.g. v4:8x16x16, v5e:16x16, v5p:8x8x8, v6e:16x16."
)
_SLICES = flags.DEFINE_integer("slices", 1, "Number of slices; mesh.dcn_replica or dcn_fsdp gives them an axis.")
_JSON = flags.DEFINE_string(
    "json", None, "Write the figures to this file as JSON; with --search a list, in the order tried."
)
_SEARCH = flags.DEFINE_bool(
    "search", False, "Try meshes, microbatches and remat policies; list those that fit, fastest first."
)
_TRIES = flags.DEFINE_integer("tries", 12, "Maximum number of compilations in --search.", lower_bound=1)
_TIMEOUT = flags.DEFINE_float("timeout", 1500, "Time limit of one compilation in seconds.", lower_bound=1)
_EFFICIENCY = flags.DEFINE_float(
    "efficiency", estimate.EFFICIENCY, "Assumed share of peak FLOP/s that matrix products reach, above 0 and at most 1."
)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"error: unknown argument {argv[1]!r}: write settings as --config.key=value")
    if not _CONFIG.value or not _TOPOLOGY.value:
        missing = "--topology=v5e:16x16 (or another slice)" if _CONFIG.value else "--config=configs/NAME.py"
        sys.exit(f"error: {missing} is needed")
    if not 0 < _EFFICIENCY.value <= 1:
        sys.exit(f"error: --efficiency={_EFFICIENCY.value:g} must be above 0 and at most 1")
    try:
        topology = topologies.parse_topology(_TOPOLOGY.value, _SLICES.value)
        c = recipe.resolve(config.from_config_dict(_CONFIG.value))
        config.check(c, topology.chips, slice_count=topology.slices, platform="tpu")
    except config.ConfigError as error:
        sys.exit(f"error: {error}")
    if _JSON.value:
        try:  # fail before minutes of compiling
            with open(_JSON.value, "a"):
                pass
        except OSError as error:
            sys.exit(f"error: --json={_JSON.value} cannot be written: {error.strerror}")
    if importlib.util.find_spec("libtpu") is None:
        sys.exit('error: compiling for TPUs needs libtpu: pip install "coca_jax[plan]"')
    name = os.path.basename(config_flags.get_config_filename(flags.FLAGS["config"]))
    plans = _search(c, topology) if _SEARCH.value else [_one(c, topology)]
    if _JSON.value:
        values = [p.to_json() for p in plans]
        with open(_JSON.value, "w") as file:
            json.dump(values if _SEARCH.value else values[0], file, indent=2)
            file.write("\n")
    print(f"{name} on {topology}\n{report.table(plans)}" if _SEARCH.value else report.page(plans[0], name))
    sys.exit(report.status(plans))


def _one(c: config.Config, topology: topologies.Topology) -> Plan:
    # The duration is unknown, so show the elapsed time and the limit.
    bar_format = f"compiling for {topology}: {{elapsed}}, timeout {_TIMEOUT.value:.0f} s"
    with tqdm.tqdm(bar_format=bar_format, leave=False, disable=None) as bar:
        return _plan(c, topology, bar.refresh)


def _search(c: config.Config, topology: topologies.Topology) -> list[Plan]:
    with tqdm.tqdm(total=_TRIES.value, desc=f"compiling for {topology}", unit="plan", disable=None) as bar:
        left = iter(range(_TRIES.value))

        def attempt(c: config.Config) -> Plan | None:
            if next(left, None) is None:
                return None
            plan = _plan(c, topology, bar.refresh)
            bar.write(report.table([plan]).splitlines()[-1])
            bar.update()
            return plan

        return searching.search(c, topology, attempt)


def _plan(c: config.Config, topology: topologies.Topology, tick: Callable[[], object]) -> Plan:
    measured = compiled.measure(c, topology, _TIMEOUT.value, tick)
    return Plan(c, topology, measured, _EFFICIENCY.value)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    commandline.run(main)
