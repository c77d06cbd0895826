from __future__ import annotations

import dataclasses
import io
import os
import signal
import sqlite3
import warnings
from collections import Counter, deque
from collections.abc import Callable
from contextlib import closing
from itertools import combinations
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console

from optimizer.errors import CheckpointError, RunError, SearchError, StudyFileError
from optimizer.run import open_run
from optimizer.runs.run_folder import RunFolder
from optimizer.search import driver as search_module
from optimizer.search import midpoint
from optimizer.search.events import Event
from optimizer.search.samplers import SAMPLERS, make_sampler, require_learns
from optimizer.views.progress import Progress
from optimizer.words import percent
from optimizer.workers.pool import Job, Only, Result, ScoreJob, SerialPool
from optimizer.workers.worker import Evaluation
from search_spaces.choice import Choice
from search_spaces.recipe import Recipe
from search_spaces.shape import Shape
from tests.optimizer.fakes import Bench, FakeWorker, Refuse, is_anchor, mean_weight, space_of

pytestmark = pytest.mark.slow  # whole studies are run

COMPLETE, FAIL, RUNNING, WAITING = TrialState.COMPLETE, TrialState.FAIL, TrialState.RUNNING, TrialState.WAITING


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "toy")


def trials_of(bench: Bench) -> list[FrozenTrial]:
    study = optuna.load_study(study_name=bench.folder.name, storage=bench.run.storage())
    return study.get_trials(deepcopy=False)


