"""Small sets of TensorFlow Datasets for tests, prepared by real builders."""

from __future__ import annotations

import io

import numpy as np
import PIL.Image

NAMES = ["red", "green", "blue"]


def picture(i: int) -> bytes:
    out = io.BytesIO()
    color = [40 * (i % 3 == c) + i for c in range(3)]
    PIL.Image.fromarray(np.full((6, 8, 3), color, np.uint8)).save(out, "PNG")
    return out.getvalue()


def build() -> None:
    """Prepares three small sets in the folder that the environment names; runs in a process of its own."""
    import os
    import sys

    import tensorflow_datasets as tfds

    folder = os.environ["TFDS_FOLDER"]

    class Small(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.2.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(self.features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(20), "test": self._generate_examples(3)}

        def _generate_examples(self, count):
            for i in range(count):
                yield i, self.example(i)

    class Captioned(Small):
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="a"), tfds.core.BuilderConfig(name="b")]  # noqa: RUF012
        features = {  # noqa: RUF012
            "file": tfds.features.Text(),
            "picture": tfds.features.Image(encoding_format="png"),
            "captions": tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()}),
            "title": tfds.features.Text(),
        }

        def example(self, i):
            texts = [{"id": j, "text": f"{self.builder_config.name} {i} ü{j}"} for j in range(i % 3)]
            return {"file": f"{i}.png", "picture": io.BytesIO(picture(i)), "captions": texts, "title": f"title {i}"}

    class Labelled(Small):
        features = {  # noqa: RUF012
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=NAMES),
            "count": tfds.features.Scalar(np.int64),
        }

        def example(self, i):
            return {"image": io.BytesIO(picture(i)), "label": NAMES[i % 3], "count": i}

    for config in ("a", "b"):
        Captioned(data_dir=folder, config=config).download_and_prepare(file_format="array_record")
    Labelled(data_dir=folder).download_and_prepare(file_format="array_record")
    loaded = [name for name in ("tensorflow", "torch") if name in sys.modules]
    assert not loaded, loaded


def build_emoji() -> None:
    """Prepares the unseen concepts of the built-in set, as another's set would be; runs in a process of its own."""
    import os
    import sys

    import tensorflow_datasets as tfds

    from coca_jax.data.sources import open_source

    source = open_source("emoji:concepts")
    records = [source[i] for i in range(len(source))]
    assert "" in {record.label for record in records}  # TFDS loses a class without a name

    class EmojiConcepts(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 4), encoding_format="png"),
                "caption": tfds.features.Text(),
                "label": tfds.features.ClassLabel(names=sorted({record.label or "none" for record in records})),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"test": self._generate_examples()}

        def _generate_examples(self):
            for record in records:
                image = io.BytesIO(record.image)
                yield record.key, {"image": image, "caption": record.captions[0], "label": record.label or "none"}

    EmojiConcepts(data_dir=os.environ["TFDS_FOLDER"]).download_and_prepare(file_format="array_record")
    loaded = [name for name in ("tensorflow", "torch") if name in sys.modules]
    assert not loaded, loaded
