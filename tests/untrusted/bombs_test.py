"""Small files that would fill the memory: what each takes at most, measured in a process of its own.

Those of pictures that are refused are in tests/data/images/bad_pictures_test.py.
"""

from __future__ import annotations

import gzip
import io
import json
import pathlib
import resource
import sys
import time
import zipfile
from collections.abc import Callable

import numpy as np
import PIL.Image
import pytest

from coca_jax.data import images
from coca_jax.data.records import BadExample
from tests.data.images import pictures
from tests.untrusted import seeds, targets

# MiB that reading may take beside the file. A picture of MAX_PIXELS has 256 as RGB; where it is see-through Pillow
# holds it as RGBA, the background, and the result.
BOUND = {"palette": 700, "rgba": 1500, "16 bits": 700, "gif": 700, "jpeg": 300}
ELSE = 400


def largest() -> dict[str, bytes]:
    """Pictures of as many pixels as are read, of one colour."""
    side = int(images.MAX_PIXELS**0.5)
    out = {}
    for name, mode, kind in (
        ("palette", "P", "PNG"),
        ("rgba", "RGBA", "PNG"),
        ("gif", "P", "GIF"),
        ("jpeg", "L", "JPEG"),
    ):
        out[name] = pictures.save(PIL.Image.new(mode, (side, side)), kind)
    out["16 bits"] = pictures.save(PIL.Image.new("I;16", (side, side)), "PNG")
    return out


def parquet() -> bytes:
    """A picture of 4 KB a million times over, in 430 KB: 4 GB in memory, if it were written out."""
    import pyarrow
    import pyarrow.parquet

    numbers = pyarrow.array(np.zeros(1_000_000, np.int32))
    image = pyarrow.array([np.random.default_rng(0).bytes(4096)])
    columns = {
        "image": pyarrow.DictionaryArray.from_arrays(numbers, image),
        "caption": pyarrow.DictionaryArray.from_arrays(numbers, pyarrow.array(["a" * 2000])),
    }
    out = io.BytesIO()
    pyarrow.parquet.write_table(
        pyarrow.table(columns), out, compression="zstd", row_group_size=1_000_000, store_schema=False
    )
    return out.getvalue()


def npz() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (10**9,)})
        with archive.open("embedding/kernel.npy", "w", force_zip64=True) as member:
            member.write(header.getvalue())
            for _ in range(40):
                member.write(bytes(10_000_000))
    return out.getvalue()


def safetensors(size: int) -> bytes:
    header = json.dumps({"a": {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}}).encode()
    return len(header).to_bytes(8, "little") + header


def bombs() -> dict[str, tuple[str, bytes]]:
    """By name: the target that reads it, and the file."""
    zeros = gzip.compress(bytes(400_000_000), 9)
    huge = 2**62
    return {
        "merges": ("merges", zeros),
        "gzipped TFRecord": ("tfrecord", zeros),
        "parquet": ("parquet", parquet()),
        "npz": ("vision_weights", npz()),
        "safetensors": ("vision_weights", safetensors(huge)),
        "header of safetensors": ("vision_weights", huge.to_bytes(8, "little") + b"{"),
        "exported": ("exported_weights", safetensors(huge)),
        "tar": ("tar", seeds.repair_tar(_of_size(seeds.tar_files()[0], huge))),
        "nested record": ("record", b"\x91" * 1_000_000),
        "counted record": ("record", b"\xdd\xff\xff\xff\xff"),
        "long line": ("captions", b"file_name,caption\n0.png," + b"a" * 20_000_000),
    }


def _of_size(tar: bytes, size: int) -> bytes:
    return tar[:124] + b"\x80" + size.to_bytes(11, "big") + tar[136:]


def _measured(name: str, read: Callable[[], object]) -> None:
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        read()
        found = "read"
    except BadExample as error:
        found = error.reason
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    scale = 2**20 if sys.platform == "darwin" else 2**10
    print(name, found, (after - before) // scale, round(time.process_time() - started, 1), sep=":", flush=True)


def read_bombs() -> None:
    """In a process of its own, the smallest first: what a peak hides is not measured."""
    import os
    import tempfile

    folder = pathlib.Path(tempfile.mkdtemp(dir=os.environ["BOMBS"]))
    os.environ["COCA_JAX_CACHE"] = str(folder / "cache")
    for target in ("captions", "tar", "record", "tfrecord", "exported_weights", "vision_weights", "parquet"):
        sound = {"captions": b"file_name,caption\n0.png,a\n"}.get(target, b"nothing")
        (folder / target).mkdir()
        targets.TARGETS[target].read(sound, folder / target)  # what it imports is not counted
    seeds.tokenizer()
    for file in sorted(pathlib.Path(os.environ["BOMBS"]).glob("*.bomb"), key=lambda file: file.stat().st_size):
        name, _, target = file.stem.partition("@")
        own = folder / f"own-{name}"
        own.mkdir()
        data = file.read_bytes()
        _measured(name, lambda data=data, target=target, own=own: targets.TARGETS[target].read(data, own))  # type: ignore[misc]


def read_picture() -> None:
    import os

    data = pathlib.Path(os.environ["PICTURE"]).read_bytes()
    images.decode(pictures.save(pictures.photo(), "PNG"))
    _measured("picture", lambda: images.decode_and_augment(data, 32, np.random.default_rng(0), targets.DATA))


@pytest.mark.slow
def test_bombs(run_python, tmp_path):
    made = bombs()
    for name, (target, data) in made.items():
        assert len(data) < 25_000_000
        (tmp_path / f"{name}@{target}.bomb").write_bytes(data)
    run = run_python(read_bombs, devices=1, env={"BOMBS": str(tmp_path)})
    rows = [line.split(":") for line in run.stdout.strip().splitlines()]
    print(rows)
    assert sorted(row[0] for row in rows) == sorted(made)
    assert [row for row in rows if float(row[2]) > ELSE or float(row[3]) > 20] == []  # MiB, seconds


@pytest.mark.slow
def test_the_largest_pictures(run_python, tmp_path):
    for name, data in largest().items():
        (tmp_path / "picture").write_bytes(data)
        run = run_python(read_picture, devices=1, env={"PICTURE": str(tmp_path / "picture")})
        _, found, mebibytes, seconds = run.stdout.strip().split(":")
        print(name, found, mebibytes, seconds)
        assert found == "read" and float(mebibytes) < BOUND[name] and float(seconds) < 20, (name, run.stdout)