def finished(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    passed_over = ("driver_died", "duplicate of")
    return [
        t
        for t in trials
        if t.state == COMPLETE or (t.state == FAIL and not t.user_attrs["reason"].startswith(passed_over))
    ]


class Stack(SerialPool):
    """A pool of three that gives the latest job back first."""

    size = 3

    def __init__(self, before: Callable[[Recipe], None] | None = None) -> None:
        super().__init__(lambda: FakeWorker(before))

    def wait(self, timeout: float) -> list[Result]:
        self._jobs.rotate(1)
        return super().wait(timeout)


class Mortal(SerialPool):
    """A pool whose worker dies under some trials, so many times each."""

    def __init__(self, deaths: dict[int, int]) -> None:
        super().__init__(FakeWorker)
        self.deaths, self.submitted = deaths, Counter[int]()

    def submit(self, job: Job) -> None:
        self.submitted[job.trial] += 1
        super().submit(job)

    def wait(self, timeout: float) -> list[Result]:
        job = self._jobs[0]
        if self.deaths.get(job.trial, 0) > 0:
            self.deaths[job.trial] -= 1
            return [Result(self._jobs.popleft(), None, "worker process 7 died", died=True)]
        return super().wait(timeout)


def test_the_budget_holds_anchors_first_and_the_front_is_judged(bench: Bench) -> None:
    bench.search(trials=12)
    trials = trials_of(bench)
    anchors = [anchor.name for anchor in bench.space.anchors()]
    assert [t.user_attrs.get("kind", "search") for t in trials] == anchors + ["search"] * (12 - len(anchors))
    assert all(t.state == COMPLETE and t.user_attrs["seconds"] >= 0 for t in trials)
    assert trials[0].values == [0.0, 0.0]
    assert trials[1].values[0] == pytest.approx(1.0)
    assert trials[1].values[1] > 0.1
    for trial in trials:
        recipe = Recipe.from_json(trial.user_attrs["recipe"])
        assert recipe == bench.space.recipe(trial.params)
        assert bench.has_own(trial)
    judged = {t.number for t in trials if bench.has_own(t, "holdout")}
    front = {t.number for t in optuna.load_study(study_name="toy", storage=bench.run.storage()).best_trials}
    assert judged == front | set(range(len(anchors)))
    kinds = [event.kind for event in bench.events]
    assert kinds == ["start"] + ["trial"] * 12 + ["holdout"] * len(judged) + ["done"]
    assert [event.done for event in bench.events if event.kind == "trial"] == list(range(1, 13))
    assert bench.events[2].label == "expert:clinical"
    assert bench.events[2].objectives == tuple(trials[1].values)


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_sampler_has_the_gaps_of_the_front_filled_and_a_random_search_has_not(bench: Bench, sampler: str) -> None:
    bench.search(trials=20, sampler=sampler)
    params = [trial.params for trial in trials_of(bench)]
    halfway = {
        number
        for number, between in enumerate(params)
        for one, other in combinations(params[:number], 2)
        if all(between[name] == pytest.approx((one[name] + other[name]) / 2) for name in between)
    }
    searched = halfway - set(range(len(bench.space.anchors())))
    assert bool(searched) == (sampler == "tpe")
    assert all(number >= 10 and number % midpoint.EVERY == 0 for number in searched)


def test_several_experts_have_an_objective_each(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "two", experts=("code", "law"), shape=Shape("uniform"))
    bench.search(trials=9)
    trials = trials_of(bench)
    assert trials[1].values[:2] == pytest.approx([1.0, 0.0])
    assert trials[2].values[:2] == pytest.approx([0.0, 1.0])


def test_nothing_is_told_before_base_and_expert_are_scored(bench: Bench) -> None:
    told_while_running = []

    def watch(event: Event) -> None:
        if event.kind == "trial":
            told_while_running.append(event.trial)

    bench.events = type("Tap", (list,), {"append": staticmethod(watch)})()
    bench.search(trials=12, pool=Stack())
    assert told_while_running[:2] == [0, 1]  # Stack scored 2 first
    assert [t.state for t in trials_of(bench)] == [COMPLETE] * 12


def test_the_order_of_results_does_not_change_a_score(tmp_path: Path) -> None:
    one, other = Bench(tmp_path / "a" / "toy"), Bench(tmp_path / "b" / "toy")
    one.search(trials=10)
    other.search(trials=10, pool=Stack())
    assert [(t.params, t.values) for t in trials_of(one)] == [(t.params, t.values) for t in trials_of(other)]


class Stubborn(optuna.samplers.RandomSampler):
    """Proposes one point for ever."""

    def sample_independent(self, study: object, trial: object, name: str, distribution: object) -> float:
        return 0.625


@pytest.mark.parametrize("random", [True, False])
def test_a_known_recipe_is_not_scored_twice(bench: Bench, monkeypatch: pytest.MonkeyPatch, random: bool) -> None:
    def make(name: str, **wanted: int) -> optuna.samplers.BaseSampler:
        return make_sampler(name, **wanted) if name == "random" and random else Stubborn()

    monkeypatch.setattr(search_module, "make_sampler", make)
    monkeypatch.setattr(midpoint, "EVERY", 1000)
    monkeypatch.setattr(search_module, "REPEATS_BEFORE_RANDOM", 3)
    monkeypatch.setattr(search_module, "REPEATS_BEFORE_END", 6)
    bench.search(trials=10, sampler="tpe")
    trials = trials_of(bench)
    known = len(bench.space.anchors()) + 1
    first = next(t.number for t in trials if set(t.params.values()) == {0.625})
    reasons = Counter(t.user_attrs["reason"] for t in trials if t.state == FAIL)
    done = [t for t in trials if t.state == COMPLETE]
    assert len({t.user_attrs["recipe"] for t in done}) == len(done) == (10 if random else known)
    assert set(reasons) == {f"duplicate of {first}"}
    assert any("the space has no more" in event.text for event in bench.events) == (not random)


def test_a_recipe_that_cannot_be_merged_fails_once_with_its_reason(bench: Bench) -> None:
    def refuse(recipe: Recipe) -> None:
        seen[recipe.digest] += 1
        Refuse(0.5)(recipe)

    seen: Counter[str] = Counter()
    bench.search(trials=12, before=refuse)
    failed = [t for t in trials_of(bench) if t.state == FAIL]
    assert [t.user_attrs["kind"] for t in failed] == ["uniform a=0.50", "slope 0.00->1.00"]
    assert {t.user_attrs["reason"] for t in failed} == {"nonfinite: tensor model.norm.weight"}
    assert len(finished(trials_of(bench))) == 12
    assert seen[Recipe.from_json(failed[0].user_attrs["recipe"]).digest] == 1
    bench.search(trials=13, before=refuse)
    assert len(trials_of(bench)) == 13  # a failed anchor is not tried again


def test_five_failures_in_a_row_stop_the_search(bench: Bench) -> None:
    with pytest.raises(SearchError, match="last 5 trials failed, 5 of them so: nonfinite"):
        bench.search(trials=40, before=Refuse())
    assert sum(t.state == FAIL for t in trials_of(bench)) == 5
    bench.search(trials=15)
    assert len(finished(trials_of(bench))) == 15


def test_a_failed_base_stops_the_search_and_may_be_mended(bench: Bench) -> None:
    with pytest.raises(SearchError, match="measured by the base, and it failed: nonfinite"):
        bench.search(trials=12, before=Refuse(0.0))
    bench.search(trials=12)
    trials = trials_of(bench)
    assert [t.state for t in trials if t.user_attrs.get("kind") == "base"] == [FAIL, COMPLETE]
    assert all(t.state in (COMPLETE, FAIL) for t in trials)


def test_a_score_that_is_not_finite_is_a_failure(bench: Bench) -> None:
    class Broken(FakeWorker):
        def evaluate(self, recipe: str, suite: str, only: Only | None = None) -> Evaluation:
            evaluation = super().evaluate(recipe, suite, only)
            if is_anchor(Recipe.from_json(recipe)):
                return evaluation
            rows = (dataclasses.replace(evaluation.outcomes[0], value=float("nan")), *evaluation.outcomes[1:])
            return dataclasses.replace(evaluation, outcomes=rows)

    with pytest.raises(SearchError, match="score not finite: task skill_clinical, item 0"):
        bench.search(trials=12, pool=SerialPool(Broken))
    failed = [t.number for t in trials_of(bench) if t.state == FAIL]
    assert not any(bench.run.has_outcomes(number, "search") for number in failed)


def test_a_dead_workers_trial_goes_to_another_up_to_max_attempts(bench: Bench) -> None:
    pool = Mortal({1: 1, 3: 2, 4: 3})
    bench.search(trials=12, pool=pool, max_attempts=3)
    trials = trials_of(bench)
    assert [t.number for t in trials if t.state == FAIL] == [4]
    assert trials[4].user_attrs["reason"] == "worker_died: worker process 7 died"
    assert [event.trial for event in bench.events if event.kind == "retry"] == [1, 3, 3, 4, 4]
    assert pool.submitted[4] == 3
    assert len(trials) == 12


def test_a_resumed_search_goes_on_without_repeating_a_point(bench: Bench) -> None:
    for budget in (10, 10, 13, 16):
        bench.search(trials=budget)
        assert len(finished(trials_of(bench))) == budget
    trials = trials_of(bench)
    assert len({tuple(t.params.values()) for t in trials}) == len(trials) == 16
    assert "10 of 10 trials are finished" in [event.text for event in bench.events]


def test_an_open_trial_with_outcomes_is_told_and_one_without_is_scored_under_its_number(bench: Bench) -> None:
    scored: list[str] = []

    def stop(recipe: Recipe) -> None:
        scored.append(recipe.digest)
        if len(scored) == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.search(trials=12, before=stop)
    study = optuna.load_study(study_name="toy", storage=bench.run.storage())
    open_trial = study.ask(bench.space.distributions())  # a second one, whose outcomes are there
    recipe = bench.space.recipe(open_trial.params)
    open_trial.set_user_attr("recipe", recipe.to_json())
    outcomes = FakeWorker().evaluate(recipe.to_json(), "search").outcomes
    bench.run.write_outcomes(open_trial.number, "search", recipe.digest, outcomes)
    assert [t.number for t in trials_of(bench) if t.state == RUNNING] == [8, 9]

    bench.search(trials=12, before=lambda recipe: scored.append(recipe.digest))
    trials = trials_of(bench)
    assert [t.state for t in trials] == [COMPLETE] * 12
    assert all(bench.has_own(t) for t in trials)
    assert Counter(scored)[recipe.digest] <= 1  # on the holdout suite only


def test_outcomes_of_another_recipe_are_not_told(bench: Bench) -> None:
    def stop(recipe: Recipe) -> None:
        if not is_anchor(recipe):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.search(trials=12, before=stop)
    (left,) = (t for t in trials_of(bench) if t.state == RUNNING)
    bench.run.write_outcomes(left.number, "search", "0" * 12, [])
    bench.search(trials=12)
    again = trials_of(bench)[left.number]
    assert (again.state, again.params) == (COMPLETE, left.params)
    assert bench.has_own(again)


def test_an_open_trial_whose_retry_is_queued_by_an_earlier_version_is_left_to_it(bench: Bench) -> None:
    def stop(recipe: Recipe) -> None:
        if not is_anchor(recipe):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.search(trials=12, before=stop)
    (left,) = (t for t in trials_of(bench) if t.state == RUNNING)
    study = optuna.load_study(study_name="toy", storage=bench.run.storage())
    study.enqueue_trial(left.params, user_attrs={"kind": "search", "retry_of": left.number})
    bench.search(trials=12)
    trials = trials_of(bench)
    assert trials[left.number].user_attrs["reason"] == "driver_died"
    (retry,) = (t for t in trials if t.user_attrs.get("retry_of") == left.number)
    assert (retry.state, retry.params) == (COMPLETE, left.params)
    assert len(finished(trials)) == 12


def left_running(bench: Bench) -> None:
    """A driver dies while it scores the base."""
    with pytest.raises(KeyboardInterrupt):
        bench.search(trials=12, before=interrupt)


def failed(bench: Bench) -> None:
    """The base cannot be scored."""
    with pytest.raises(SearchError):
        bench.search(trials=12, before=Refuse(0.0))


def queued_again(bench: Bench) -> None:
    """An earlier version's driver died, and the next one gave the base a new number, and died."""
    left_running(bench)
    study = optuna.load_study(study_name="toy", storage=bench.run.storage())
    study.enqueue_trial(trials_of(bench)[0].params, user_attrs={"kind": "base", "retry_of": 0})


def interrupt(recipe: Recipe) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("before", [left_running, failed, queued_again])
def test_base_and_experts_are_scored_before_all_that_waits(bench: Bench, before: Callable[[Bench], None]) -> None:
    before(bench)
    assert sum(t.state == WAITING for t in trials_of(bench)) > 3
    weights: list[float] = []
    bench.events.clear()
    bench.search(trials=12, before=lambda recipe: weights.append(mean_weight(recipe)))
    assert weights[:2] == [0.0, 1.0]
    told = [event.label for event in bench.events if event.kind == "trial"]
    assert set(told[:2]) == {"base", "expert:clinical"}
    assert len(finished(trials_of(bench))) == 12 + (before is failed)


class Altered(SerialPool):
    """A pool under which a checkpoint's file changes while the n-th job is out; as `how` says, that is found out."""

    def __init__(self, bench: Bench, n: int, how: str) -> None:
        super().__init__(FakeWorker)
        self.n, self.how, self.submitted = n, how, Counter[int]()
        if how != "by another machine's worker":
            bench.require_unchanged = self.require_unchanged

    @property
    def altered(self) -> bool:
        return self.submitted.total() >= self.n

    def submit(self, job: Job) -> None:
        self.submitted[job.trial] += 1
        super().submit(job)

    def wait(self, timeout: float) -> list[Result]:
        if not self.altered or self.how == "by the driver":
            return super().wait(timeout)
        job = self._jobs.popleft()
        if self.how == "by a death":  # SIGBUS: a mapped file was cut short
            return [Result(job, None, "worker process 7 died", died=True)]
        return [Result(job, None, "/models/base/model.safetensors changed", sources_changed=True)]

    def require_unchanged(self) -> None:
        if self.altered:
            raise CheckpointError("/models/base/model.safetensors changed (size 9 -> 4); restore it")


@pytest.mark.parametrize("suite", ["search", "holdout"])
@pytest.mark.parametrize("how", ["by the driver", "by a death", "by another machine's worker"])
def test_a_changed_checkpoint_stops_the_search_at_once_and_costs_no_trial(bench: Bench, how: str, suite: str) -> None:
    pool = Altered(bench, 8 if suite == "search" else 14, how)
    with pytest.raises(SearchError, match=r"/models/base/model\.safetensors changed.*\n.*run again"):
        bench.search(trials=12, pool=pool, max_attempts=3)
    assert max(pool.submitted.values()) == (1 if suite == "search" else 2)  # no second attempt; two suites
    trials = trials_of(bench)
    assert not any(t.state == FAIL for t in trials)
    (left,) = [t for t in trials if t.state == RUNNING] or [None]
    assert (left is not None) == (suite == "search")
    assert left is None or not bench.run.has_outcomes(left.number, "search")

    bench.require_unchanged = lambda: None  # restored
    bench.search(trials=12)
    assert [t.state for t in trials_of(bench)] == [COMPLETE] * 12
    assert bench.events[-1].kind == "done"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_first_signal_lets_running_trials_finish(bench: Bench, number: signal.Signals) -> None:
    def stop(recipe: Recipe) -> None:
        if mean_weight(recipe) == 0.5:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        bench.search(trials=12, before=stop)
    assert signal.getsignal(number) is before
    states = [t.state for t in trials_of(bench)]
    assert RUNNING not in states
    assert 3 <= states.count(COMPLETE) < 12
    bench.search(trials=12)
    assert len(finished(trials_of(bench))) == 12


def test_a_second_signal_leaves_at_once(bench: Bench) -> None:
    def twice(recipe: Recipe) -> None:
        if mean_weight(recipe) == 0.5:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        bench.search(trials=12, before=twice)
    assert [t.state for t in trials_of(bench)].count(RUNNING) == 1
    bench.search(trials=12)
    assert len(finished(trials_of(bench))) == 12


def test_tasks_without_a_scale_stop_the_search_in_plain_words(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.optimizer.fakes.fmean", lambda values: 0.0)
    with pytest.raises(SearchError, match="cannot carry a search: task skill_clinical has no scale"):
        bench.search(trials=12)


def test_a_budget_below_the_references_is_refused(bench: Bench) -> None:
    with pytest.raises(SearchError, match=r"search.trials must leave room .* given 1, needed 2"):
        bench.search(trials=1)


def test_the_smallest_budget_scores_the_references(bench: Bench) -> None:
    bench.search(trials=2, pool=Stack())
    assert [t.state for t in trials_of(bench)[:2]] == [COMPLETE, COMPLETE]
    assert {t.state for t in trials_of(bench)[2:]} <= {WAITING}


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "nsga3", "cmaes", "qmc", "gp", "front"])
def test_every_sampler_proposes_points_of_the_space(bench: Bench, sampler: str) -> None:
    bench.search(trials=14, sampler=sampler)
    assert len({tuple(t.params.values()) for t in trials_of(bench)}) == 14


