"""A pico base and its expert, new for each test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pico import pico_expert, pico_llama


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return pico_llama(tmp_path / "base")


@pytest.fixture
def expert(base: Path, tmp_path: Path) -> Path:
    return pico_expert(base, tmp_path / "expert")
