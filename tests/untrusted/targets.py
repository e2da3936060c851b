"""What reads untrusted files, as functions of their bytes. The project's errors are answers, all else is a fault."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from absl import flags
from etils import epath
from hypothesis import strategies as st

from coca_jax import config
from coca_jax.data import images, mixture, pipeline, records, tally
from coca_jax.data.images.decoding import Encoded
from coca_jax.data.prepare import checking, inputs
from coca_jax.data.records import BadExample, DataError, Record
from coca_jax.data.sources import open_source
from coca_jax.data.sources.base import Source
from coca_jax.data.tokenizer import Tokenizer
from tests.conftest import REPOSITORY
from tests.untrusted import damage, seeds

DATA = config.Data(flip=True, rotate=10.0, color_jitter=0.2, hue_jitter=0.1, grayscale=0.2, blur=0.3)
_MOST = 40  # records of a source that are read: a damaged file may claim billions
_LONGEST = 20_000  # characters of a message that a person is shown


@dataclasses.dataclass(frozen=True)
class Target:
    """A reader.

    Attributes:
      files: what to give it.
      read: takes a file's bytes and an empty folder of its own; returns whether it was read.
    """

    files: Callable[[], st.SearchStrategy[bytes]]
    read: Callable[[bytes, pathlib.Path], bool]


@contextlib.contextmanager
def answers(*errors: type[Exception]) -> Iterator[list[BaseException]]:
    """Lets the project's own errors pass, with what they say looked at."""
    found: list[BaseException] = []
    allowed: tuple[type[Exception], ...] = (DataError, config.ConfigError, *errors)
    try:
        yield found
    except allowed as error:
        said = str(error)
        assert said.strip() and len(said) < _LONGEST, (
            f"{type(error).__name__} of {len(said)} characters: {said[:200]!r}"
        )
        found.append(error)


# ---------------------------------------------------------------------------------------------------------------------
# Data


def read_image(data: bytes, folder: pathlib.Path) -> bool:
    """Whatever it is decoded for, it is a picture for all or for none, and for the same reason."""
    reasons = []
    for function in (
        lambda: images.decode(data),
        lambda: images.decode(data, min_side=8),
        lambda: Encoded(data).pixels(factor=4),
        lambda: images.decode_and_augment(data, 16, np.random.default_rng(0), DATA),
        lambda: checking.check(Record("key", data, ("a",)), max_side=12),
    ):
        with answers() as refused:
            function()
        reasons.append(refused[0].reason if refused and isinstance(refused[0], BadExample) else "")
    assert len(set(reasons)) == 1, reasons
    return not reasons[0]


def read_source(spec: str, folder: pathlib.Path) -> bool:
    """Opened, then every record as training, evaluation and conversion take it, and the bad ones listed."""
    with answers() as refused:
        read_records(open_source(spec), folder)
    return not refused


def read_records(source: Source, folder: pathlib.Path) -> None:
    mixed = mixture.Mixture([source], [1.0])
    listed = tally.List(mixed, epath.Path(folder))
    read = pipeline._Read(source, seeds.tokenizer(), DATA, 16, 8)
    assert source.fingerprint() and len(source) > 0
    for index in {*range(min(len(source), _MOST)), len(source) - 1}:
        with answers():
            try:
                checking.check(source[index])
            except BadExample as error:
                assert not any(0xD800 <= ord(c) <= 0xDFFF for c in checking.in_words(error))
        with answers():
            example = read.train(index, np.random.default_rng(0))
            listed.add(np.array([index]), np.array([example["problem"]]))
        with answers():
            problem = read.evaluate(index)["problem"]
            listed.add(np.array([index]), np.array([problem]))


def read_tar(data: bytes, folder: pathlib.Path) -> bool:
    (folder / "shard.tar").write_bytes(data)
    done = [read_source(f"webdataset:{folder}/shard.tar{options}", folder) for options in ("", "?caption=caption,alt")]
    assert set(os.listdir(folder)) <= {"shard.tar", "shard.tar.coca_jax_index", tally.BAD_EXAMPLES_FILE}
    return all(done)


def read_tar_index(data: bytes, folder: pathlib.Path) -> bool:
    """An index that came with the shard."""
    shard = folder / "shard.tar"
    shard.write_bytes(seeds.tar_files()[0])
    os.utime(shard, ns=(0, 10**9))
    (folder / "shard.tar.coca_jax_index").write_bytes(data)
    return read_source(f"webdataset:{shard}", folder)


@functools.cache
def _tar_index() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        shard = pathlib.Path(folder) / "shard.tar"
        shard.write_bytes(seeds.tar_files()[0])
        os.utime(shard, ns=(0, 10**9))
        open_source(f"webdataset:{shard}")
        return (pathlib.Path(folder) / "shard.tar.coca_jax_index").read_bytes()


