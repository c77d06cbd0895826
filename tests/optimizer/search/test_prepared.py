"""Anchors that a worker prepares: derived experts and learned weights, as trials like any other."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from optimizer.errors import MergeError
from optimizer.runs.sensitivities import Sensitivities, sensitivity_file
from optimizer.runs.trial import NO_ANCHORS, Role, TrialKind
from optimizer.search.prepared import SHARES, Preparation
from optimizer.search.samplers import SampledStudy
from optimizer.workers.orders import Derivation, Form, Learned, Lesson
from optimizer.workers.pool import Job, LearnJob, Result, SensitivityJob, SerialPool
from search_spaces.recipe import Recipe
from tests.optimizer.fakes import GROUPS, Bench, FakeWorker
from tests.optimizer.search.test_kill import FORKS

pytestmark = pytest.mark.slow  # whole studies are run

BUDGET = 22
LEARNED = ["learned p=0.37", "learned p=0.60", "learned p=0.83"]
DERIVED = [f"derived {form} {share:g}" for form in ("regmean", "fisher") for share in SHARES]


def bench_of(folder: Path) -> Bench:
    return Bench(folder / "toy", forms=("regmean", "fisher"), learned=3)


def trials_of(bench: Bench) -> list[FrozenTrial]:
    study = optuna.load_study(study_name=bench.folder.name, storage=bench.run.storage())
    return study.get_trials(deepcopy=False)


def kinds_of(trials: list[FrozenTrial]) -> list[str]:
    return [trial.user_attrs.get("kind", "search") for trial in trials]


class Sharp(FakeWorker):
    """A worker whose lessons find what no curve holds: nothing of the layers that forgetting hangs on."""

    def learn(self, lesson: Lesson) -> Learned:
        found = super().learn(lesson)
        recipe = Recipe.from_json(found.recipe)
        settings = [dataclasses.replace(s, value=1.6 * s.value * (s.group in GROUPS[6:])) for s in recipe.settings]
        return dataclasses.replace(found, recipe=dataclasses.replace(recipe, settings=tuple(settings)).to_json())


@pytest.mark.parametrize("sampler", ["gp", "tpe", "nsga2", "front", "random"])
def test_prepared_anchors_come_after_the_others_and_the_rest_is_sampled(tmp_path: Path, sampler: str) -> None:
    bench = bench_of(tmp_path)
    bench.search(trials=BUDGET, sampler=sampler, pool=SerialPool(Sharp))
    trials = trials_of(bench)
    anchors = [anchor.name for anchor in bench.space.anchors()]
    searched = BUDGET - len(anchors) - len(DERIVED) - len(LEARNED)
    kinds = kinds_of(trials)
    assert kinds[:-searched] == anchors + DERIVED + LEARNED
    assert all(TrialKind(kind).role in NO_ANCHORS for kind in kinds[-searched:])
    assert any(kind.startswith("between ") for kind in kinds) == (sampler != "random")
    assert all(trial.state == TrialState.COMPLETE for trial in trials)
    without = [trial for trial in trials if not TrialKind.of(trial.user_attrs).has_params]
    assert not any(trial.params for trial in without)
    names = set(bench.space.distributions())
    assert all(set(trial.params) == names for trial in trials if trial not in without)  # nothing is sampled blindly
    assert all(bench.has_own(trial) for trial in without)
    prepared = [trial for trial in trials if TrialKind.of(trial.user_attrs).is_prepared]
    assert all(bench.has_own(trial, "holdout") for trial in prepared)


def test_a_sampler_learns_the_space_from_the_trials_that_have_parameters(tmp_path: Path) -> None:
    bench = bench_of(tmp_path)
    bench.search(trials=BUDGET, sampler="random")
    storage = bench.run.storage()
    trial = trials_of(bench)[-1]
    seen = optuna.samplers.GPSampler().infer_relative_search_space(SampledStudy("toy", storage), trial)
    assert set(seen) == set(bench.space.distributions())
    study = optuna.load_study(study_name="toy", storage=storage)
    whole = optuna.samplers.GPSampler().infer_relative_search_space(study, trial)
    assert not whole  # what a sampler would have to learn from otherwise


def test_a_derived_anchor_is_its_checkpoint_whole(tmp_path: Path) -> None:
    bench = bench_of(tmp_path)
    bench.search(trials=BUDGET, sampler="random")
    trial = trials_of(bench)[kinds_of(trials_of(bench)).index("derived fisher 0.4")]
    recipe = Recipe.from_json(trial.user_attrs["recipe"])
    assert recipe.experts == (("clinical_fisher_40", str(bench.folder / "derived" / "clinical-fisher-0.4")),)
    assert recipe.value("weight", expert="clinical_fisher_40", group="head") == 1.0


@pytest.mark.parametrize("forms", [("kfac", "regmean"), ("fisher",), ()])
def test_a_lesson_starts_at_the_anchor_that_loses_least_and_says_what_it_gave(
    forms: tuple[Form, ...], tmp_path: Path
) -> None:
    bench = Bench(tmp_path / "toy", forms=forms, learned=3)
    bench.search(trials=BUDGET, sampler="random")
    trials = trials_of(bench)
    expert = next(t for t in trials if kinds_of([t]) == ["expert:clinical"])
    for name in LEARNED:
        trial = next(t for t in trials if kinds_of([t]) == [name])
        request, told = (json.loads(trial.user_attrs[key]) for key in ("request", "lesson"))
        share = told["preference"]["clinical"]
        assert name == f"learned p={share:.2f}"
        assert told["candidates"] == 18.0
        assert "recipe" not in told
        anchors = [t for t in trials if TrialKind.of(t.user_attrs).role not in (Role.LEARNED, Role.SEARCHED)]
        worth = {t.number: share * t.values[0] - (1 - share) * t.values[1] / expert.values[1] for t in anchors}
        best = max(anchors, key=lambda t: (worth[t.number], -t.number))
        assert Recipe.from_json(request["start"]) == Recipe.from_json(best.user_attrs["recipe"])


def test_a_budget_without_room_has_fewer_of_them(tmp_path: Path) -> None:
    bench = bench_of(tmp_path)
    bench.search(trials=10, sampler="random")
    anchors = [anchor.name for anchor in bench.space.anchors()]
    assert kinds_of(trials_of(bench)) == [*anchors, *DERIVED[: 10 - len(anchors)]]
    bench.search(trials=BUDGET, sampler="random")  # the budget grew
    searched = BUDGET - len(anchors) - len(DERIVED) - len(LEARNED)
    assert kinds_of(trials_of(bench)) == anchors + DERIVED + LEARNED + ["search"] * searched


class Failing(FakeWorker):
    """A worker whose lessons and closed forms fail."""

    def learn(self, lesson: Lesson) -> Learned:
        raise MergeError("a gradient must be finite: model.norm.weight has NaN")

    def derive(self, path: Derivation) -> list[Path]:
        raise MergeError("a derived expert must be finite")


def test_what_cannot_be_prepared_fails_by_its_reason_and_costs_no_searched_trial(tmp_path: Path) -> None:
    bench = bench_of(tmp_path)
    bench.search(trials=14, sampler="random", pool=SerialPool(Failing))
    trials = trials_of(bench)
    failed = [t for t in trials if t.state == TrialState.FAIL]
    assert kinds_of(failed) == DERIVED + LEARNED
    assert failed[-1].user_attrs["reason"] == "a gradient must be finite: model.norm.weight has NaN"
    assert sum(t.state == TrialState.COMPLETE for t in trials) == 14
    bench.search(trials=15, sampler="random")  # they are not tried again, and the budget is the search's
    assert len(trials_of(bench)) == len(trials) + 1


class Idle(FakeWorker):
    """A worker whose lessons go nowhere."""

    def learn(self, lesson: Lesson) -> Learned:
        return dataclasses.replace(super().learn(lesson), recipe=lesson.start, steps=0)


def test_a_lesson_that_ends_where_it_began_is_passed_over(tmp_path: Path) -> None:
    bench = bench_of(tmp_path)
    bench.search(trials=BUDGET, sampler="random", pool=SerialPool(Idle))
    trials = trials_of(bench)
    reasons = [t.user_attrs["reason"] for t in trials if t.state == TrialState.FAIL]
    assert len(reasons) == len(LEARNED)
    assert all(reason.startswith("duplicate of") for reason in reasons)
    assert sum(t.state == TrialState.COMPLETE for t in trials) == BUDGET


def drive(folder: Path, fault: str, sampler: str = "random") -> None:
    import os

    os.environ["MERGEFRONT_FAULT"] = fault
    bench_of(folder).search(trials=BUDGET, sampler=sampler, pool=SerialPool(Sharp))


def points_of(folder: Path) -> list[tuple[str, str, list[float]]]:
    trials = trials_of(bench_of(folder))
    return [
        (kind, Recipe.from_json(trial.user_attrs["recipe"]).digest, trial.values)
        for kind, trial in zip(kinds_of(trials), trials, strict=True)
        if TrialKind(kind).is_prepared
    ]


@pytest.mark.parametrize(
    "faults",
    [
        ["enqueue.after:9"],  # a derived anchor is in the study and nobody has been asked
        ["enqueue.after:15"],  # a lesson is
        ["prepared.after:1"],
        ["prepared.after:8", "outcome.before:1"],
        ["outcome.after:10", "enqueue.after:3", "prepared.after:1"],
        ["tell.before:16"],
    ],
)
def test_a_driver_killed_on_the_way_has_the_same_points_in_the_end(tmp_path: Path, faults: list[str]) -> None:
    bench_of(tmp_path / "calm").search(trials=BUDGET, sampler="random", pool=SerialPool(Sharp))
    for fault in faults:
        process = FORKS.Process(target=drive, args=(tmp_path / "killed", fault))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, f"{fault} was not reached"
    bench_of(tmp_path / "killed").search(trials=BUDGET, sampler="random", pool=SerialPool(Sharp))
    assert points_of(tmp_path / "killed") == points_of(tmp_path / "calm")
    assert all(trial.state == TrialState.COMPLETE for trial in trials_of(bench_of(tmp_path / "killed")))


@pytest.mark.parametrize("fault", ["enqueue.after:18", "ask.after:12", "outcome.before:21", "tell.before:21"])
def test_a_point_between_two_is_scored_whenever_the_driver_is_killed(tmp_path: Path, fault: str) -> None:
    process = FORKS.Process(target=drive, args=(tmp_path / "toy", fault, "tpe"))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL, f"{fault} was not reached"
    left = trials_of(bench_of(tmp_path / "toy"))
    assert kinds_of(left)[-1].startswith("between ")
    bench_of(tmp_path / "toy").search(trials=BUDGET, sampler="tpe", pool=SerialPool(Sharp))
    trials = trials_of(bench_of(tmp_path / "toy"))
    assert len(trials) == BUDGET
    assert all(trial.state == TrialState.COMPLETE for trial in trials)
    assert trials[len(left) - 1].user_attrs["recipe"] == left[-1].user_attrs["recipe"]
    assert bench_of(tmp_path / "toy").has_own(trials[len(left) - 1])


def test_preferences_are_spread_over_the_front_and_with_several_experts_over_the_simplex() -> None:
    one = Preparation("base", (("a", "A"),), Path(), learned=1).preferences()
    assert one == {TrialKind("learned p=0.60"): (("a", pytest.approx(0.6)),)}
    two = Preparation("base", (("a", "A"), ("b", "B")), Path(), learned=5)
    kinds = [kind.stored for kind in two.preferences()]
    assert kinds == ["learned p=0.32", "learned p=0.46 a", "learned p=0.60 b", "learned p=0.74", "learned p=0.88 a"]
    assert all(0 < sum(share for _, share in parts) < 1 for parts in two.preferences().values())
    assert dict(two.preferences()[TrialKind("learned p=0.60 b")])["b"] == pytest.approx(0.36)


def test_with_two_workers_a_free_one_waits_for_its_lesson(tmp_path: Path) -> None:
    class Two(SerialPool):
        size = 2

        def wait(self, timeout: float) -> list[Result]:
            self._jobs.rotate(1)
            return super().wait(timeout)

    bench = bench_of(tmp_path)
    bench.search(trials=17, sampler="random", pool=Two(FakeWorker))
    assert sorted(kinds_of(trials_of(bench))) == sorted([a.name for a in bench.space.anchors()] + DERIVED + LEARNED)


@pytest.mark.parametrize("fails", [False, True])
def test_a_worker_that_waits_for_an_anchor_measures_sensitivities_meanwhile(tmp_path: Path, fails: bool) -> None:
    given: list[Job] = []

    class Two(SerialPool):
        size = 2

        def submit(self, job: Job) -> None:
            given.append(job)
            super().submit(job)

    class Worker(FakeWorker):
        def sensitivities(self, expert: str, *, items: int) -> Sensitivities:
            if fails:
                raise MergeError("no gradient")
            return super().sensitivities(expert, items=items)

    bench = bench_of(tmp_path)
    bench.search(trials=17, sampler="random", pool=Two(Worker))
    places = [place for place, job in enumerate(given) if isinstance(job, SensitivityJob)]
    assert len(places) == 1
    assert places[0] < next(place for place, job in enumerate(given) if isinstance(job, LearnJob))
    assert sensitivity_file(bench.folder, "clinical").exists() != fails
    told = [event.text for event in bench.events if "sensitivities" in event.text]
    assert len(told) == 1
    assert ("cannot be measured: no gradient" in told[0]) == fails
