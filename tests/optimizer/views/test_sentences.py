"""What is said of a run: the verdict on the search, what was cut short, on which items a figure stands."""

from __future__ import annotations

import html
import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from evals.outcomes import OUTCOME_COLUMNS, Outcome
from optimizer.run import Run, open_run
from optimizer.runs.comparison import NOBODY
from optimizer.runs.families import PREPARED
from optimizer.runs.run_folder import RunFolder
from optimizer.runs.trial import TrialKind
from optimizer.views.report import report_html
from optimizer.views.sentences import MEANINGS, meanings, what_prepared_points_add, what_search_gains
from optimizer.views.tables import front_document, print_front, status_document
from tests.toy_run import toy_run

pytestmark = pytest.mark.slow  # whole studies are run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return open_run(toy_run(tmp_path_factory.mktemp("runs") / "toy", trials=12))


NOT_BETTER = "The search found no better one."


def test_where_no_line_keeps_to_a_limit_it_says_so_and_compares_with_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = run.does_search_pay()
    rows.loc[0, ["line_trial", "line_kind", "line_domain", "line_forgetting", "difference", "low", "high"]] = [
        NOBODY,
        "",
    ] + [math.nan] * 5
    monkeypatch.setattr(run, "does_search_pay", lambda: rows)
    first = what_search_gains(run)[0]
    assert first.startswith("To forget at most 10 %: no point of the lines, which need no search, is sure to; trial 9")
    assert "points" not in first


@pytest.mark.parametrize(
    ("difference", "end"),
    [
        ((0.12, 0.05, 0.19), "; 12 points more [5, 19], so here the search pays (on items the search never saw)."),
        (
            (-0.12, -0.19, -0.05),
            "; 12 points less [5, 19], so take the line's instead (on items the search never saw).",
        ),
        ((0.01, -0.04, 0.06), "; +1 points [-4, +6], which does not show that the search pays (on items the search"),
    ],
)
def test_what_search_gains_is_said_as_surely_as_it_is_known(
    run: Run, monkeypatch: pytest.MonkeyPatch, difference: tuple[float, float, float], end: str
) -> None:
    rows = run.does_search_pay().head(1)
    rows.loc[:, ["difference", "low", "high"]] = difference
    monkeypatch.setattr(run, "does_search_pay", lambda: rows)
    (said,) = what_search_gains(run)
    assert said.startswith(
        "To forget at most 10 %: trial 9 (search) keeps 48 % of the gain, the best of the lines, trial 2"
    )
    assert end in said


def test_limits_that_choose_the_same_points_are_one_sentence(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run.does_search_pay().head(1)
    both = pd.concat([first, first.assign(limit=0.2)], ignore_index=True)
    monkeypatch.setattr(run, "does_search_pay", lambda: both)
    (said,) = what_search_gains(run)
    assert said.startswith("To forget at most 10 % or 20 %: ")


def test_a_run_without_holdout_scores_says_so(tmp_path: Path) -> None:
    run = open_run(toy_run(tmp_path / "toy", trials=12, holdout=False))
    assert run.points()["holdout_domain"].isna().all()
    assert "items the search used" in run.summary()
    assert set(run.does_search_pay()["suite"]) <= {"search"}


def test_a_knee_that_needs_no_search_is_said_to_need_none(tmp_path: Path) -> None:
    run = open_run(toy_run(tmp_path / "toy", trials=0))
    assert run.does_search_pay().empty
    assert run.verdict() == [f"The knee needs no search: it is {run.points()['kind'][run.knee()]}. {NOT_BETTER}"]


def made_run(folder: Path, **settings: Any) -> Run:
    return open_run(toy_run(folder / "toy", **{"trials": 12, **settings}))


def test_a_learned_knee_is_said_to_be_one_and_what_it_adds(tmp_path: Path) -> None:
    run = made_run(tmp_path, derived=("regmean 0.2",), learned=(0.4, 0.6))
    said, *gains, added = run.verdict()
    assert len(gains) == 2
    assert said == f"The knee is learned ({run.kinds[run.knee()].stored.split()[1]}): no searched point is better."
    rows = run.what_pays().set_index("set")
    more, low, high = (100 * rows.loc["all", name] for name in ("share", "low", "high"))
    assert low > 0
    assert added == (
        f"Derived and learned points add {more:.0f} % [{low:.0f}, {high:.0f}] to the hypervolume of anchors and "
        "searched points, on holdout items."
    )
    shown = io.StringIO()
    print_front(run, Console(file=shown, width=400))
    for sentence in (said, *gains, added, *(MEANINGS[role] for role in PREPARED)):
        assert shown.getvalue().count(sentence) == 1
        assert html.escape(sentence) in report_html(run)


def test_a_derived_knee_of_a_run_without_search_beats_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made_run(tmp_path, trials=0, derived=("regmean 0.2",))
    kinds = run.points()["kind"]
    monkeypatch.setattr(run, "knee", lambda: int(kinds.index[kinds == "derived regmean 0.2"][0]))
    said, *_, added = run.verdict()
    assert said == "The knee is derived (regmean 0.2)."
    assert "the hypervolume of the anchors" in added


@pytest.mark.parametrize(
    ("share", "end"),
    [
        ((0.12, 0.05, 0.19), "Learned points add 12 % [5, 19] to the hypervolume of anchors and searched points, on "),
        ((0.03, -0.01, 0.08), "by 3.0 % [-1.0, 8.0], on holdout items: that does not show a gain."),
        ((-0.03, -0.05, -0.01), "by -3.0 % [-5.0, -1.0], on holdout items: that is a loss."),
        ((math.nan, math.nan, math.nan), None),
    ],
)
def test_what_learned_points_add_is_said_as_surely_as_it_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: tuple[float, float, float], end: str | None
) -> None:
    run = made_run(tmp_path, learned=(0.6,))
    rows = run.what_pays()
    rows.loc[rows["set"] == "all", ["share", "low", "high"]] = share
    monkeypatch.setattr(run, "what_pays", lambda: rows)
    added = what_prepared_points_add(run)
    assert not added if end is None else end in added[0]


def test_what_lies_between_two_trials_is_explained() -> None:
    assert meanings([TrialKind("between 9 and 14"), TrialKind("search")]) == [
        "between: the mean of two trials' weights."
    ]


def test_kinds_that_no_reader_knows_are_explained_only_where_they_are(run: Run) -> None:
    sink = io.StringIO()
    print_front(run, Console(file=sink, width=200))
    assert not any(sentence in sink.getvalue() + report_html(run) for sentence in MEANINGS.values())
    assert what_prepared_points_add(run) == []


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
