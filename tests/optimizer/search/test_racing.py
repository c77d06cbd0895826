"""Races: who stops, who gets more items, and that a killed driver scores no block twice."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from optuna.trial import TrialState

from optimizer.run import open_run
from optimizer.search.ledger import Ledger
from optimizer.search.racing import Verdict, verdict
from optimizer.views.sentences import verdict as verdict_of_run
from optimizer.workers.pool import Only, SerialPool
from optimizer.workers.worker import Evaluation
from search_spaces.recipe import Recipe
from tests.optimizer.fakes import ITEMS, Bench, FakeWorker, is_anchor

pytestmark = pytest.mark.slow  # whole studies are run

DRAWN = 12  # of twenty: a second block is the rest


def points_around(*points: tuple[float, float], error: float) -> tuple[np.ndarray, np.ndarray]:
    """Points, and resamplings of them with the same independent error each."""
    known = np.array(points)
    return known + np.random.default_rng(0).normal(0, error, (400, *known.shape)), known


@pytest.mark.parametrize(
    ("candidate", "error", "is_used_up", "expected"),
    [
        ((0.9, 0.9), 0.05, False, Verdict.STOPS),
        ((0.9, 0.9), 0.05, True, Verdict.STOPS),
        ((0.55, 0.55), 0.2, False, Verdict.GOES_ON),  # beaten perhaps
        ((0.45, 0.5), 0.2, False, Verdict.GOES_ON),  # not beaten, and not known well
        ((0.45, 0.5), 0.2, True, Verdict.ENDS),
        ((0.1, 0.1), 0.02, False, Verdict.ENDS),  # far from all others
    ],
)
def test_a_verdict(candidate: tuple[float, float], error: float, is_used_up: bool, expected: Verdict) -> None:
    samples, points = points_around((0.0, 1.0), (0.5, 0.5), (1.0, 0.0), candidate, error=error)
    assert verdict(samples, points, is_used_up=is_used_up) is expected


@dataclass
class Noisy(FakeWorker):
    """Scores items of searched recipes with an error of their own, and counts how often each was scored."""

    asked: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    dies_at: int = 0  # the continued job during which the driver is killed

    def evaluate(self, recipe: str, suite: str, only: Only | None = None) -> Evaluation:
        known = Recipe.from_json(recipe)
        if only and any(0 < len(items) < DRAWN for items in only.values()):
            self.dies_at -= 1
            if not self.dies_at:
                raise Killed
        exact = super().evaluate(recipe, suite, only)
        luck = np.random.default_rng(int(known.digest, 16))
        noise = {f"{i:016x}": value for i, value in enumerate(luck.normal(0, 0.0 if is_anchor(known) else 0.15, ITEMS))}
        rows = tuple(replace(row, value=row.value + noise[row.item]) for row in exact.outcomes)
        self.asked.update((known.digest, row.task, row.item) for row in rows if suite == "search")
        return replace(exact, outcomes=rows)


class Killed(BaseException):
    """Ends a driver where it stands."""


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "toy", drawn=DRAWN)


def assert_raced(bench: Bench, worker: Noisy) -> None:
    run = open_run(bench.folder)
    rows = run.outcomes("search")
    searched = {number for number, kind in run.kinds.items() if not kind.is_anchor}
    counts = rows[rows["trial"].isin(searched)].groupby(["trial", "task"]).size()
    assert set(counts) == {DRAWN, ITEMS}  # some went on
    assert run.stopped
    assert run.stopped <= searched
    assert not run.stopped & set(run.front().index)
    whole = counts[counts == ITEMS].index.get_level_values("trial")
    assert (rows.loc[rows["trial"].isin(whole), "inclusion"] == 1).all()
    assert not run.lost_outcomes("search")
    assert max(worker.asked.values()) == 1  # nothing is scored twice
    assert run.trials()["state"].eq("complete").all()
    assert run.points()[["domain", "forgetting"]].notna().all(axis=None)


def test_the_beaten_stop_and_others_get_the_rest_of_the_bank(bench: Bench) -> None:
    worker = Noisy()
    bench.search(trials=26, racing=True, pool=SerialPool(lambda: worker))
    assert_raced(bench, worker)
    told = [event for event in bench.events if event.kind == "trial"]
    assert len(told) == 26
    run = open_run(bench.folder)
    assert {event.trial for event in told if "stopped" in event.text} == run.stopped
    (said,) = (line for line in verdict_of_run(run) if "bank" in line)
    rows = run.outcomes("search")
    share = rows[rows["trial"] >= 8].groupby("trial").size().mean() / (2 * ITEMS)
    assert said.startswith(f"Searched trials were scored on {100 * share:.0f} % of the bank's items")
    assert f"a race stopped {len(run.stopped)} of the 18" in said


@pytest.mark.parametrize("continued", [1, 2])
def test_a_killed_driver_goes_on_with_the_block_that_was_next(bench: Bench, continued: int) -> None:
    worker = Noisy(dies_at=continued)
    with pytest.raises(Killed):
        bench.search(trials=26, racing=True, pool=SerialPool(lambda: worker))
    left = [t for t in bench.run.storage().get_all_trials(1) if t.state == TrialState.RUNNING]
    assert len(left) == 1
    bench.search(trials=26, racing=True, pool=SerialPool(lambda: worker))
    assert_raced(bench, worker)
    assert len(open_run(bench.folder).points()) == 26


def test_without_racing_none_stops(bench: Bench) -> None:
    bench.search(trials=14)
    run = open_run(bench.folder)
    assert not run.stopped
    assert "stopped" not in bench.run.storage().get_all_trials(1)[-1].user_attrs


def test_a_trial_that_was_stopped_is_never_on_the_front() -> None:
    told, watch = {0: (0.0, 0.0), 4: (0.5, 0.1), 5: (0.9, 0.1)}, SimpleNamespace(is_needed=False)
    ledger = SimpleNamespace(values=told, stopped={5}, _front=None, _watch=watch)
    assert Ledger.front(ledger) == {0, 4}
