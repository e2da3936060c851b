"""Random-access sources of records, opened by a specification `kind:location?option=value&option=value`.

A new kind is a module with a function `Spec -> Source` in `KINDS`, nothing more.
"""

from __future__ import annotations

from collections.abc import Callable

from absl import logging

from coca_jax.data.records import DataError, Record
from coca_jax.data.sources import prompts
from coca_jax.data.sources.array_record import ArrayRecords, open_array_record
from coca_jax.data.sources.base import Source, Spec
from coca_jax.data.sources.emoji_set import class_names as _emoji_class_names
from coca_jax.data.sources.emoji_set import open_emoji
from coca_jax.data.sources.folder import open_folder
from coca_jax.data.sources.karpathy import open_karpathy
from coca_jax.data.sources.parquet import open_parquet
from coca_jax.data.sources.tfds import open_tfds
from coca_jax.data.sources.webdataset import open_webdataset

__all__ = ["KINDS", "ArrayRecords", "DataError", "Record", "Source", "Spec", "_emoji_class_names", "open_source"]

KINDS: dict[str, Callable[[Spec], Source]] = {
    "emoji": open_emoji,
    "array_record": open_array_record,
    "webdataset": open_webdataset,
    "tfds": open_tfds,
    "parquet": open_parquet,
    "folder": open_folder,
    "karpathy": open_karpathy,
}

# Their records tell what they hold: where no option asks for it, labels do not become captions.
_AS_WRITTEN = ("emoji", "array_record")


def open_source(spec: str) -> Source:
    """Opens `kind:location?option=value&option=value`, e.g. `emoji:train` or `webdataset:gs://b/{00000..00999}.tar`.

    Files are named by a path on a disk or in a bucket, a comma list of them, braces {00000..00099} and {a,b}, and
    wildcards * ? [ ].

    Kinds, with their options:
      emoji: a split of the built-in set, which is prepared on first use.
      array_record: files of records that `coca_jax.data.records.write` wrote.
      webdataset: tar shards; `caption` (fields of the json instead of the txt), `label` (`cls`, or a field).
      tfds: `name/config:version` of a prepared TensorFlow Datasets set; `split` (needed), `data_dir`, `image`,
        `caption`, `label`.
      parquet: files with columns of picture bytes or of paths; `image`, `caption`, `label`, `root` (folder of paths).
      folder: images with a table of captions, texts beside them, or one folder for each class (docs/data.md has the
        layouts); `captions` (the table), `root` (folder of its images), `split`, `image`, `caption`, `label`;
        `question`: a caption of which each line is a record. In a .jsonl the image may be a list, the frames of a clip.
      karpathy: COCO and Flickr by Karpathy's splits, a dataset_coco.json; `split` (needed), `root` (folder of the
        pictures), `captions` (so many of each, the first).
      All with labels: `template` (text with a {} for the class, as often as needed), `templates` (a file of them, one a
        line), `classes` (a file of names by number, or JSON from the data's numbers or words to names). Record.captions
        then holds every template filled.

    Raises:
      DataError: an unknown kind or option, files that are missing or of another format, no records at all.
    """
    parsed = Spec.parse(spec)
    if not parsed.location or parsed.kind not in KINDS:
        raise DataError(
            f"source {spec!r}: write kind:location with kind one of {', '.join(KINDS)}, "
            "e.g. emoji:train (the built-in set) or array_record:/data/*.array_record"
        )
    source = KINDS[parsed.kind](parsed)
    if parsed.kind not in _AS_WRITTEN or any(name in parsed.options for name in prompts.OPTIONS):
        source = prompts.Prompted(source, prompts.read_templates(parsed), prompts.read_classes(parsed))
    if parsed.kind != "folder":  # those of a folder also tell how it was understood: a run and `describe` print them
        for remark in getattr(source, "remarks", ()):
            logging.warning("%s: %s", spec, remark)
    if not len(source):
        raise DataError(f"{spec}: holds no records")
    return source
