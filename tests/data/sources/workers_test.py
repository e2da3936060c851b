"""Every kind of source in Grain's worker processes."""

from __future__ import annotations

import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coca_jax.data import records
from coca_jax.data.records import Record
from tests.data.sources import tars

# Workers import the main module: it must be a file, and guarded.
PROGRAM = """
import sys
import grain
from absl import flags
from coca_jax.data.sources import open_source

def main():
    flags.FLAGS.mark_as_parsed()
    for spec in sys.argv[1:]:
        source = open_source(spec)
        source[0]  # a file is open when the source is sent
        read = grain.MapDataset.source(source).map(lambda record: record.captions[0]).to_iter_dataset()
        options = grain.MultiprocessingOptions(num_workers=1)
        print(sorted(read.mp_prefetch(options)))

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
def test_every_kind_in_worker_processes(tmp_path, run_python, tfds_folder):
    numbers = range(4)
    tars.write(tmp_path / "0.tar", tars.samples(0, 4))
    pictures = [b"picture %d" % i for i in numbers]
    pq.write_table(pa.table({"image": pictures, "text": [f"text {i}" for i in numbers]}), tmp_path / "0.parquet")
    packed = [records.pack(Record(str(i), pictures[i], (f"text {i}",)), 1, 1) for i in numbers]
    records.write(tmp_path / "0.array_record", packed)
    (tmp_path / "folder").mkdir()
    for i in numbers:
        (tmp_path / "folder" / f"{i}.jpg").write_bytes(pictures[i])
    lines = "".join(f"{i}.jpg,text {i}\n" for i in numbers)
    (tmp_path / "folder" / "captions.csv").write_text("image,text\n" + lines)
    specs = [
        f"webdataset:{tmp_path}/0.tar",
        f"parquet:{tmp_path}/0.parquet",
        f"array_record:{tmp_path}/0.array_record",
        f"folder:{tmp_path}/folder",
        f"tfds:labelled?split=test&data_dir={tfds_folder}&template=text {{}}",
    ]
    (tmp_path / "program.py").write_text(PROGRAM)
    done = run_python([os.fspath(tmp_path / "program.py"), *specs], devices=1)
    assert "sources/files.py" not in done.stderr  # files are closed in peace when a process ends
    lists = [line for line in done.stdout.splitlines() if line.startswith("[")]
    assert lists[:4] == [str([f"text {i}" for i in numbers])] * 4
    assert lists[4] == str(["text blue", "text green", "text red"])
