"""What is kept in the repository."""

from __future__ import annotations

import pathlib
import subprocess

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
LIMIT = 2_000_000  # bytes; a clone is for reading


def test_no_file_is_large() -> None:
    if not (REPOSITORY / ".git").exists():
        pytest.skip("NOT RUN: this is no clone, and nobody can say which files belong to it")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, check=True, text=True)
    files = [REPOSITORY / name for name in listed.stdout.split("\0") if name]
    assert len(files) > 100
    large = [str(file) for file in files if file.is_file() and file.stat().st_size > LIMIT]
    assert not large
