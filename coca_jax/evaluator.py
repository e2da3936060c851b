"""A model, its data and its tokenizer bound together, so that evaluation is a call with parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from coca_jax import config, distributed, sharding
from coca_jax.apply import Apply
from coca_jax.data import pipeline, sources
from coca_jax.data.classes import Task
from coca_jax.data.tokenizer import Tokenizer
from coca_jax.evaluate import suite
from coca_jax.evaluate.pieces import Pieces
from coca_jax.train import checkpoint
from coca_jax.train import state as states
from coca_jax.train.state import TrainState


class Evaluator:
    """The evaluation that the loop calls; keeps what it found last, for the report, and before the first step.

    With several processes, all of them make one and call it alike.
    """

    def __init__(
        self,
        c: config.Config,
        workdir: epath.Path,
        mesh: Mesh,
        reference: sources.Source | None,
        held_out: Mapping[str, sources.Source],
        tokenizer: Tokenizer,
        pieces: Pieces | None = None,
        labels: tuple[str, ...] = (),
    ) -> None:
        """
        Args:
          c: model, data, `evaluate`.
          workdir: where the pixel baseline is kept.
          mesh: of sharding.MESH_AXES.
          reference: the training source that the pixel baseline looks names up in; None: there is no baseline.
          held_out: the sources that `c.evaluate` names, by that name.
          tokenizer: of the model.
          pieces: see `suite.run`.
          labels: the classes that model.head tells apart, by number.
        """
        self.results: suite.Results | None = None
        self.first: dict[str, float] | None = None
        self._task = Task.of(c, labels)
        self._c, self._workdir, self._mesh = c, workdir, mesh
        self._reference, self._held_out, self._tokenizer = reference, held_out, tokenizer
        self._pieces = pieces
        self._poll: Callable[[], None] | None = None
        self._apply = Apply(c, mesh, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)

    def __call__(self, state: TrainState, poll: Callable[[], None]) -> dict[str, float]:
        """As `of`, calling `poll` at every batch, which may raise to leave the evaluation."""
        self._poll = poll
        try:
            metrics = self.of(state).metrics
        finally:
            self._poll = None
        if not int(state.step):
            self.first = metrics
        return metrics

    def of(self, state: TrainState) -> suite.Results:
        """Evaluates the moving average of the parameters where there is one."""
        return self.of_parameters(state.params if state.ema is None else state.ema)

    def from_checkpoint(self) -> suite.Results:
        """Evaluates the newest checkpoint of the workdir. Raises CheckpointError where there is none."""
        abstract = states.placed_parameters(self._c, self._mesh)
        with checkpoint.Checkpoints(self._workdir) as checkpoints:
            return self.of_parameters(checkpoints.restore_parameters(abstract)[0])

    def of_parameters(self, params: states.Parameters) -> suite.Results:
        """Evaluates parameters, on the mesh."""
        c, apply = self._c, self._apply

        def bind(function: Any, present: bool) -> Any:
            return (lambda *arrays: function(params, *arrays)) if present else None

        functions = suite.Functions(
            encode_image=bind(apply.encode_image, apply.has_contrastive),
            encode_text=bind(apply.encode_text, apply.has_contrastive),
            caption_loss=bind(apply.caption_loss, apply.has_caption_loss),
            generate=bind(apply.caption, apply.has_captioning),
            log_probs=bind(apply.log_probs, apply.has_captioning),
            classify=bind(apply.classify, apply.has_classes),
            classes=self._task.labels,
            compare=apply.compare,
        )

        place = sharding.batch_sharding(self._mesh)
        shards = self._mesh.shape["replica"] * self._mesh.shape["fsdp"]
        batch_size = -(-c.evaluate.batch_size // shards) * shards

        def batches(source: sources.Source, start: int) -> Any:
            loader = pipeline.eval_batches(
                source,
                self._tokenizer,
                c.data,
                image_size=c.model.image.size,
                length=c.model.text.length,
                batch_size=batch_size,
                rows=pipeline.process_rows(place, batch_size),
                start=start,
                task=self._task,
            )
            return self._polled(pipeline.place(loader, place, batch_size, c.data.prefetch))

        self.results = suite.run(
            functions,
            self._held_out,
            self._tokenizer,
            c,
            batches,
            reference=self._reference,
            reference_style=c.evaluate.reference_style,
            cache=self._workdir / "pixel_baseline.json",
            pieces=self._pieces,
            processes=processes(),
        )
        return self.results

    def _polled(self, batches: Iterable[Any]) -> Iterator[Any]:
        iterator = iter(batches)
        try:
            for batch in iterator:
                if self._poll:
                    self._poll()
                yield batch
        finally:
            iterator.close()  # type: ignore[attr-defined]  # its threads read ahead


def processes() -> suite.Processes:
    """This job's."""
    return suite.Processes(jax.process_index(), jax.process_count(), distributed.gather)
