"""Every fault that damaged files have shown, as the smallest file that does."""

from __future__ import annotations

import copy
import json
import pathlib
import struct
import subprocess
import sys
from typing import Any

import msgpack
import numpy as np
import pytest

from coca_jax import config
from coca_jax.data import pipeline, tally
from coca_jax.data.mixture import Mixture
from coca_jax.data.prepare import tfrecord
from coca_jax.data.records import BadExample, DataError
from coca_jax.data.sources import open_source
from coca_jax.interop import exported, open_clip
from coca_jax.interop.weights import ConversionError
from coca_jax.train import checkpoint
from tests.interop import vits
from tests.untrusted import seeds, targets


@pytest.mark.parametrize(
    "changes",
    [
        {"captions": [None]},
        {"captions": [3]},
        {"key": 5},
        {"image": "text"},
        {"label": 1},
        {"style": []},
        {"captions": 3},
    ],
)
def test_fields_of_another_type(tmp_path: pathlib.Path, changes: dict[str, Any]) -> None:
    packed = msgpack.packb(seeds.packed_values()[0] | changes)
    assert targets.read_record(packed, tmp_path)  # the set is opened, and all of it is bad
    source = open_source(f"array_record:{tmp_path}/a.array_record")
    with pytest.raises(BadExample, match="not a record with the fields"):
        source[0]


HALF = "\ud800"  # of a surrogate pair: JSON can hold it, and no tokenizer takes it


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"caption": HALF}, "encoding"),
        ({"caption": "a", "label": HALF}, "encoding"),
        ({"caption": "a", "file_name": HALF + ".png"}, "unreadable"),
    ],
)
def test_half_a_surrogate_pair_in_a_folder(tmp_path: pathlib.Path, line: dict[str, str], reason: str) -> None:
    (tmp_path / "0.png").write_bytes(seeds.picture())
    (tmp_path / "captions.jsonl").write_text(json.dumps({"file_name": "0.png"} | line))
    source = open_source(f"folder:{tmp_path}")
    with pytest.raises(BadExample) as error:
        source[0]
    assert error.value.reason == reason


def test_half_a_surrogate_pair_in_a_tar(tmp_path: pathlib.Path) -> None:
    from tests.data.sources import tars

    members = [("0.jpg", seeds.picture()), ("0.json", json.dumps({"caption": HALF}).encode())]
    tars.write(tmp_path / "a.tar", members)
    with pytest.raises(BadExample, match="is not Unicode"):
        open_source(f"webdataset:{tmp_path}/a.tar?caption=caption")[0]


def test_a_bad_picture_in_a_file_whose_name_is_no_text(tmp_path: pathlib.Path) -> None:
    """It is listed; the run goes on."""
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "\udcff.png").write_bytes(b"nothing")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.png").write_bytes(b"nothing")
    source = open_source(f"folder:{tmp_path}")
    example = pipeline._Read(source, seeds.tokenizer(), config.Data(), 16, 8).evaluate(0)
    listed = tally.List(Mixture([source], [1.0]), tally.epath.Path(tmp_path))
    listed.add(np.array([0]), np.array([example["problem"]]))
    assert json.loads(listed.path.read_text())["key"] == "class/\\udcff.png"


def test_an_index_of_a_tar_that_counts_to_infinity(tmp_path: pathlib.Path) -> None:
    shard = tmp_path / "shard.tar"
    shard.write_bytes(seeds.tar_files()[0])
    open_source(f"webdataset:{shard}")
    index = tmp_path / "shard.tar.coca_jax_index"
    sound = index.read_bytes()
    head = msgpack.unpackb(sound[12 : 12 + int.from_bytes(sound[8:12], "little")], unicode_errors="surrogateescape")
    packed = msgpack.packb(head | {"count": float("inf")})
    index.write_bytes((sound[:8] + struct.pack("<I", len(packed)) + packed).ljust(4096, b"\0") + sound[4096:])
    assert len(open_source(f"webdataset:{shard}")) == 3
    assert index.read_bytes() == sound  # made again


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [2**63 - 1, 2**64 - 1, 2**62, 2**40])
def test_a_tfrecord_of_any_length(tmp_path: pathlib.Path, length: int, packed: bool) -> None:
    head = struct.pack("<Q", length)
    data = head + struct.pack("<I", tfrecord.masked_crc(head)) + b"x" * 30
    (tmp_path / "a.tfrecord").write_bytes(seeds.gzipped(data) if packed else data)
    with pytest.raises(DataError, match=r"record 0 (is cut off|has \d+ bytes, more than)"):
        tfrecord.TFRecords(targets.inputs.Spec.parse(f"tfrecord:{tmp_path}/a.tfrecord"))


def test_merges_in_a_damaged_stream() -> None:
    """It is zlib that says so, and not gzip."""
    with pytest.raises(DataError, match="not CLIP's merges"):
        targets.Tokenizer(seeds.gzipped(seeds.merges())[:10] + b"\xff" * 20)


