"""benchmarks/data.py: its pictures, what it compares with, and that it runs."""

from __future__ import annotations

import ast
import importlib.util
import re

import numpy as np
import PIL.Image
import pytest

from benchmarks import data_cases


def test_the_crop_of_the_comparison_is_torchvisions() -> None:
    picture = PIL.Image.fromarray((np.add.outer(np.arange(120), np.arange(160)) // 2).astype(np.uint8)).convert("RGB")
    crop = data_cases.random_resized_crop(48, (0.9, 1.0))
    spans = []
    for _ in range(200):
        out = np.asarray(crop(picture))
        assert out.shape == (48, 48, 3)
        spans.append(int(out[-1, -1, 0]) - int(out[0, 0, 0]))
    # The half of width + height: 0.9 to 1 of the area of 120 x 160, of an aspect of up to 4/3.
    assert 126 <= min(spans) < max(spans) <= 140 and len(set(spans)) > 5


def test_a_repeated_source_is_that_source_over_and_over() -> None:
    repeated = data_cases.Repeated(("a", "b", "c"), times=4)
    assert len(repeated) == 12 and "".join(repeated[i] for i in range(12)) == "abc" * 4


def test_the_program_for_tensorflow_is_python_without_this_package() -> None:
    names = [
        alias.name
        for node in ast.walk(ast.parse(data_cases.tf_program()))
        if isinstance(node, ast.Import)
        for alias in node.names
    ]
    assert set(names) == {"os", "sys", "json", "time", "tarfile", "pathlib", "tensorflow"}


@pytest.mark.slow
def test_the_benchmark_prints_its_tables(run_python, tmp_path) -> None:
    if missing := [name for name in ("skimage", "sklearn", "webdataset") if importlib.util.find_spec(name) is None]:
        pytest.skip(f"NOT CHECKED: {missing} come with the benchmark extra, which the test extra does not bring")
    arguments = [
        "-m",
        "benchmarks.data",
        f"--folder={tmp_path / 'pictures'}",
        "--pictures=4",
        "--count=16",
        "--rounds=1",
    ]
    text = run_python([*arguments, "--host_chips=8", "--chip_rate=100"], devices=1, timeout=900).stdout
    rates = re.findall(
        r"^(.*crop [\d.]+-1.*?) {2,}(\d+)  [\d.]+x  +(\d+)  [\d.]+x  +(\d+)  [\d.]+x$", text, re.MULTILINE
    )
    assert len(rates) >= 10 and all(int(rate) > 0 for row in rates for rate in row[1:]), text
    assert {"coca_jax, array_record, crop 0.5-1", "open_clip (webdataset + Pillow), crop 0.9-1"} <= {
        r[0] for r in rates
    }
    assert re.search(r"^decode +[\d.]+ +[\d.]+ +[\d.]+$", text, re.MULTILINE)
    assert re.search(r"its 8 chips eat 8 x 100 = 800, for which [\d.]+ cores would do", text)
