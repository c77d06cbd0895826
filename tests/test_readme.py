"""What the README shows works as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from optimizer.cli import app
from optimizer.run import Run
from optimizer.study.study_file import read_study

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_its_study_file_is_one(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)[0])
    study = read_study(tmp_path / "study.yaml")
    assert study.name == "medical"
    assert study.evals.domain[1].items == 60


@pytest.mark.parametrize("line", re.findall(r"^    mergefront (.+?)(?: #.*)?$", README, re.MULTILINE))
def test_its_commands_and_options_exist(line: str) -> None:
    command, *words = line.split()
    told = CliRunner().invoke(app, [command, "--help"])
    assert told.exit_code == 0
    for word in words:
        assert not word.startswith("--") or word in told.output


def test_its_python_is_the_interface() -> None:
    called = re.findall(r"run\.(\w+)\(", README)
    assert {"front", "weights", "knee", "best", "plot_front"} <= set(called)
    assert all(hasattr(Run, name) for name in called)


def test_its_links_lead_somewhere() -> None:
    root = Path(__file__).parents[1]
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links
    assert not [link for link in links if not (root / link).exists()]
