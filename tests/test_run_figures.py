"""The benchmark of a run's figures runs, and its name hides none of Python's own modules from its neighbours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

SCRIPT = ROOT / "benchmarks" / "statistics.py"


@pytest.mark.slow  # a whole study is written
def test_it_reads_what_it_wrote(tmp_path: Path) -> None:
    words = [sys.executable, str(SCRIPT), "--trials", "14", "--items", "120", "--run", str(tmp_path)]
    told = subprocess.run([*words, "--json", str(tmp_path / "out.json")], capture_output=True, text=True, check=False)
    assert told.returncode in (0, 1), told.stderr  # 1: this machine is busy
    assert told.stdout.startswith("14 trials, 120 items\n\n| step | seconds |")
    document = json.loads((tmp_path / "out.json").read_text())
    assert [row["step"] for row in document["steps"]][-1] == "all"
    assert 0 < document["steps"][-1]["peak_gb"] < 1
    assert document["steps"][-1]["seconds"] >= max(row["seconds"] for row in document["steps"])


def test_a_neighbour_gets_pythons_own_statistics() -> None:
    code = f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import statistics; print(statistics.fmean([1, 2]))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1.5\n"