def test_auto_is_gp_where_it_can_learn_and_tpe_elsewhere() -> None:
    def chosen(**wanted: int) -> optuna.samplers.BaseSampler:
        usual = {"dimensions": 8, "conditional": False, "budget": 100, "seed": 0, "told": 0}
        return make_sampler("auto", **(usual | wanted))

    assert isinstance(chosen(), optuna.samplers.GPSampler)
    for beyond in ({"dimensions": 21}, {"budget": 201}, {"conditional": True}):
        assert isinstance(chosen(**beyond), optuna.samplers.TPESampler)


def test_a_sampler_follows_from_the_seed_and_the_number_of_trials() -> None:
    def first(seed: int, told: int) -> float:
        study = optuna.create_study(
            sampler=make_sampler("random", dimensions=1, conditional=False, budget=9, seed=seed, told=told)
        )
        return float(study.ask({"x": optuna.distributions.FloatDistribution(0, 1)}).params["x"])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draws = [first(0, 0), first(0, 1), first(1, 0)]
    assert draws[0] == first(0, 0)
    assert len(set(draws)) == 3


def test_progress_after_a_resume_says_what_the_run_folder_says(bench: Bench) -> None:
    bench.search(trials=11)
    bench.events.clear()
    bench.search(trials=14)
    sink = io.StringIO()
    with Progress(Console(file=sink, width=200)) as progress:
        for event in bench.events:
            progress(event)
    run = open_run(bench.run.path)
    knee = run.points().loc[run.knee()]
    news = (
        f"front {len(run.front())}, knee {percent(knee['domain'])} domain at {percent(knee['forgetting'])} forgetting"
    )
    assert news in next(line for line in sink.getvalue().splitlines() if "14/14 trial" in line)


