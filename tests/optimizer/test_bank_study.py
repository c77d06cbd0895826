"""A whole study with a bank, by real workers: what `check` says, what is scored, and what is shown."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import bank
from optimizer.errors import RunError, StudyFileError
from optimizer.run import Run
from optimizer.run_study import run_study
from optimizer.search.cost import cost_of
from optimizer.search.plan import count_tokens, make_plan
from optimizer.study.study_file import read_study
from optimizer.views.plan import print_plan
from tests.optimizer.small_study import write_study, write_task

pytestmark = pytest.mark.slow  # whole studies are run

ITEMS, BANK = 12, 16  # of twenty, four of which are holdout items


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_study(tmp_path_factory.mktemp("study"), items=ITEMS, trials=10)
    text = path.read_text().replace(f"holdout_items: {ITEMS}", "holdout_items: 4")
    text = re.sub(r"certify_items: \S+", "certify_items: 0", text)
    path.write_text(text.replace(f"  items: {ITEMS}", f"  bank: 500\n  items: {ITEMS}"))
    return path


@pytest.fixture(scope="module")
def run(path: Path) -> Run:
    return run_study(path, [], Console(file=io.StringIO()))


def test_check_says_how_many_of_how_many(path: Path) -> None:
    plan, plain = (make_plan(read_study(path, extra)) for extra in ([], ["evals.bank=null"]))
    for made in (plan, plain):
        count_tokens(made)
    console = Console(width=120, record=True, file=io.StringIO())
    print_plan(plan, console)
    assert f"{ITEMS} of {BANK}" in console.export_text()
    assert plan.problems == []
    cost, without = cost_of(plan), cost_of(plain)
    assert cost is not None
    assert without is not None
    assert cost.tokens["search"] == pytest.approx(without.tokens["search"], rel=0.1)
    assert cost.hours > without.hours


def test_searched_trials_are_estimated_from_what_was_drawn(run: Run) -> None:
    counts = run.outcomes("search").groupby(["trial", "task"]).size()
    for (trial, _), count in counts.items():
        assert count == (BANK if run.kinds[trial].is_anchor else ITEMS)
    points = run.points()
    assert len(points) == 10
    assert points[["domain", "forgetting", "domain_stderr"]].notna().all(axis=None)


def test_a_study_takes_up_no_run_of_another_bank(path: Path, run: Run) -> None:
    with pytest.raises(RunError, match=r"task skill: drawn items: 12 -> \(absent\)"):
        run_study(path, ["evals.bank=null"], Console(file=io.StringIO()))


def test_a_manifest_without_a_bank_is_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    folder.mkdir()
    run = run_study(write_study(folder, trials=2), [], Console(file=io.StringIO()))
    assert all("drawn_items" not in task for task in json.loads((run.path / "tasks.json").read_text())["tasks"])


def test_a_bank_no_larger_than_the_draw_is_refused(path: Path) -> None:
    with pytest.raises(
        StudyFileError, match=r"evals\.bank.*must be more than the items .*given 12, and 12 items"
    ) as told:
        read_study(path, ["evals.bank=12"])
    assert str(told.value).count("must be more than") == 1  # of two tasks


def test_a_task_too_small_for_a_bank_is_said(path: Path) -> None:
    write_task(path.parent, "few", items=16)
    plan = make_plan(read_study(path, ["evals.general=[./few/few.yaml]"]))
    assert plan.harness is not None
    assert any("few has no bank" in note for note in plan.harness.notes)


def test_knee_and_limit_go_by_estimate_and_error(run: Run) -> None:
    front = run.front()
    assert run.knee() in front.index
    assert front["front_chance"].between(0, 1).all()
    assert (run.points()["front_chance"] > 0).any()
    limit = float(front["forgetting"].max()) + 0.01
    chosen = run.best(limit)
    assert run.within(limit, "search")[chosen] >= 0.9


def test_the_banks_benchmark_reads_trials_that_answered_every_item(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank, "LEAST_ITEMS", 4)
    cases = bank.recorded_cases(run)
    assert cases.keys() == {task.name for task in run.tasks}
    for case in cases.values():
        assert len(case.values) in (4, BANK, BANK + 4)
        assert case.anchors.shape[1] > 2
        assert case.values.shape[1] > 0
    with pytest.raises(SystemExit, match=r"without evals\.bank"):
        bank.Races(run, 4)
