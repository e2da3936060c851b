"""Tests here import PyTorch, and are looked at only where they are asked for: `pytest -m peers`."""

from __future__ import annotations

import pytest

from benchmarks import peers


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    if "peers" not in config.option.markexpr.replace("not peers", ""):
        return True
    peers.torchvision()
    return None
