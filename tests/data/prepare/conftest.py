"""Fixtures of the tests of coca_jax.data.prepare."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.prepare import sets


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Specification of sets.mixed_records()."""
    return sets.write_mixed(tmp_path_factory.mktemp("mixed"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("COCA_JAX_CACHE", str(folder))
    return folder