def test_the_front_is_judged_only_where_it_was_not(bench: Bench) -> None:
    bench.search(trials=10)
    bench.events.clear()
    bench.search(trials=10)
    assert [event.kind for event in bench.events] == ["start", "done"]


def test_a_stranger_on_the_database_is_named_as_the_cause(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from sqlalchemy.exc import OperationalError

    def locked(*_: object, **__: object) -> None:
        raise optuna.exceptions.StorageInternalError("invalid data") from OperationalError("", {}, Exception("locked"))

    monkeypatch.setattr(RunFolder, "storage", locked)
    with pytest.raises(RunError, match=r"cannot be written .*locked.* nothing finished is lost"):
        bench.search(trials=10)


def test_jobs_are_plain_and_small() -> None:
    assert deque([ScoreJob(1, "{}", "search")])[0] == ScoreJob(1, "{}", "search")


@pytest.mark.parametrize("sampler", ["auto", "random"])
def test_several_methods_are_searched_and_taken_up_again(tmp_path: Path, sampler: str) -> None:
    bench = Bench(tmp_path / "toy", methods=("task_arithmetic", "ties", "dare_ties"))
    bench.search(trials=12, sampler=sampler)
    bench.search(trials=24, sampler=sampler)
    trials = finished(trials_of(bench))
    recipes = [Recipe.from_json(trial.user_attrs["recipe"]) for trial in trials]
    assert len(trials) == 24
    assert {recipe.method for recipe in recipes} == {"task_arithmetic", "ties", "dare_ties"}
    assert all(trial.params["method"] == recipe.method for trial, recipe in zip(trials, recipes, strict=True))
    anchors = [trial for trial in trials if trial.user_attrs.get("kind")]
    assert [trial.number for trial in anchors] == list(range(len(anchors)))
    assert {trial.params["method"] for trial in anchors} == {"task_arithmetic"}


@pytest.mark.parametrize("sampler", sorted(set(SAMPLERS) - {"auto", "tpe", "random"}))
def test_a_sampler_that_learns_nothing_of_a_methods_own_parameters_is_refused(sampler: str) -> None:
    require_learns(sampler, conditional=False)
    with pytest.raises(StudyFileError, match=f"given {sampler}.*; write tpe, random or auto"):
        require_learns(sampler, conditional=True)
    for name in ("auto", "tpe", "random"):
        require_learns(name, conditional=True)


def test_every_method_is_tried_although_the_anchors_are_of_the_first() -> None:
    choice = Choice(tuple(space_of(["law"], Shape("curve", 4), name) for name in ("task_arithmetic", "ties", "sce")))
    asked: Counter[str] = Counter()
    for seed in range(3):
        sampler = make_sampler("tpe", dimensions=choice.size, conditional=True, budget=40, seed=seed, told=0)
        study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
        for anchor in choice.anchors():
            study.enqueue_trial(dict(anchor.params))
        for _ in range(30):
            trial = study.ask()
            recipe = choice.recipe(choice.suggest(trial))
            mean = mean_weight(recipe)
            study.tell(trial, [mean + 0.1 * (recipe.method == "ties"), mean * mean])
            asked[recipe.method] += "kind" not in trial.user_attrs and trial.number >= len(choice.anchors())
    assert asked["ties"] > asked["task_arithmetic"] > 0
    assert asked["sce"] >= 3


def test_what_is_as_it_was_told_is_not_read_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.search(trials=12)
    read: list[int] = []
    whole = RunFolder.outcomes_fault

    def watched(run: RunFolder, trial: int, suite: str, **known: Any) -> str:
        read.extend([trial] * (suite == "search"))
        return whole(run, trial, suite, **known)

    monkeypatch.setattr(RunFolder, "outcomes_fault", watched)
    bench.search(trials=12)
    assert read == []
    path = bench.folder / "outcomes" / "00009-search.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:700] + bytes([content[700] ^ 1]) + content[701:])  # as many bytes as before
    bench.search(trials=12)
    assert read == [9]
    assert bench.has_own(trials_of(bench)[9])


def test_a_run_whose_trials_have_no_stamps_is_read_through(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.search(trials=10)
    with closing(sqlite3.connect(bench.folder / "study.db")) as connection:
        assert connection.execute("DELETE FROM trial_user_attributes WHERE key = 'outcomes'").rowcount == 10
        connection.commit()
    (bench.folder / "outcomes" / "00004-search.parquet").write_bytes(b"PAR1")
    bench.search(trials=11)
    assert any("00004-search.parquet" in event.text for event in bench.events if event.kind == "note")
    assert all(bench.has_own(trial) for trial in trials_of(bench))