def read_array_record(data: bytes, folder: pathlib.Path) -> bool:
    (folder / "a.array_record").write_bytes(data)
    return read_source(f"array_record:{folder}/a.array_record", folder)


def read_record(data: bytes, folder: pathlib.Path) -> bool:
    """One sound file with this record in it."""
    records.write(folder / "a.array_record", [data])
    return read_source(f"array_record:{folder}/a.array_record", folder)


def _packed_records() -> st.SearchStrategy[bytes]:
    import msgpack

    def pack(values: Any) -> bytes:
        try:
            packed: bytes = msgpack.packb(values, unicode_errors="surrogatepass")
        except (OverflowError, ValueError):
            packed = b"\xc1"
        return packed

    changed = damage.changed_values(seeds.packed_values(), others=st.binary(max_size=9)).map(pack)
    return st.one_of(changed, changed, changed, damage.damaged([pack(values) for values in seeds.packed_values()]))


def read_parquet(data: bytes, folder: pathlib.Path) -> bool:
    (folder / "a.parquet").write_bytes(data)
    return read_source(f"parquet:{folder}/a.parquet", folder)


def read_tfrecord(data: bytes, folder: pathlib.Path) -> bool:
    (folder / "a.tfrecord").write_bytes(data)
    with answers() as refused:
        inputs.open_inputs.cache_clear()
        read_records(inputs.open_inputs(f"tfrecord:{folder}/a.tfrecord?label=label"), folder)
    return not refused


def read_captions(data: bytes, folder: pathlib.Path) -> bool:
    for name in ("0.png", "1.png"):
        (folder / name).write_bytes(seeds.picture())
    done = []
    for ending in ("jsonl", "csv", "tsv"):
        (folder / f"captions.{ending}").write_bytes(data)
        done.append(read_source(f"folder:{folder}?captions=captions.{ending}", folder))
    return any(done)


def read_classes(data: bytes, folder: pathlib.Path) -> bool:
    (folder / "a.array_record").write_bytes(seeds.array_records()[0])
    for name in ("classes.json", "classes.txt"):
        (folder / name).write_bytes(data)
    location = f"array_record:{folder}/a.array_record"
    done = [read_source(f"{location}?classes={folder}/classes.{ending}", folder) for ending in ("json", "txt")]
    return read_source(f"{location}?templates={folder}/classes.txt", folder) or any(done)


# ---------------------------------------------------------------------------------------------------------------------
# Vocabularies


def read_tokenizer(data: bytes, folder: pathlib.Path) -> bool:
    with answers() as refused:
        tokenizer = Tokenizer(data)
        for text in ("a red dot", "", "  ünï \x00 \U0001f600" * 3, "<s> </s> ▁"):
            ids = tokenizer.encode(text, 16)
            assert ids.shape == (16,) and ids.min() >= 0 and ids.max() < max(tokenizer.vocab_size, 1 + tokenizer.eos_id)
            tokenizer.decode(ids)
        tokenizer.decode(range(min(tokenizer.vocab_size, 400)))
        tokenizer.encode_prompts(["a", "a red"])
        tokenizer.check(config.TextDecoder())
    return not refused


@functools.cache
def _tokenizer_json() -> list[Any]:
    from coca_jax.interop import tokenizer_json
    from tests.interop.tokenizer_json_test import trained

    unigram = json.loads(tokenizer_json.convert(trained())["tokenizer.json"])
    tokens = ["<pad>", "<s>", "</s>", "[UNK]", *"adeort", "re", "red", "do", "dot"]
    model = {"type": "BPE", "vocab": {t: n for n, t in enumerate(tokens)}, "merges": ["r e", "re d", "d o", "do t"]}
    special = [{"id": n, "content": t, "special": True, **_ADDED} for n, t in enumerate(tokens[:3])]
    bpe = unigram | {"model": model, "added_tokens": special, "normalizer": {"type": "Lowercase"}}
    return [bpe, unigram | {"model": unigram["model"] | {"vocab": unigram["model"]["vocab"][:40]}}]


_ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


# ---------------------------------------------------------------------------------------------------------------------
# Models and configurations


def _interop() -> tuple[type[Exception], ...]:
    """Errors that are only loaded where they are needed: they bring JAX."""
    from coca_jax.interop.weights import ConversionError
    from coca_jax.train.checkpoint import CheckpointError

    return ConversionError, CheckpointError


@functools.cache
def _exported() -> dict[str, bytes]:
    """The files of a directory of ours."""
    from coca_jax.interop import exported
    from tests.interop.exported_test import MODEL, weights

    with tempfile.TemporaryDirectory() as parent:
        folder = pathlib.Path(parent) / "new"
        exported.write(weights(MODEL, seeds.tokenizer()), folder)
        return {file.name: file.read_bytes() for file in folder.iterdir()}


