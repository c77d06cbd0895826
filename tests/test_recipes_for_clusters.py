"""The recipes of docs/clusters.md were not run; that they can be read at all is looked at here."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from optimizer.cli import app

TEXT = (Path(__file__).parents[1] / "docs" / "clusters.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_job_of_kuberay_is_yaml_with_the_versions_that_are_tested() -> None:
    job = yaml.safe_load(block("yaml"))
    spec = job["spec"]["rayClusterSpec"]
    assert spec["rayVersion"] == version("ray")
    (workers,) = spec["workerGroupSpecs"]
    assert f"--workers {workers['replicas']} " in job["spec"]["entrypoint"]
    assert "**Neither recipe below was run**" in TEXT


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_the_job_of_slurm_is_bash() -> None:
    subprocess.run(["bash", "-n"], input=block("bash"), text=True, check=True)


def test_they_give_options_that_there_are() -> None:
    known = {option for command in app.registered_commands for option in _options(command.callback)}
    asked = set(re.findall(r"mergefront (?:search|check) [^`\n]*", TEXT))
    assert asked
    assert {word for line in asked for word in re.findall(r"(--[a-z-]+)", line)} <= known


def _options(command: object) -> set[str]:
    return {f"--{name.replace('_', '-')}" for name in getattr(command, "__annotations__", {})}
