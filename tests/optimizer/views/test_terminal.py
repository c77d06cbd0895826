"""No name, of a model, a task, a file or a failure, reaches the terminal as anything but text."""

from __future__ import annotations

import ast
import io
import json
import re
import unicodedata
from pathlib import Path

import optuna
import pytest
from typer.testing import CliRunner

import optimizer
from optimizer.cli import app
from optimizer.export.card import model_card
from optimizer.merging.merge import Sources
from optimizer.runs.run_folder import RunFolder
from optimizer.search.events import Event
from optimizer.views.plain_table import table
from optimizer.views.progress import Progress
from optimizer.views.terminal import Terminal
from optimizer.words import printable
from search_spaces import Recipe
from tests.conftest import ROOT
from tests.optimizer.small_study import write_study
from tests.pico import pico_expert, pico_llama
from tests.toy_run import toy_run

# A window title (OSC), a cleared screen (CSI, and its one-byte form), a line turned around, a line of its own.
HOSTILE = "evil\x1b]0;owned\x07\x1b[2J\x9b2J\u202etxt\u2066\x7f\r\n\x08error: none"
LEGAL = {"\n"}


def controls(text: str) -> set[str]:
    """Characters that a terminal obeys or that turn text around."""
    return {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp")} - LEGAL


def said(*words: str | Path, code: int | None = 0) -> str:
    """What a command writes, on both streams, to a terminal with colours."""
    result = CliRunner(env={"COLUMNS": "100", "CI": "1"}).invoke(app, [str(word) for word in words], color=True)
    assert code is None or result.exit_code == code, (result.output, result.exception)
    text = result.stdout_bytes.decode() + result.stderr_bytes.decode()
    assert not controls(text), (words, sorted(map(ascii, controls(text))))
    return text


def test_text_that_can_be_read_stays_and_the_rest_is_written_out() -> None:
    assert printable("naïve 模型 → 50 %\nline") == "naïve 模型 → 50 %\nline"
    assert printable("\x1b[1m\x9b\u202e\x00\ud800") == "\\x1b[1m\\x9b\\u202e\\x00\\ud800"
    assert printable(printable(HOSTILE)) == printable(HOSTILE)
    assert not controls(printable(HOSTILE))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose folder, tasks and failures have hostile names, as a stranger may hand it over."""
    path = toy_run(tmp_path_factory.mktemp("run") / HOSTILE, trials=4)
    manifest = json.loads((path / "tasks.json").read_text())
    for task in manifest["tasks"]:
        task["metric"] += HOSTILE
    (path / "tasks.json").write_text(json.dumps(manifest))
    study = optuna.load_study(study_name=None, storage=RunFolder(path).storage())
    recipe = study.trials[2].user_attrs["recipe"]
    for values, kind, reason in (([0.1, 0.1], HOSTILE, ""), (None, "search", HOSTILE)):
        state = optuna.trial.TrialState.COMPLETE if values else optuna.trial.TrialState.FAIL
        attributes = {"recipe": recipe, "kind": kind, "reason": reason}
        study.add_trial(optuna.trial.create_trial(state=state, values=values, user_attrs=attributes))
    return path


@pytest.mark.slow
def test_readers_of_a_run_print_names_as_text(run: Path) -> None:
    assert "evil\\x1b]0;owned" in said("status", run)
    assert "\\u202e" in said("front", run)
    assert "acc" in said("show", run, "1")
    assert "no trial 99" in said("show", run, "99", code=2)
    for command in ("status", "front"):
        assert json.loads(said(command, run, "--json"))["run"] == run.name
    assert "wrote" in said("report", run)
    assert "models" in said("export", run, "--knee", code=2)  # the toy's checkpoints are not there
    said("export", run, "--trial", "99", code=2)


def test_a_failed_trial_says_why_as_text(run: Path) -> None:
    numbers = [trial.number for trial in optuna.load_study(study_name=None, storage=RunFolder(run).storage()).trials]
    assert "owned" in said("show", run, str(numbers[-1]))


@pytest.mark.slow
def test_check_search_and_export_print_names_as_text(tmp_path: Path) -> None:
    folder = tmp_path / HOSTILE
    folder.mkdir()
    study = write_study(folder, trials=5)
    for name in ("skill", "manners"):
        file = folder / name / f"{name}.yaml"
        evil = json.dumps(name + HOSTILE)  # in double quotes YAML reads it as JSON does
        file.write_text(file.read_text().replace(f"task: {name}\n", f"task: {evil}\n"))
    assert "base" in said("check", study)
    assert "5/5 trial 4" in said("search", study)
    run = folder / "runs/small"
    assert not controls((run / "log.txt").read_text())
    said("front", run)
    said("show", run, "1")
    assert "wrote" in said("export", run, "--trial", "1", "--out", folder / "out")
    assert "models.base" in said("check", study, "--set", f"models.base={json.dumps(HOSTILE)}", code=2)
    assert "evil" in said("init", "base", "expert", "--out", study, code=2)


def test_a_live_bar_and_a_styled_table_hold_only_rich_s_own_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    sink = io.StringIO()
    console = Terminal(file=sink, force_terminal=True, width=60)
    with Progress(console) as progress:
        progress(Event("trial", 0, "", 1, 4, (0.0, 0.0), HOSTILE))
        progress(Event("failed", 1, HOSTILE, 2, 4, None, HOSTILE))
        progress(Event("note", None, HOSTILE, 2, 4))
    console.print(table(HOSTILE, ["a", HOSTILE], [[HOSTILE, "b"]]))
    text = re.sub(r"\x1b\[[0-9;]*[mAK]|\x1b\[\?25[lh]|\r", "", sink.getvalue())
    assert not controls(text)
    assert text.count("evil") >= 6


def test_a_table_of_hostile_names_keeps_its_columns_apart() -> None:
    sink = io.StringIO()
    Terminal(file=sink, width=200).print(table("t", ["name", "n"], [["\x1b[2J", "1"], ["\\x1b[2J", "1"]], right=["n"]))
    first, second = sink.getvalue().splitlines()[-3:-1]
    assert first == second


def test_a_card_holds_no_control_character(tmp_path: Path) -> None:
    base = pico_llama(tmp_path / "base")
    expert = pico_expert(base, tmp_path / "expert")
    recipe = Recipe("linear", str(base), (("a", str(expert)),), ())
    scores = {f"task{HOSTILE}": {HOSTILE: 1.0}}
    card = model_card(recipe, Sources.open(str(base), {"a": str(expert)}), title=HOSTILE, scores=scores, card="")
    assert not controls(card)


def test_only_one_module_writes_to_a_terminal() -> None:
    folder = Path(optimizer.__file__).parent
    for file in sorted(
        {*folder.rglob("*.py"), *(ROOT / "evals").rglob("*.py"), *(ROOT / "search_spaces").rglob("*.py")}
    ):
        if file.name in ("terminal.py", "ray_probe.py"):  # the probe's stdout is a pipe to its parent, and holds JSON
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert called not in ("print", "typer.echo", "typer.secho", "Console", "rich.print"), f"{file}: {called}"
            assert not called.startswith(("sys.stdout.write", "sys.stderr.write")), f"{file}: {called}"