def _read_exported(files: dict[str, bytes], folder: pathlib.Path) -> bool:
    from coca_jax.interop import exported

    for name, content in files.items():
        (folder / name).write_bytes(content)
    with answers(*_interop()) as refused:
        exported.read(folder)
    return not refused


def read_exported_json(data: bytes, folder: pathlib.Path) -> bool:
    return _read_exported(_exported() | {"coca_jax.json": data}, folder)


def read_exported_weights(data: bytes, folder: pathlib.Path) -> bool:
    import hashlib

    values = json.loads(_exported()["coca_jax.json"])
    values["weights"]["sha256"] = hashlib.sha256(data).hexdigest()  # whoever writes the weights writes this too
    described = json.dumps(values).encode()
    return _read_exported(_exported() | {"coca_jax.json": described, "model.safetensors": data}, folder)


@functools.cache
def _open_clip() -> dict[str, bytes]:
    """The files of a directory of open_clip's, with what comes back to the last bit."""
    from coca_jax.interop import open_clip
    from coca_jax.interop.weights import Weights
    from tests import tiny
    from tests.interop.open_clip_files_test import USUAL, vocabulary
    from tests.interop.open_clip_rewriting_test import parameters

    model = tiny.replace(USUAL, text__vocab_size=300)
    with tempfile.TemporaryDirectory() as parent:
        folder = pathlib.Path(parent) / "new"
        data = config.Data(interpolation="pillow-bicubic")
        c = config.Config(model=model, data=data)
        open_clip.write(Weights(c, parameters(model), vocabulary(), 3), folder)
        return {file.name: file.read_bytes() for file in folder.iterdir()}


def _read_open_clip(files: dict[str, bytes], folder: pathlib.Path) -> bool:
    from coca_jax.interop import open_clip

    for name, content in files.items():
        (folder / name).write_bytes(content)
    with answers(*_interop()) as refused:
        open_clip.read(folder)
    return not refused


def read_open_clip_json(data: bytes, folder: pathlib.Path) -> bool:
    return _read_open_clip(_open_clip() | {"open_clip_config.json": data}, folder)


def read_open_clip_weights(data: bytes, folder: pathlib.Path) -> bool:
    """Beside the configuration, and told by their shapes alone."""
    done = _read_open_clip(_open_clip() | {"open_clip_model.safetensors": data}, folder)
    (folder / "open_clip_config.json").unlink()
    return _read_open_clip({}, folder) or done


def read_vision(data: bytes, folder: pathlib.Path) -> bool:
    from tests.interop import vits

    done = []
    for name in ("a.safetensors", "a.npz"):
        (folder / name).write_bytes(data)
        with answers(*_interop()) as refused:
            vits.load(folder / name, vits.MODEL, config.Data())
        done.append(not refused)
        (folder / name).unlink()
    return any(done)


@functools.cache
def _vision() -> list[bytes]:
    from tests.interop import vits

    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        files = [vits.save(folder / "a.safetensors", vits.timm_tensors())]
        files.append(vits.save(folder / "b.npz", vits.big_vision_tensors()))
        return [file.read_bytes() for file in files]


def read_vision_json(data: bytes, folder: pathlib.Path) -> bool:
    from tests.interop import vits

    (folder / "model.safetensors").write_bytes(_vision()[0])
    (folder / "config.json").write_bytes(data)
    with answers(*_interop()) as refused:
        vits.load(folder, vits.MODEL, config.Data())
    return not refused


_TIMM = {
    "architecture": "vit_small_patch16_224",
    "model_args": {"num_heads": 2, "act_layer": "gelu"},
    "pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic"},
}


def read_workdir(data: bytes, folder: pathlib.Path) -> bool:
    """The config.json of a workdir, which loading and going on read."""
    from coca_jax.train import checkpoint

    (folder / checkpoint.CONFIG_FILE).write_bytes(data)
    with answers(*_interop()) as refused:
        config.check(checkpoint.read_config(folder))
    return not refused


def read_command_line(data: bytes, folder: pathlib.Path) -> bool:
    """`--config.KEY=VALUE` as in a shell: one argument a line."""
    from coca_jax import commandline

    importlib.import_module("coca_jax.main")  # defines the flags
    arguments = data.decode("utf-8", "surrogateescape").split("\n")
    before = sys.argv
    sys.argv = argv = ["main", f"--config={REPOSITORY}/configs/debug.py", *arguments]  # ml_collections looks there
    said: Any = None
    try:
        commandline.parse(argv)
        with answers() as refused:
            config.check(config.from_config_dict(flags.FLAGS.config))
        said = refused
    except SystemExit as stop:
        assert isinstance(stop.code, str) and stop.code.startswith("error: ") and len(stop.code) < _LONGEST, stop.code
        assert "\n" not in stop.code, stop.code
        said = stop.code
    finally:
        sys.argv = before
        flags.FLAGS.unparse_flags()
        for name in [name for name in flags.FLAGS if name.startswith("config.")]:
            delattr(flags.FLAGS, name)
    return not said


