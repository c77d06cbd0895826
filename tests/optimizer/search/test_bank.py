"""A search with a bank: anchors are scored on all items, others on what was drawn; driven by a fake worker."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

from optimizer.run import open_run
from optimizer.workers.pool import Job, Result, ScoreJob, SerialPool
from search_spaces.recipe import Recipe
from tests.optimizer.fakes import ITEMS, Bench, FakeWorker, mean_weight

pytestmark = pytest.mark.slow  # whole studies are run

DRAWN = 12


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "toy", drawn=DRAWN)


def test_anchors_are_scored_on_the_bank_and_others_on_the_same_drawn_items(bench: Bench) -> None:
    bench.search(trials=14)
    run = open_run(bench.folder)
    rows = run.outcomes("search")
    items = defaultdict(set)
    for (trial, task), group in rows.groupby(["trial", "task"]):
        items[run.kinds[trial].is_anchor, task].add(frozenset(group["item"]))
    assert {key: [len(found) for found in kept] for key, kept in items.items()} == {
        (True, "skill_clinical"): [ITEMS],
        (True, "general"): [ITEMS],
        (False, "skill_clinical"): [DRAWN],
        (False, "general"): [DRAWN],
    }
    drawn = rows[~rows["trial"].map(lambda n: run.kinds[n].is_anchor)]
    assert (drawn["inclusion"] < 1).all()
    assert run.outcomes("holdout").groupby(["trial", "task"]).size().eq(ITEMS).all()


def test_the_sampler_and_the_reader_are_told_the_estimate(bench: Bench) -> None:
    bench.search(trials=14)
    run = open_run(bench.folder)
    told = {trial.number: trial.values for trial in bench.run.storage().get_all_trials(1)}
    for number, point in run.points().iterrows():
        assert told[number] == pytest.approx([point["domain"], point["forgetting"]], abs=1e-4)
        weight = mean_weight(run.recipe(number))
        assert point["domain"] == pytest.approx(weight, abs=1e-4)  # as on all items: the fake's items are alike
        assert run.scores(number, "search")["skill_clinical"] == pytest.approx(0.3 + 0.5 * weight + 0.0095, abs=1e-4)


class Several(SerialPool):
    """A pool of four workers that keeps its jobs back until there are no more."""

    size = 4

    def __init__(self) -> None:
        super().__init__(FakeWorker)
        self.given: list[Job] = []

    def submit(self, job: Job) -> None:
        self.given.append(job)
        super().submit(job)

    def wait(self, timeout: float) -> list[Result]:
        return [result for _ in range(len(self._jobs)) for result in super(Several, self).wait(timeout)]


def test_nothing_is_drawn_before_base_and_experts_are_scored(bench: Bench) -> None:
    pool = Several()
    bench.search(trials=14, pool=pool)
    jobs = [job for job in pool.given if isinstance(job, ScoreJob) and job.suite == "search"]
    assert [job.only is not None for job in jobs] == [False] * 8 + [True] * 6
    assert all(job.only == jobs[-1].only for job in jobs[8:])


def test_lost_outcomes_are_scored_again_on_the_drawn_items(bench: Bench) -> None:
    bench.search(trials=14)
    before = open_run(bench.folder).points()
    for number in (0, 3, 12):
        (bench.folder / f"outcomes/{number:05d}-search.parquet").unlink()
    bench.search(trials=14)
    assert open_run(bench.folder).points().equals(before)


def test_a_draw_that_is_too_short_is_scored_again(bench: Bench) -> None:
    bench.search(trials=14)
    run = bench.run
    rows = FakeWorker().evaluate(open_run(bench.folder).recipe(12).to_json(), "search").outcomes
    digest = Recipe.from_json(open_run(bench.folder).recipe(12).to_json()).digest
    run.write_outcomes(12, "search", digest, rows[:-1])  # one lacks, and none was drawn
    assert "must hold 20 items" in open_run(bench.folder).lost_outcomes("search")[12]
    bench.search(trials=14)
    assert not open_run(bench.folder).lost_outcomes("search")
