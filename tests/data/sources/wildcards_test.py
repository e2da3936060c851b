"""Patterns match what Python's glob matches, within bounds, and end where links lead round."""

from __future__ import annotations

import glob
import os
import pathlib
import random
import subprocess
import time
from collections.abc import Iterator

import pytest

from coca_jax import pictures
from coca_jax.data.records import DataError
from coca_jax.data.sources import files, patience, wildcards

PATTERNS = (
    *(
        "*",
        "**",
        "**/*",
        "*/*",
        "**/*.tar*",
        "a*/**/f*",
        "**/a*/**",
        ".*",
        "*/.*",
        "./*",
        "./**/f*",
        "?0/*",
        "[ab]*/f*",
    ),
    *("[ab]*/f*", "**/", "a0/f0", "**/f0", "x[[]1]*/*", "**/**/f*", "*/**/*", "b1/..", "*/../f*", "missing/*"),
)


def test_a_pattern_matches_what_python_s_glob_matches(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    for trial in range(20):
        folders = [f"t{trial}"]
        for number in range(12):
            folder = os.path.join(rng.choice(folders), rng.choice(["a", "b", ".h", "c.d", "x[1]"]) + str(number % 3))
            os.makedirs(folder, exist_ok=True)
            folders.append(folder)
        for number in range(30):
            file = os.path.join(rng.choice(folders), rng.choice(["f", "g.tar", ".k", "x1.tar"]) + str(number % 4))
            if not os.path.isdir(file):
                pathlib.Path(file).touch()
        for pattern in PATTERNS:
            for start in (f"t{trial}/", f"{tmp_path}/t{trial}/", f"./t{trial}/"):
                found = glob.glob(start + pattern, recursive=True)
                assert wildcards.matching_files(start + pattern) == sorted({p for p in found if os.path.isfile(p)})


def test_links_are_followed_but_not_round(tmp_path: pathlib.Path) -> None:
    for name in ("a", "b", "out/in"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "1.tar").touch()
    (tmp_path / "a" / "b").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "a").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "here").symlink_to(".")
    (tmp_path / "a" / "out").symlink_to(tmp_path / "out")
    (tmp_path / "a" / "self.tar").symlink_to(tmp_path / "a" / "self.tar")
    found = wildcards.matching_files(f"{tmp_path}/a/**/*.tar")
    assert found == [f"{tmp_path}/a/{name}1.tar" for name in ("", "b/", "out/in/")]
    assert len(wildcards.matching_files(f"{tmp_path}/**/*.tar")) < 20


def test_what_is_no_regular_file_is_passed_over_and_counted(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.tar").touch()
    os.mkfifo(tmp_path / "b.tar")
    (tmp_path / "c.tar").symlink_to("missing")
    assert [file.name for file in files.expand(f"{tmp_path}/*.tar", "here")] == ["a.tar"]
    assert "2 pipes, devices, sockets or broken links are passed over" in caplog.text


@pytest.mark.parametrize(
    ("bound", "value", "said"),
    [
        ("MATCHES", 10, "matches more than 10 files"),
        ("LOOKED_AT", 15, "leads through more than 15 files and folders"),
        ("SECONDS", 0.0, "took 0 s"),
    ],
)
def test_a_pattern_that_matches_the_world_ends_with_its_name(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, bound: str, value: float, said: str
) -> None:
    for number in range(20):
        (tmp_path / f"{number}.tar").touch()
    monkeypatch.setattr(wildcards, bound, value)
    with pytest.raises(DataError, match=said) as caught:
        files.expand(f"{tmp_path}/**", "here")
    assert f"{tmp_path}/**" in str(caught.value) and "write more of the path" in str(caught.value)


@pytest.fixture
def deep(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder in a folder, a thousand times: its path is longer than any that can be opened."""
    here = os.open(tmp_path, os.O_RDONLY)
    try:
        for _ in range(1000):
            os.mkdir("deep", dir_fd=here)
            there = os.open("deep", os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = there
    finally:
        os.close(here)
    yield tmp_path
    subprocess.run(["rm", "-rf", tmp_path / "deep"], check=True)  # Python's own removal is too deep for its stack


def test_a_folder_a_thousand_deep_is_walked(deep: pathlib.Path) -> None:
    (deep / "deep" / "deep" / "1.tar").touch()
    (deep / "deep" / "1.jpg").touch()
    assert len(files.expand(f"{deep}/**/*.tar", "here")) == 1
    assert pictures.find([os.fspath(deep)]) == [f"{deep}/deep/1.jpg"]


def test_a_wildcard_does_not_lead_into_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    assert not [path for path in wildcards.matching_files("/*/self/*") if path.startswith("/proc/")]
    assert time.monotonic() - began < 20


def test_a_store_that_does_not_answer_is_asked_again_and_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Store:
        asked = 0

        def info(self, path: str) -> dict[str, int]:
            self.asked += 1
            if self.asked < 2:
                time.sleep(5)
            return {"size": 3}

    monkeypatch.setitem(patience._ASKED, "info", 0.1)
    monkeypatch.setattr(patience, "WAITS", (0.0,))
    system = patience.Patient(Store(), "gs://bucket/a.tar")
    assert system.info("a.tar") == {"size": 3}
    Store.asked = -10
    with pytest.raises(DataError, match=r"gs://bucket/a\.tar did not answer for 0 s"):
        patience.Patient(Store(), "gs://bucket/a.tar").info("a.tar")
