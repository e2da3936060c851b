"""The benchmark of the losses, and its measurements for an absent slice of 16 chips."""

from __future__ import annotations

import importlib.util
import re

import pytest


def table(text: str) -> dict[str, float]:
    """Temporaries in MiB per chip, by line name."""
    found = re.findall(r"^(\w+, [\w ]+?) {2,}([\d.]+) {2,}[\d.]+", text, re.MULTILINE)
    return {name: float(mib) for name, mib in found}


def test_the_benchmark_prints_memory_and_time(run_python) -> None:
    sizes = ("--caption_batch=16", "--length=8", "--width=16", "--vocab=3000", "--chunk=16")
    arguments = ["-m", "benchmarks.losses", "--topology=cpu", "--only=captioning", "--time=1", *sizes]
    text = run_python(arguments, devices=1).stdout
    temporaries = table(text)
    assert list(temporaries) == ["captioning, all at once", "captioning, chunks of 16"], text
    assert temporaries["captioning, chunks of 16"] * 4 < temporaries["captioning, all at once"]
    assert "median, ms" in text


def test_chunks_use_an_eighth_of_the_memory_for_1024_captions_of_64_tokens(run_python) -> None:
    """Vocabulary 64,000, as recorded in docs/log.md; compiled, not run."""
    text = run_python(["-m", "benchmarks.losses", "--topology=cpu", "--only=captioning"], devices=1).stdout
    assert "captioning: batch 1024, length 64, width 768, vocabulary 64000" in text
    temporaries = table(text)
    assert temporaries["captioning, chunks of 1024"] * 8 < temporaries["captioning, all at once"], text


@pytest.mark.slow
def test_a_batch_of_65536_fits_16_chips_of_v5e(run_python) -> None:
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("NOT CHECKED: compiling for TPUs needs libtpu, which the test extra does not bring: install libtpu")
    arguments = ["-m", "benchmarks.losses", "--topology=v5e:4x4", "--only=contrastive", "--way=tiles"]
    # The compiler's default optimization level; the tests otherwise lower it to compile faster.
    text = run_python(arguments, devices=1, env={"XLA_FLAGS": ""}, timeout=1800).stdout
    temporaries = table(text)
    assert list(temporaries) == ["softmax, tiles of 4096", "sigmoid, tiles of 4096"], text
    assert max(temporaries.values()) < 0.6 * 1024, text
