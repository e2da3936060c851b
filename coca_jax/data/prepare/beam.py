"""Shards on Apache Beam: DirectRunner here, or Dataflow, Flink or Spark on many machines.

Beam only hands out the numbers of shards. Each is processed by shards.process, which writes its file and its note into
the folder of the result: that must be one that all machines see, a bucket for instance.
"""

from __future__ import annotations

import functools
import shlex

from coca_jax.data.prepare import files, shards
from coca_jax.data.prepare.plan import Plan
from coca_jax.data.records import DataError
from coca_jax.data.sources.base import one_line

RUNNERS = ("DirectRunner", "DataflowRunner", "FlinkRunner", "SparkRunner")
_ERRORS = "error-"  # start of the names of files, in the work folder, that say what went wrong with a shard


def run(plan: Plan, bad: str, runner: str, arguments: str) -> None:
    """Processes all shards.

    Args:
      plan: what to write.
      bad: see shards.process.
      runner: Beam's name of it.
      arguments: Beam's options, as in a shell: `--project=p --region=r --temp_location=gs://bucket/tmp`.

    Raises:
      DataError: Beam is not installed, its runner fails, or see shards.process; of several errors that of the first
        shard.
    """
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise DataError(f"--runner={runner} needs Apache Beam ({error}): pip install 'coca_jax[beam]'") from error
    for left in plan.work.glob(f"{_ERRORS}*"):
        left.unlink()
    try:
        options = PipelineOptions([f"--runner={runner}", *shlex.split(arguments)])
        with apache_beam.Pipeline(options=options) as pipeline:
            numbers = pipeline | "Shards" >> apache_beam.Create(range(plan.shards))
            spread = numbers | "Spread" >> apache_beam.Reshuffle()  # else one machine would do what one Create made
            _ = spread | "Process" >> apache_beam.Map(functools.partial(process, plan.to_json(), bad))
    except Exception as error:  # of any kind: a runner that is not reached, an option that is missing, a lost machine
        raise DataError(f"{runner} ended with {type(error).__name__}: {one_line(error)[:1000]}") from error
    for error_file in sorted(plan.work.glob(f"{_ERRORS}*")):
        raise DataError(error_file.read_text(encoding="utf-8"))


def process(plan_json: str, bad: str, shard: int) -> int:
    """One shard, on whatever machine. An error of the data goes into a file: Beam would try it again, and drown it."""
    plan = Plan.from_json(plan_json)
    try:
        shards.process(plan, shard, bad)
    except DataError as error:
        files.write(plan.work / f"{_ERRORS}{plan.stem(shard)}", str(error).encode(), plan.work)
    return shard
