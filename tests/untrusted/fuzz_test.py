"""Damaged files of every kind that is read: an answer, or one of the project's own errors, and nothing beside it.

What no test finds here, `python -m tests.untrusted.child FOLDER 10000 --seed=1 TARGET` may; and, with the coverage of
the code to go by, `python -m tests.untrusted.coverage TARGET` (`pip install "coca_jax[fuzz]"`).
"""

from __future__ import annotations

import importlib.util
import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.untrusted import guard
from tests.untrusted.targets import TARGETS

# The fixture of tests/conftest.py.
RunPython = Callable[..., subprocess.CompletedProcess[str]]

# Cases before a release; in seconds of one core about a hundredth of them and two to start.
CASES = {
    **{"images": 1500, "tar": 500, "tar_index": 300, "array_record": 500, "record": 700, "parquet": 600},
    **{"tfrecord": 700, "captions": 700, "classes": 300, "sentencepiece": 700, "tokenizer_json": 1200, "merges": 500},
    **{"exported_json": 1200, "exported_weights": 250, "open_clip_json": 500, "open_clip_weights": 200},
    **{"vision_weights": 500, "vision_json": 500, "workdir": 1500, "command_line": 1000},
}


# What is imported while files are read would be kept in a folder that is not theirs.
NOTHING_WRITTEN = {"PYTHONDONTWRITEBYTECODE": "1"}


def fuzz(run_python: RunPython, folder: pathlib.Path, cases: int, *names: str) -> list[dict[str, Any]]:
    """What the process says of each target; the test fails with what it printed and the file that it stopped at."""
    arguments = ["-m", "tests.untrusted.child", folder, str(cases), *names]
    done = run_python(arguments, devices=1, env=NOTHING_WRITTEN, check=False, timeout=500)
    case = folder / "case"
    content = case.read_bytes()[:2000] if case.exists() else b""
    assert done.returncode == 0, f"status {done.returncode} at {content!r}\n{done.stdout}\n{done.stderr[-8000:]}"
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_few_of_every_kind(run_python: RunPython, tmp_path: pathlib.Path) -> None:
    found = fuzz(run_python, tmp_path, 12)
    assert [one["target"] for one in found] == list(TARGETS)
    assert all(one["read"] + one["refused"] >= 12 for one in found), found


@pytest.mark.slow
def test_more_of_every_kind(run_python: RunPython, tmp_path: pathlib.Path) -> None:
    found = fuzz(run_python, tmp_path, 100)
    print(*found, sep="\n")
    assert [one["target"] for one in found] == list(TARGETS)
    assert all(one["read"] and one["read"] + one["refused"] >= 100 for one in found), found


@pytest.mark.soak
@pytest.mark.parametrize("name", TARGETS)
def test_many(run_python: RunPython, tmp_path: pathlib.Path, name: str) -> None:
    (found,) = fuzz(run_python, tmp_path, CASES[name], name)
    print(found)
    # Hypothesis makes fewer where it has made all that there are.
    assert found["read"] + found["refused"] >= min(CASES[name], 200), found
    assert found["read"], f"not even a sound file was read: {found}"


@pytest.mark.soak
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="needs pip install 'coca_jax[fuzz]'")
@pytest.mark.parametrize("name", ["images", "tar", "captions", "exported_json"])
def test_files_made_by_coverage(run_python: RunPython, tmp_path: pathlib.Path, name: str) -> None:
    arguments = ["-m", "tests.untrusted.coverage", name, f"--folder={tmp_path}", "-max_total_time=8", "-seed=1"]
    done = run_python(arguments, devices=1, env=NOTHING_WRITTEN, check=False)
    assert done.returncode == 0 and not list(tmp_path.glob("fault-*")), done.stderr[-6000:]
    (runs,) = re.findall(r"Done (\d+) runs", done.stderr)
    print(f"{name}: {runs} files")
    assert int(runs) > 50


@pytest.mark.parametrize(
    "line",
    [
        "open('../escaped', 'w')",
        "open('/tmp/escaped', 'ab')",
        "os.mkdir('../escaped')",
        "os.symlink('x', '../escaped')",
        "os.rename('inside', '../escaped')",
        "os.mkdir('escaped', dir_fd=os.open('..', os.O_RDONLY))",
        "os.system('true')",
        "subprocess.run(['true'])",
        "pickle.loads(b'cos\\nsystem\\n.')",
        "runpy.run_path('inside/code.py')",
        "socket.create_connection(('127.0.0.1', 9))",
    ],
)
def test_what_escapes_is_seen(tmp_path: pathlib.Path, line: str) -> None:
    (tmp_path / "own" / "inside").mkdir(parents=True)
    (tmp_path / "own" / "inside" / "code.py").write_text("x = 1")
    program = f"""
import os, pickle, runpy, socket, subprocess, sys, tempfile
sys.path.insert(0, {str(pathlib.Path(guard.__file__).parent)!r})
import guard
os.chdir({str(tmp_path / "own")!r})
watch = guard.Guard(os.getcwd())
sys.addaudithook(watch)
watch.active = True
open("inside/allowed", "w").close()
os.mkdir("inside/folder")
try:
    {line}
except guard.Escaped:
    sys.exit(7)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 7, done.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == ["own"]
