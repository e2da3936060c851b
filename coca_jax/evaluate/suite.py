"""All measures of one model: what a run evaluates, and the material of the report's gallery."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from absl import logging
from etils import epath
from tqdm import tqdm

from coca_jax.config import Config
from coca_jax.data.records import DataError
from coca_jax.data.sources import Source
from coca_jax.data.tokenizer import Tokenizer
from coca_jax.evaluate import asked, pixels
from coca_jax.evaluate.evaluators import EVALUATORS, GALLERY, SHOWN, flat
from coca_jax.evaluate.pieces import Pieces
from coca_jax.evaluate.results import Answer, Caption, ClassScore, Functions, Processes, Query, Results
from coca_jax.evaluate.splits import Batches, Split, Table, TextKeys, one_pass, spread, without
from coca_jax.evaluate.splits import names_of as split_names

__all__ = [
    "GALLERY",
    "SHOWN",
    "Answer",
    "Caption",
    "ClassScore",
    "Functions",
    "Processes",
    "Query",
    "Results",
    "run",
    "split_names",
    "spread",
]


def run(
    functions: Functions,
    sources: Mapping[str, Source],
    tokenizer: Tokenizer,
    config: Config,
    batches: Batches,
    *,
    reference: Source | None = None,
    reference_style: str = "",
    cache: epath.PathLike | None = None,
    pieces: Pieces | None = None,
    processes: Processes = Processes(),  # noqa: B008  (frozen)
    progress: bool = True,
) -> Results:
    """Evaluates every split of `config.evaluate` with all of EVALUATORS; a progress bar runs along.

    Metrics, per split: `seen/images`, `seen/texts` (how many are ranked), `seen/same_texts` (captions that the
    model reads as another, and which are no candidates of their own), `seen/image_to_text/r1` (r5, r10,
    median_rank), `seen/text_to_image/...`, `seen/chance/...`, `seen/pixel/image_to_text/...` and so on,
    `seen/caption_loss` (nats a token, against the caption in the batch), `seen/perplexity`; of the first split
    `seen/caption_exact_match`, the share of the generated captions that is right word for word; with
    `config.evaluate.score_captions` of all pictures `seen/captions/cider` and the rest of `caption_scores.scores`; and
    `zero_shot/top1` with the rest of `zero_shot.accuracy`. With a task's classes, of the labelled records
    `seen/classification/top1` and the rest of `classification.accuracy`. With `config.evaluate.likelihood`, of so many
    pictures, `seen/likelihood/log_prob` (nats a caption) and `likelihood.recall`, `zero_shot/likelihood/top1`,
    `zero_shot/likelihood_pmi/top1` and for comparison `zero_shot/likelihood_contrastive/top1`.

    With several processes, each calls this with the same arguments and reads its share: the texts of every n-th record,
    and those rows of the pictures' batches that `batches` gives it.

    Args:
      functions: the model.
      sources: each of `config.evaluate.splits` and `config.evaluate.zero_shot`, by that string.
      tokenizer: of the model.
      config: the run's.
      batches: a source, and how many of its batches are left out -> its batches from there on, every record once, all
        of one shape; `images` and `tokens` are for `functions` alone, `index` and `valid` are numpy arrays of the whole
        batch on every process, `bad` of what was read in this one.
      reference: the training source that the pixel baseline looks names up in; None leaves the baseline out, as do
        sources of more than `pixels.LIMIT` records.
      reference_style: the style of the pictures it uses; empty: all.
      cache: JSON file in which the pixel baseline is kept between evaluations; None computes it each time.
      pieces: where the model's results are kept while there is one source, to go on from; None: nowhere.
      processes: with whom the work is shared; alone unless told.
      progress: whether to show the bar.

    Raises:
      ValueError: a source that is missing, empty, unlabelled (zero-shot), or not covered by its batches.
      DataError: one of which no record can be used.
    """
    evaluate = config.evaluate
    names = split_names(evaluate.splits)
    specs = {
        spec: [evaluator for evaluator in EVALUATORS if evaluator.wanted(functions, config, spec)]
        for spec in dict.fromkeys([*names, *([evaluate.zero_shot] if evaluate.zero_shot else [])])
    }
    specs = {spec: wanted for spec, wanted in specs.items() if wanted or spec in names}
    for spec in specs:
        if spec not in sources or not len(sources[spec]):
            raise ValueError(f"config.evaluate names {spec!r}, which is {'empty' if spec in sources else 'not loaded'}")
    keys = TextKeys(tokenizer, config.model.text.length)
    tables = {spec: Table.read(sources[spec], processes, keys) for spec in specs}
    encodes = functions.encode_image is not None and functions.encode_text is not None
    bar = tqdm(
        total=sum(len(t.captions) + (len(t.texts) if encodes else 0) for t in tables.values()),
        desc="evaluate",
        unit=" examples",
        disable=not progress or processes.index > 0,
        leave=None,  # inside the training's bar it goes away when it is done
        dynamic_ncols=True,
    )
    results = Results({})
    with bar:
        for spec, wanted in specs.items():
            source, name = sources[spec], names.get(spec, "zero_shot")
            bar.set_description(name)
            keeper = pieces or Pieces(None)
            passes = dict.fromkeys(need for evaluator in wanted for need in evaluator.needs)
            rows, bad = one_pass(functions, source, name, batches, passes, pieces=keeper, processes=processes, bar=bar)
            rows, table = without(rows, tables[spec], bad)
            if bad:  # neither right nor wrong: they are left out of every figure, and counted
                results += Results({f"{name}/bad": float(len(bad))})
            if not table.rows:
                raise DataError(asked.none_usable(f"config.evaluate names {spec!r}", source))
            split = Split(
                *(source, name, table, rows, functions, tokenizer, config, processes, keeper, bar),
                first=list(names)[:1] == [spec],
            )
            for evaluator in wanted:
                results += evaluator.measure(split)
        if reference is not None and encodes:
            held_out = {name: sources[spec] for spec, name in names.items() if len(sources[spec]) <= pixels.LIMIT}
            if len(reference) > pixels.LIMIT or len(held_out) < len(names):
                text = "the pixel baseline is left out where a source has more than %d records"
                logging.log_first_n(logging.INFO, text, 1, pixels.LIMIT)
            held_out = held_out if len(reference) <= pixels.LIMIT else {}
            pixel: dict[str, Any] = {}
            if processes.index == 0:
                background = config.data.background
                pixel = pixels.baselines(
                    held_out, reference, reference_style, keys=keys, background=background, cache=cache, bar=bar
                )
            for name, measures in processes.gather(pixel)[0].items():
                results += Results(flat(measures, f"{name}/pixel"))
    return results
