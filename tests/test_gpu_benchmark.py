"""The GPU's benchmark, run small on the CPU with no more installed than a rented machine has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MISSING = (
    "numba", "llvmlite", "greenlet", "lm_eval", "datasets", "optuna", "pydantic", "ray", "pandas", "pyarrow", "plotly",
    "rich", "typer",
)  # fmt: skip
RUN = """\
import runpy, sys
sys.modules |= dict.fromkeys({missing})  # as if they were not installed
sys.argv = {argv}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_every_part_runs_with_torch_and_transformers_alone(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    argv = [str(ROOT / "benchmarks/gpu.py"), "--cpu", "--small", "--json", str(found), "--scratch", str(tmp_path)]
    command = [sys.executable, "-c", RUN.format(missing=MISSING, argv=argv)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads(found.read_text())
    assert set(parts) == {"machine", "methods", "agreement", "homes", "workers", "score", "ways", "learning"}
    assert all(row["largest_in_roundings"] <= 1 for row in parts["methods"])  # without numba, torch alone
    assert all(row["packs"] and row["repeats"] and row["tree"] < 2 * row["plain"] for row in parts["agreement"])
    assert parts["score"][0]["candidates_an_hour"] > 0
    assert parts["score"][1]["peer"].endswith("padded batches")
