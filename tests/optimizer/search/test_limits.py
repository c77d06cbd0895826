"""Limits in a search, and its ends: what the sampler is told, what a person is told, and when no trial is started."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from statistics import fmean

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from optimizer.run import Run, open_run
from optimizer.run_study import finish
from optimizer.runs.limits import Limits, answer_to_limits, limits_of
from optimizer.search.cost import FORMS, lesson_cost, paid_for
from optimizer.search.prepared import SHARES
from optimizer.search.samplers import SAMPLERS, make_sampler
from optimizer.strict_yaml import dump_yaml
from optimizer.study.derived import AnchorsSection
from optimizer.views.sentences import limits, verdict
from optimizer.workers.orders import STEPS
from optimizer.workers.pool import LearnJob, Result, SerialPool
from search_spaces.shape import Shape
from tests.optimizer.fakes import Bench, FakeWorker, space_of, study_of, tasks_of

pytestmark = pytest.mark.slow  # whole studies are run


def opened(bench: Bench, **asked: object) -> Run:
    """Open a run whose study file says what its limits are, as `search` writes it."""
    (bench.folder / "study.yaml").write_text(dump_yaml({"name": "toy", "search": asked}))
    return open_run(bench.folder)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "toy")


def trials_of(bench: Bench) -> list[FrozenTrial]:
    storage = bench.run.storage()
    return optuna.load_study(study_name=bench.folder.name, storage=storage).get_trials(deepcopy=False)


def test_a_limit_ends_in_a_point_that_keeps_it(bench: Bench) -> None:
    bench.search(trials=30, sampler="tpe", max_forgetting=0.05)
    trials = trials_of(bench)
    assert all(list(t.constraints) == ["max_forgetting 0.05"] for t in trials)
    assert all(t.constraints["max_forgetting 0.05"] == pytest.approx(t.values[1] - 0.05) for t in trials)
    run = opened(bench, max_forgetting=0.05)
    answer = answer_to_limits(run)
    assert answer is not None
    assert answer.is_kept
    kept = {t.number: t.values[0] for t in trials if t.values[1] <= 0.05}
    assert answer.trial == max(kept, key=lambda number: kept[number])
    assert kept[answer.trial] > 0
    said = limits(run)
    assert said[0].startswith("Within the limits (forgetting at most 5.0 %), by the search items: Trial ")
    assert "measured on items the search never saw" in said[0]
    assert said[0] in verdict(run)
    finish(run)
    assert json.loads((bench.folder / "front.json").read_text())["asked_limits"]["trial"] == answer.trial
    assert "Within the limits (forgetting at most 5.0 %)" in (bench.folder / "report.html").read_text()


def test_where_none_keeps_it_the_nearest_is_told(bench: Bench) -> None:
    bench.search(trials=12, max_forgetting=0.0001)
    values = {t.number: t.values for t in trials_of(bench)}
    run = opened(bench, max_forgetting=0.0001)
    answer = answer_to_limits(run)
    assert answer is not None
    assert not answer.is_kept
    with_gain = {number: told[1] for number, told in values.items() if told[0] > 0}
    assert answer.trial == min(with_gain, key=lambda number: with_gain[number])
    assert answer.forgot == pytest.approx(with_gain[answer.trial])
    (said,) = limits(run)
    assert f"The nearest, trial {answer.trial}, forgets" in said
    assert "of all general tasks, where 0.0 % is the limit" in said
    assert answer.document()["kept"] is False


def test_floors_are_constraints_of_their_tasks(bench: Bench) -> None:
    bench.search(trials=14, sampler="nsga2", max_forgetting=0.2, floors={"general": 0.04})
    trials = trials_of(bench)
    assert all(set(t.constraints) == {"max_forgetting 0.2", "general 0.04"} for t in trials)
    assert all(t.constraints["general 0.04"] == pytest.approx(t.values[1] - 0.04) for t in trials)
    answer = answer_to_limits(opened(bench, max_forgetting=0.2, floors={"general": 0.04, "gone": 0.1}))
    assert answer is not None
    assert answer.name == "general"
    assert answer.limit == 0.04


def within(name: str, trials: int, *, limited: bool) -> float:
    """Share of the second half of a sampler's trials that forget at most 0.015, of merges of 8 weights."""
    sampler = make_sampler(name, dimensions=8, conditional=False, budget=trials, seed=1, told=0)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    space = {f"w{i}": optuna.distributions.FloatDistribution(0.0, 1.0) for i in range(8)}
    for kind, weight in {"base": 0.0, "expert:law": 1.0, "uniform a=0.50": 0.5}.items():
        study.enqueue_trial(dict.fromkeys(space, weight), user_attrs={"kind": kind})
    kept = 0
    for number in range(trials):
        trial = study.ask(dict(space))
        weights = list(trial.params.values())
        gain, forgot = 1 - fmean((1 - w) ** 2 for w in weights), 0.2 * fmean(w * w for w in weights[:4])
        if limited:
            trial.set_constraint("max_forgetting", forgot - 0.015)
        study.tell(trial, [gain, forgot])
        kept += number >= trials // 2 and forgot <= 0.015
    return kept / (trials - trials // 2)


@pytest.mark.parametrize(
    ("sampler", "trials"), [("tpe", 80), ("gp", 30), ("nsga2", 200), ("nsga3", 200), ("cmaes", 160)]
)
def test_samplers_heed_limits(sampler: str, trials: int) -> None:
    free, limited = (within(sampler, trials, limited=limited) for limited in (False, True))
    assert limited > free + 0.1


@pytest.mark.parametrize("sampler", ["random", "qmc", "tpe"])
def test_who_does_not_heed_limits_says_so(bench: Bench, sampler: str) -> None:
    bench.search(trials=10, sampler=sampler, max_forgetting=0.03)
    told = [event.text for event in bench.events if "without regard to limits" in event.text]
    assert bool(told) == (sampler != "tpe")
    assert sampler in SAMPLERS


def test_other_limits_are_told_anew_when_a_study_is_taken_up(bench: Bench) -> None:
    bench.search(trials=10, max_forgetting=0.05)
    bench.search(trials=12, max_forgetting=0.1, floors={"general": 0.2})
    trials = trials_of(bench)
    assert all(set(t.constraints) == {"max_forgetting 0.1", "general 0.2"} for t in trials)
    assert all(t.constraints["max_forgetting 0.1"] == pytest.approx(t.values[1] - 0.1) for t in trials)
    bench.search(trials=13)
    assert not any(t.constraints for t in trials_of(bench))


def test_a_search_ends_when_its_cost_is_spent(bench: Bench) -> None:
    bench.search(trials=40, candidates=11.0)
    trials = trials_of(bench)
    assert sum(t.state == TrialState.COMPLETE for t in trials) == 11
    assert sum(t.user_attrs["candidates"] for t in trials) == 11
    assert any("11 candidates are spent (search.candidates)" in event.text for event in bench.events)
    bench.search(trials=40, candidates=13.5)
    assert len(trials_of(bench)) == 14


def test_lessons_derived_experts_and_banks_cost_too(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "toy", forms=("regmean",), learned=1, drawn=12)
    bench.search(trials=14)
    cost = {t.user_attrs.get("kind", "search"): t.user_attrs["candidates"] for t in trials_of(bench)}
    whole = 20 / 12  # items of the bank over those that are drawn
    assert cost["search"] == 1
    assert cost["base"] == pytest.approx(whole, abs=1e-3)
    assert cost["derived regmean 0.2"] == pytest.approx(whole + FORMS["regmean"] * 20 / 12, abs=1e-3)  # made of all 20
    assert cost["derived regmean 0.4"] == pytest.approx(whole, abs=1e-3)
    assert next(c for kind, c in cost.items() if kind.startswith("learned")) == pytest.approx(whole + 18, abs=1e-3)


def test_a_lesson_in_hand_counts_as_what_it_will_cost(tmp_path: Path) -> None:
    class LessonsLast(SerialPool):
        size = 2

        def wait(self, timeout: float) -> list[Result]:
            self._jobs = deque(sorted(self._jobs, key=lambda job: isinstance(job, LearnJob)))
            return super().wait(timeout)

    bench = Bench(tmp_path / "toy", learned=1)
    bench.search(trials=100, candidates=80.0, pool=LessonsLast(FakeWorker))
    spent = sum(t.user_attrs["candidates"] for t in trials_of(bench))
    assert lesson_cost(STEPS, tasks_of(bench.experts)) > 40  # the fake lesson costs 18, so the rest goes to others
    assert 79 < spent <= 81


KFAC = tuple(f"kfac {share:g}" for share in SHARES)


@pytest.mark.parametrize(
    ("candidates", "forms", "derived", "lessons"),
    [
        (None, "", KFAC, 5),
        (10.0, "", (), 0),
        (35.0, "", ("kfac 0.4", "kfac 0.6"), 0),  # all of the 27 that the eight anchors leave
        (36.0, "", KFAC, 0),
        (60.0, "", KFAC, 0),
        (130.0, "", KFAC, 1),
        (500.0, "", KFAC, 5),
        (20.0, "regmean fisher", ("regmean 0.4", "regmean 0.6"), 0),
        (36.0, "regmean fisher", ("regmean 0.4", "regmean 0.6", "fisher 0.4"), 0),
        (37.0, "regmean fisher", ("regmean 0.4", "regmean 0.6", "fisher 0.4", "fisher 0.6"), 0),
    ],
)
def test_what_candidates_pay_for(candidates: float | None, forms: str, derived: tuple[str, ...], lessons: int) -> None:
    wanted = {"derived": forms.split()} if forms else {}
    study = study_of("toy", ("clinical",), candidates=candidates).model_copy(
        update={"anchors": AnchorsSection.model_validate(wanted)}
    )
    space = space_of(("clinical",), Shape("curve", 4))
    assert len(space.anchors()) == 8
    kinds, count = paid_for(study, space, tasks_of(("clinical",)))
    assert ([kind.stored.removeprefix("derived ") for kind in kinds], count) == ([*derived], lessons)
    twice = paid_for(study, space, tasks_of(("clinical",), drawn=10))  # an anchor reads twice what is drawn
    assert (len(twice[0]), twice[1]) <= (len(derived), lessons)


def test_a_search_ends_when_nothing_is_gained(bench: Bench) -> None:
    bench.search(trials=60, patience={"trials": 6, "gain": 0.01})
    trials = trials_of(bench)
    assert len(trials) < 60
    assert any("the last 6 searched trials added" in event.text for event in bench.events)
    run = open_run(bench.folder)
    grown = run.hypervolume()
    assert len(grown[grown["kind"] == "search"]) >= 6
    number = len(trials)
    bench.search(trials=60, patience={"trials": 6, "gain": 0.01})
    assert len(trials_of(bench)) == number
    bench.search(trials=number + 3)
    assert len(trials_of(bench)) == number + 3


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({}, Limits()),
        ({"search": 3}, Limits()),
        ({"search": {"max_forgetting": "much", "floors": ["a"]}}, Limits()),
        (
            {"search": {"max_forgetting": True, "floors": {"a": 0.1, "b": 7, 3: 0.2}}},
            Limits(None, {"a": 0.1, "3": 0.2}),
        ),
        ({"search": {"max_forgetting": 0, "floors": {}}}, Limits(0.0, {})),
    ],
)
def test_limits_are_read_without_trust(document: dict[str, object], expected: Limits) -> None:
    assert limits_of(document) == expected
    assert bool(expected) == bool(expected.by_name)


def test_a_run_without_limits_says_nothing_of_them(bench: Bench) -> None:
    bench.search(trials=9)
    run = open_run(bench.folder)
    assert answer_to_limits(run) is None
    assert limits(run) == []
