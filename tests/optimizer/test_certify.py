"""A certificate of a small study: planned before it looks, taken up where it was killed, counted, and on the card."""

from __future__ import annotations

import html
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from evals.certificates import Hypothesis, Start, play
from evals.outcomes import CERTIFY
from optimizer.certify import certify_run
from optimizer.cli import app
from optimizer.errors import DamagedError, RunError
from optimizer.export.commands import export_trial
from optimizer.run import open_run
from optimizer.run_study import run_study, worker_spec
from optimizer.runs.certificates import Question
from optimizer.runs.outcome_files import outcomes_path, read_outcomes
from optimizer.search.certifier import CERTIFIED, HOPELESS, OPEN, USED_UP, Examined, Proof, hypothesis_of
from optimizer.study.schema import Study
from optimizer.views.report import report_html
from optimizer.views.tables import print_front
from optimizer.workers.worker import Evaluation, Worker
from tests.optimizer.small_study import write_study, write_task
from tests.toy_run import toy_run

pytestmark = pytest.mark.slow  # whole studies are run

LOOSE = Question(0.04, None, False, 0.1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with 40 certify items of each task."""
    folder = tmp_path_factory.mktemp("study")
    study = write_study(folder, items=8, trials=8)
    for name in ("skill", "manners"):
        shutil.rmtree(folder / name)
        write_task(folder, name, items=60)
    run_study(study, ["evals.certify_items=40"], Console(file=(folder / "shown").open("w")))
    return folder / "runs" / "small"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """The run in a folder of its own; its models and tasks stay where they are."""
    return shutil.copytree(finished, tmp_path / "small")


class Watched:
    """A real worker that notes what it is asked, and what was on the disk by then."""

    def __init__(self, study: Study, run: Path, asked: list[tuple[str, dict[str, list[str]]]]) -> None:
        self._worker, self._run, self._asked = Worker(worker_spec(study)), run, asked

    def evaluate(self, recipe: str, suite: str, only: Mapping[str, Sequence[str]] | None = None) -> Evaluation:
        assert only is not None
        assert list(self._run.glob("certificates/*/ledger.json"))
        self._asked.append((suite, {task: list(items) for task, items in only.items()}))
        return self._worker.evaluate(recipe, suite, only)


def certified(run: Path, question: Question = LOOSE, asked: list[Any] | None = None) -> Mapping[str, Any]:
    notes: list[Any] = [] if asked is None else asked
    return certify_run(run, question, say=lambda _: None, make_scorer=lambda study: Watched(study, run, notes))


def test_it_is_planned_before_it_looks_and_looks_at_nothing_else(run: Path) -> None:
    asked: list[tuple[str, dict[str, list[str]]]] = []
    certificate = certified(run, asked=asked)
    ledger = json.loads((run / "certificates/0001/ledger.json").read_text())
    assert certificate["ledger"] == ledger
    items = ledger["items"]["manners"]
    assert len(items) == 40
    stored = json.loads((run / "tasks.json").read_text())["fingerprint"]["items"]
    assert not {*items} & {*stored["search"]["manners"], *stored["holdout"]["manners"]}
    assert {suite for suite, _ in asked} == {CERTIFY}
    assert {task for _, only in asked for task in only} == {"manners"}
    assert {item for _, only in asked for item in only["manners"]} == {
        *items[: certificate["spent"]["manners"]["used"]]
    }
    sure = [candidate["sure"] for candidate in ledger["candidates"]]
    assert sure == sorted(sure, reverse=True)
    assert certificate["trial"] is not None
    assert certificate["sentence"].startswith(
        f"Recipe {certificate['digest'][:6]} (trial {certificate['trial']}) forgets"
    )


def test_it_can_be_checked_by_hand(run: Path) -> None:
    certificate = certified(run)
    candidates = {candidate["trial"]: candidate for candidate in certificate["ledger"]["candidates"]}
    frames = {trial: read_outcomes(outcomes_path(run, trial, CERTIFY)).set_index("item") for trial in (0, *candidates)}
    for tested in certificate["tested"]:
        (test,) = tested["tests"]
        hypothesis = hypothesis_of(candidates[tested["trial"]]["hypotheses"][0])
        (part,) = hypothesis.parts
        items = certificate["ledger"]["items"]["manners"][: test["rounds"]]
        base, merge = (frames[trial].loc[items, "value"].to_numpy() for trial in (0, tested["trial"]))
        losses = (part.base * base + part.candidate * merge).clip(max=part.most)
        assert losses == pytest.approx(test["losses"])
        game = play(losses, most=hypothesis.most, start=hypothesis.start)
        assert game.capital[0] == pytest.approx(test["capital"])
        assert (test["capital"][-1] >= 10) == tested["certified"]


def test_asked_again_it_answers_from_what_is_there(run: Path) -> None:
    first = certified(run)
    asked: list[Any] = []
    assert certified(run, asked=asked) == first
    assert asked == []


def test_all_certificates_share_one_error(run: Path) -> None:
    first = certified(run)
    assert first["budget"] == {"all": 0.2, "left": pytest.approx(0.1)}
    second = certified(run, Question(0.03, None, False, 0.1))
    assert second["budget"]["left"] == pytest.approx(0.0)
    with pytest.raises(RunError, match=r"2 certificates took 20 %, .* is left, and 5\.0 % was asked for"):
        certified(run, Question(0.05, None, False, 0.05))
    assert not (run / "certificates/0003").exists()


def test_a_limit_too_tight_is_refused_with_what_it_would_take(run: Path) -> None:
    told = CliRunner().invoke(app, ["certify", str(run), "--max-forgetting", "0.04", "--delta", "0.000001"])
    assert told.exit_code == 3, told.output
    assert "None can be certified with 20 items: that a recipe forgets at most 4 % of general ability" in told.output
    needed = re.search(
        r"For trial \d, .*, about (\d+) would be needed\.\nSpent: 20 of 40 items of manners", told.output
    )
    assert needed is not None, told.output
    assert int(needed[1]) > 40  # so the rest of the items was saved
    told = CliRunner().invoke(app, ["certify", str(run), "--max-forgetting", "0.04", "--min-gain", "1", "--json"])
    assert json.loads(told.stdout)["budget"]["left"] == pytest.approx(0.1 - 0.000001)


def test_where_no_point_keeps_the_limit_nothing_is_spent(run: Path) -> None:
    run = toy_run(run / "toy", trials=6)
    told = CliRunner().invoke(app, ["certify", str(run), "--max-forgetting", "0.0000001"])
    assert told.exit_code == 3, told.output
    assert "none to certify, and nothing was spent" in told.output
    assert not (run / "certificates").exists()


def test_each_task_and_the_gain_are_hypotheses_of_their_own(run: Path) -> None:
    certificate = certified(run, Question(0.04, 0.2, True, 0.1))
    names = [test["name"] for test in certificate["tested"][0]["tests"]]
    assert names == ["forgetting of manners", "domain gain"]
    assert {*certificate["spent"]} == {"skill", "manners"}


@pytest.mark.parametrize("point", ["certify.before:3", "certify.after:4"])
def test_killed_it_ends_as_if_it_had_not_been(run: Path, tmp_path: Path, point: str) -> None:
    whole = certified(shutil.copytree(run, tmp_path / "whole" / "small"))
    words = ["certify", str(run), "--max-forgetting", "0.04"]
    code = f"from optimizer.cli import app; app({words!r})"
    died = subprocess.run([sys.executable, "-c", code], env={**os.environ, "MERGEFRONT_FAULT": point}, check=False)
    assert died.returncode == -signal.SIGKILL
    assert not (run / "certificates/0001/certificate.json").exists()
    ledger = (run / "certificates/0001/ledger.json").read_bytes()
    resumed = certified(run)
    assert (run / "certificates/0001/ledger.json").read_bytes() == ledger
    assert resumed["tested"] == whole["tested"]
    assert resumed["sentence"] == whole["sentence"]


def test_the_card_of_a_certified_recipe_says_so(run: Path, tmp_path: Path) -> None:
    certificate, opened = certified(run), open_run(run)
    other = next(int(trial) for trial in opened.points().index if trial != certificate["trial"])
    for trial in (certificate["trial"], other):
        folder = export_trial(opened, trial, tmp_path / f"model-{trial}", describe=opened.describe)
        said = f"Certified: {certificate['sentence']}" in (folder / "README.md").read_text()
        assert said == (trial == certificate["trial"])


def test_what_is_certified_is_said_wherever_the_run_is_shown(run: Path) -> None:
    assert open_run(run).certificates() == []
    sentence = certified(run)["sentence"]
    opened = open_run(run)
    assert opened.certificates() == [sentence]
    shown = io.StringIO()
    print_front(opened, Console(file=shown, width=400))
    assert shown.getvalue().count(sentence) == 1
    assert html.escape(sentence) in report_html(opened)


def test_a_ledger_that_cannot_be_read_stops_it(run: Path) -> None:
    certified(run)
    path = run / "certificates/0001/ledger.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(DamagedError, match="nobody knows which items are spent"):
        certified(run, Question(0.03, None, False, 0.05))


@pytest.mark.parametrize("key", ["question", "sentence", "trial", "spent", "budget", "tested"])
def test_a_certificate_that_was_changed_by_hand_is_no_answer(run: Path, key: str) -> None:
    certified(run)
    path = run / "certificates/0001/certificate.json"
    document = json.loads(path.read_text())
    for changed in (
        {**document, key: ["x"] if key == "spent" else {"x": []}},
        {k: document[k] for k in document if k != key},
    ):
        if key == "spent":
            changed = {**changed, "budget": {"all": 0.2}}
        path.write_text(json.dumps(changed))
        with pytest.raises(DamagedError, match=f"{path}.*restore the file"):
            certified(run)


def test_a_run_that_was_not_judged_has_nothing_to_certify(tmp_path: Path) -> None:
    early = toy_run(tmp_path / "toy", trials=4, holdout=False)
    told = CliRunner().invoke(app, ["certify", str(early), "--max-forgetting", "0.1"])
    assert told.exit_code == 3
    assert "no point of run toy is scored on holdout items yet" in told.output


def test_other_tasks_than_the_runs_are_refused(run: Path, finished: Path) -> None:
    data = finished.parent.parent / "manners" / "manners.jsonl"
    kept = data.read_text()
    data.write_text(kept.replace("number 7 ", "number seven "))
    try:
        with pytest.raises(RunError, match="what changed:\n  task manners: other"):
            certified(run)
    finally:
        data.write_text(kept)
    assert not (run / "certificates").exists()


@pytest.mark.parametrize(
    ("question", "rule"),
    [
        ((0.0, None, False, 0.1), "--max-forgetting"),
        ((0.1, 2.0, False, 0.1), "--min-gain"),
        ((0.1, None, False, 1.0), "--delta"),
    ],
)
def test_what_is_no_share_is_refused(question: tuple[Any, ...], rule: str) -> None:
    with pytest.raises(RunError, match=rule):
        Question(*question)


@pytest.mark.parametrize("other", [HOPELESS, OPEN, USED_UP])
def test_a_recipe_is_certified_only_where_all_that_was_asked_is_shown(other: str) -> None:
    def examined(*verdicts: str) -> Examined:
        asked = Hypothesis("forgetting", 0.05, (), Start(0.0, 0.0, 0.0))
        nothing = np.empty(0)
        return Examined(1, "d", tuple(Proof(asked, v, nothing, nothing, nothing, {}, 0) for v in verdicts))

    assert examined(CERTIFIED, CERTIFIED).is_certified
    assert not examined(CERTIFIED, other).is_certified
    assert not examined(other, CERTIFIED).is_certified