def test_a_piece_of_a_vocabulary_that_is_no_utf_8() -> None:
    """SentencePiece quotes it in what it says of the model, which is then no text."""
    whole = seeds.tokenizer().to_bytes()
    damaged = whole.replace(b"<0x00>", b"\x800x00>")
    assert damaged != whole
    with pytest.raises(DataError, match="not a SentencePiece model"):
        targets.Tokenizer(damaged)


def test_a_vocabulary_on_which_its_library_panics() -> None:
    """What is raised then is not even an Exception."""
    pytest.importorskip("tokenizers", reason="NOT RUN: needs pip install 'coca_jax[bpe]'")
    described = targets._tokenizer_json()[0] | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "A=="}}
    with pytest.raises(DataError, match=r"not a tokenizer\.json"):
        targets.Tokenizer(json.dumps(described).encode())


def test_a_set_that_names_python_classes(tmp_path: pathlib.Path) -> None:
    """TFDS imports the modules of the classes that a set's features.json names: the set's own folder may hold them."""
    folder = tmp_path / "data" / "evil" / "1.0.0"
    folder.mkdir(parents=True)
    (tmp_path / "data" / "code.py").write_text("open('ran', 'w').close()\n")
    described = {"pythonClassName": "data.code.Feature", "featuresDict": {"features": {}}}
    (folder / "features.json").write_text(json.dumps(described))
    info = {"name": "evil", "version": "1.0.0", "fileFormat": "array_record", "splits": [{"name": "train"}]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    program = "import sys; from coca_jax.data.sources import open_source; open_source(sys.argv[1])"
    spec = "tfds:evil:1.0.0?split=train&data_dir=data"
    environment = targets.os.environ | {"PYTHONPATH": f"{targets.REPOSITORY}:{tmp_path}"}
    done = subprocess.run(
        [sys.executable, "-c", program, spec],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "asks for the Python class 'data.code.Feature', which is not one of TFDS's own" in done.stderr
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Models and configurations


def changed(values: Any, path: str, value: Any) -> bytes:
    values = copy.deepcopy(values)
    *groups, last = path.split("/")
    group = values
    for name in groups:
        group = group[name]
    group[last] = value
    return json.dumps(values).encode()


INFINITY = float("inf")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("step", "x"),
        ("step", INFINITY),
        ("preprocessing/size", "x"),
        ("preprocessing/crop", "x"),
        ("model/image/width", 10**30),  # looking for heads that divide it took forever
        ("model/image/width", 10**12 + 39),
    ],
)
def test_our_directories(tmp_path: pathlib.Path, path: str, value: Any) -> None:
    files = targets._exported()
    described = changed(json.loads(files["coca_jax.json"]), path, value)
    for name, content in (files | {"coca_jax.json": described}).items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConversionError, match=r"coca_jax\.json"):
        exported.read(tmp_path)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("preprocess_cfg", [1]),
        ("model_cfg/vision_cfg/mlp_ratio", INFINITY),
        ("model_cfg/vision_cfg/layers", 10**9),  # the names of all their tensors were listed
        ("model_cfg/init_logit_bias", 10**400),
        ("model_cfg/init_logit_scale", 746),  # a temperature of 0
        ("model_cfg/init_logit_scale", -746),
        ("coca_jax/step", "x"),
        ("coca_jax/preprocessing/size", "x"),
        ("coca_jax/model/image/depth", 7),  # was taken for a model of seven layers, with the weights of another
    ],
)
def test_directories_of_open_clip(tmp_path: pathlib.Path, path: str, value: Any) -> None:
    files = targets._open_clip()
    described = changed(json.loads(files["open_clip_config.json"]), path, value)
    for name, content in (files | {"open_clip_config.json": described}).items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConversionError):
        open_clip.read(tmp_path)


def test_a_vision_encoder_whose_interpolation_is_no_name(tmp_path: pathlib.Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(targets._vision()[0])
    described = targets._TIMM | {"pretrained_cfg": {"interpolation": True}}
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(ConversionError, match="interpolation"):
        vits.load(tmp_path, vits.MODEL, config.Data())


@pytest.mark.parametrize("text", ["[" * 100_000, '{"steps": ' + "9" * 5000 + "}", b"\xff\xfe{}"])
def test_json_that_no_writer_writes(tmp_path: pathlib.Path, text: str | bytes) -> None:
    content = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(checkpoint.CheckpointError, match="is damaged"):
        checkpoint.read_config(tmp_path)
    (tmp_path / "coca_jax.json").write_bytes(content)
    with pytest.raises(ConversionError, match="is damaged"):
        exported.read(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("optimizer.decay_mask", "a{99999999999999999999}", "is not a regular expression"),
        ("model.image.width", 10**30, "is a digit too many"),
        ("model.text.width", 2**31 - 1, "does not divide"),
        ("microbatches", 2**31 - 2, "does not divide"),
        ("steps", 2**31, "is a digit too many"),
    ],
)
def test_configurations(key: str, value: Any, said: str) -> None:
    c = json.loads(config.to_json(config.Config()))
    *groups, last = key.split(".")
    group = c
    for name in groups:
        group = group[name]
    group[last] = value
    with pytest.raises(config.ConfigError, match=said):
        config.check(config.from_config_dict(c))
