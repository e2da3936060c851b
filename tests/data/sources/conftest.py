"""Shared by the tests of sources."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.sources import tfds_sets


@pytest.fixture(scope="session")
def tfds_folder(tmp_path_factory: pytest.TempPathFactory, run_python) -> Path:
    """A folder with the sets of tfds_sets, which a process of its own prepares."""
    path = tmp_path_factory.mktemp("tfds")
    run_python(tfds_sets.build, devices=1, env={"TFDS_FOLDER": str(path)})
    return path