@functools.cache
def _keys() -> list[str]:
    """Every key, and some that are none."""

    def below(values: dict[str, Any], path: str) -> Iterator[str]:
        for key, value in values.items():
            yield path + key
            if isinstance(value, dict):
                yield from below(value, f"{path}{key}.")

    return [*below(dataclasses.asdict(config.Config()), "config."), "config.", "config.x", "config.model.image.x.y"]


_SOUND = ("1", "2", "8", "64", "0.5", "1e-3", "adamw", "bfloat16", "dots", "(0.5, 1.0)", "False")
_ODD = (
    *("", "0", "-1", "1e400", "nan", "inf", "True", "none", "()", "(1,", "[1]*9", "1" * 5000, "(" * 300, "@a", "'"),
    *("__import__('os')", "a{99999999999999999999}", "('a', 'b')", "1_0", "0x10", "\x00", "999999999999"),
)


def _command_lines() -> st.SearchStrategy[bytes]:
    numbers = st.one_of(st.integers(), st.floats()).map(str)
    values = st.one_of(st.sampled_from(_SOUND), st.sampled_from(_ODD), numbers, st.text(max_size=9))
    values = values.map(lambda text: text.replace("\n", " "))
    argument = st.tuples(st.sampled_from(_keys()), values).map(lambda pair: f"--{pair[0]}={pair[1]}")
    lines = st.lists(argument, min_size=1, max_size=3).map("\n".join)
    return lines.map(lambda text: text.encode("utf-8", "surrogatepass"))


def _json_of(content: bytes) -> list[Any]:
    return [json.loads(content)]


TARGETS: dict[str, Target] = {
    "images": Target(lambda: damage.damaged(seeds.images(), seeds.repair_image), read_image),
    "tar": Target(lambda: damage.damaged(seeds.tar_files(), seeds.repair_tar), read_tar),
    "tar_index": Target(lambda: damage.damaged([_tar_index()]), read_tar_index),
    "array_record": Target(lambda: damage.damaged(seeds.array_records()), read_array_record),
    "record": Target(_packed_records, read_record),
    "parquet": Target(lambda: damage.damaged(seeds.parquet()), read_parquet),
    "tfrecord": Target(
        lambda: st.one_of(
            damage.damaged(seeds.tfrecords(), seeds.repair_tfrecord),
            damage.damaged(seeds.tfrecords(), seeds.repair_tfrecord).map(seeds.gzipped),
            damage.damaged([seeds.gzipped(data) for data in seeds.tfrecords()]),
        ),
        read_tfrecord,
    ),
    "captions": Target(lambda: damage.damaged(seeds.caption_files()), read_captions),
    "classes": Target(
        lambda: damage.changed_json([{"dot": ["a dot", "a point"], "1": "one"}, ["a {}", "b"]]), read_classes
    ),
    "sentencepiece": Target(lambda: damage.damaged([seeds.tokenizer().to_bytes()]), read_tokenizer),
    "tokenizer_json": Target(lambda: damage.changed_json(_tokenizer_json()), read_tokenizer),
    "merges": Target(
        lambda: st.one_of(
            damage.damaged([seeds.merges()]).map(seeds.gzipped), damage.damaged([seeds.gzipped(seeds.merges())])
        ),
        read_tokenizer,
    ),
    "exported_json": Target(lambda: damage.changed_json(_json_of(_exported()["coca_jax.json"])), read_exported_json),
    "exported_weights": Target(lambda: damage.damaged([_exported()["model.safetensors"]]), read_exported_weights),
    "open_clip_json": Target(
        lambda: damage.changed_json(_json_of(_open_clip()["open_clip_config.json"])), read_open_clip_json
    ),
    "open_clip_weights": Target(
        lambda: damage.damaged([_open_clip()["open_clip_model.safetensors"]]), read_open_clip_weights
    ),
    "vision_weights": Target(lambda: damage.damaged(_vision()), read_vision),
    "vision_json": Target(lambda: damage.changed_json([_TIMM]), read_vision_json),
    "workdir": Target(lambda: damage.changed_json(_json_of(config.to_json(config.Config()).encode())), read_workdir),
    "command_line": Target(_command_lines, read_command_line),
}
