"""What is said of a run: the verdict on the search, what was cut short, on which items a figure stands."""

from __future__ import annotations

import html
import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from evals.outcomes import OUTCOME_COLUMNS, Outcome
from optimizer.run import Run, open_run
from optimizer.runs.run_folder import RunFolder
from optimizer.views.report import report_html
from optimizer.views.sentences import gap_sentence
from optimizer.views.tables import front_document, print_front, status_document
from tests.toy_run import toy_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return open_run(toy_run(tmp_path_factory.mktemp("runs") / "toy", trials=12))


NOT_BETTER = "The search found no better one."


def test_a_trial_that_forgets_less_than_any_line_is_held_against_its_least(run: Run) -> None:
    gap = run.does_search_pay().iloc[0].to_dict() | {"forgetting": -0.01, "line_forgetting": 0.0, "line_domain": 0.0}
    sentence = (
        "No point with one weight for all layers forgets so little; the nearest, at 0.0 %, keeps 0.0 % of the gain"
    )
    assert gap_sentence(gap).startswith(sentence)


def test_a_run_without_holdout_scores_says_so(tmp_path: Path) -> None:
    run = open_run(toy_run(tmp_path / "toy", trials=12, holdout=False))
    assert run.points()["holdout_domain"].isna().all()
    assert "items the search used" in run.summary()
    assert set(run.does_search_pay()["suite"]) <= {"search"}


def test_a_knee_that_needs_no_search_is_said_to_need_none(tmp_path: Path) -> None:
    run = open_run(toy_run(tmp_path / "toy", trials=0))
    assert run.does_search_pay().empty
    assert run.verdict() == [f"The knee needs no search: it is {run.points()['kind'][run.knee()]}. {NOT_BETTER}"]


def test_what_was_cut_short_is_said_wherever_the_run_is_shown(tmp_path: Path) -> None:
    assert open_run(toy_run(tmp_path / "whole", trials=12)).cut_short() == []
    path = toy_run(tmp_path / "toy", trials=12)
    folder, stored = RunFolder(path), open_run(path)
    for suite in ("search", "holdout"):
        for trial in filter(lambda number: folder.has_outcomes(number, suite), stored.points().index):
            frame = folder.read_outcomes(trial, suite)
            rows = [Outcome(*row) for row in frame[list(OUTCOME_COLUMNS)].itertuples(index=False)]
            first = next(i for i, row in enumerate(rows) if row.task == "science")
            rows[first] = replace(rows[first], truncated=True)
            rows[first + 1] = replace(rows[first + 1], lengths=(64,), broken_off=True)
            folder.write_outcomes(trial, suite, stored.recipe(trial).digest, rows)
    run = open_run(path)
    long, broken = run.cut_short()
    assert long.startswith("task science: 2 of 400 items were longer than the model's context")
    assert "broken off at the limit of 64 tokens" in broken
    assert {long, broken} <= set(run.findings())
    assert {long, broken} <= set(status_document(run)["findings"]) & set(front_document(run)["findings"])
    assert html.escape(long) in report_html(run)
    sink = io.StringIO()
    print_front(run, Console(file=sink, width=400))
    shown = sink.getvalue()
    assert long in shown
    assert broken in shown
