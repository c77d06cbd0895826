"""The benchmark of the driver is a search like any other, so that it runs on today's code."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks.driver import search


@pytest.mark.parametrize("bank", [False, True])
def test_it_searches_to_its_budget(tmp_path: Path, bank: bool) -> None:
    heard = search(tmp_path / "run", Namespace(dimensions=4, sampler="random", bank=bank, racing=bank), trials=12)
    assert [kind for kind, _ in heard].count("trial") == 12
    assert heard[-1][0] == "done"
