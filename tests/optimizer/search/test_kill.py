"""The driver is killed with SIGKILL, at chosen points and at random times; nothing acknowledged may be lost."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from collections import Counter
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from optimizer.run import open_run
from search_spaces.recipe import Recipe
from tests.optimizer.fakes import Bench, mean_weight

pytestmark = pytest.mark.slow  # some fifty drivers are started

BUDGET = 12
# Forked from a clean process that has the imports: a kill costs no start-up, and no SQLite connection is inherited.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.optimizer.fakes"])


class Acknowledged(list):  # type: ignore[type-arg]
    """Event list that writes what a person was shown to a file, as it is shown."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = path.open("a", buffering=1)

    def append(self, event: object) -> None:
        if event.kind == "trial":  # type: ignore[attr-defined]
            self._file.write(f"{event.trial} {event.objectives}\n")  # type: ignore[attr-defined]


def drive(folder: Path, fault: str, drawn: int = 0) -> None:
    os.environ["MERGEFRONT_FAULT"] = fault
    bench = Bench(folder / "toy", events=Acknowledged(folder / "acknowledged"), drawn=drawn)
    bench.search(trials=BUDGET, sampler="random")


def driver(folder: Path, fault: str = "", drawn: int = 0) -> multiprocessing.process.BaseProcess:
    process = FORKS.Process(target=drive, args=(folder, fault, drawn))
    process.start()
    return process


def assert_whole(folder: Path, *, most_trials: int = BUDGET, drawn: int = 0) -> None:
    bench = Bench(folder / "toy", drawn=drawn)
    storage = bench.run.storage()  # checks the file too
    trials = optuna.load_study(study_name="toy", storage=storage).get_trials(deepcopy=False)
    by_state = Counter(trial.state for trial in trials)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    assert by_state[TrialState.RUNNING] == by_state[TrialState.WAITING] == 0
    assert len(complete) == BUDGET
    assert len(trials) <= most_trials
    assert {trial.user_attrs["reason"] for trial in trials if trial.state == TrialState.FAIL} <= {"driver_died"}

    digests = [Recipe.from_json(trial.user_attrs["recipe"]).digest for trial in complete]
    assert len(set(digests)) == BUDGET
    assert all(bench.has_own(trial) for trial in complete)
    anchors = {anchor.name for anchor in bench.space.anchors()}
    assert anchors <= {trial.user_attrs.get("kind") for trial in complete}

    values = {trial.number: tuple(trial.values) for trial in complete}
    for line in (folder / "acknowledged").read_text().splitlines():
        number, told = line.split(" ", 1)
        assert str(values[int(number)]) == told
    judged = {trial.number for trial in complete if bench.has_own(trial, "holdout")}
    assert {trial.number for trial in complete if trial.user_attrs.get("kind") in anchors} <= judged


@pytest.mark.parametrize(
    "fault",
    [
        "enqueue.after:2",
        "ask.after:1",
        "ask.after:9",
        "outcome.before:1",
        "outcome.before:9",
        "outcome.after:1",
        "outcome.after:2",
        "outcome.after:9",
        "tell.before:1",
        "tell.before:3",
        "tell.after:2",
        "tell.after:12",
        "holdout.before:1",
        "holdout.before:4",
    ],
)
def test_a_driver_killed_at_a_point_loses_nothing(tmp_path: Path, fault: str) -> None:
    killed = driver(tmp_path, fault)
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL, f"{fault} was not reached"
    after = driver(tmp_path)
    after.join(60)
    assert after.exitcode == 0
    assert_whole(tmp_path)


@pytest.mark.parametrize("fault", ["outcome.after:1", "outcome.before:10", "outcome.after:10", "tell.before:10"])
def test_a_driver_killed_over_a_bank_draws_the_same_items_again(tmp_path: Path, fault: str) -> None:
    killed = driver(tmp_path, fault, 12)
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL, f"{fault} was not reached"
    after = driver(tmp_path, "", 12)
    after.join(60)
    assert after.exitcode == 0
    assert_whole(tmp_path, drawn=12)
    run = open_run(tmp_path / "toy")
    rows = run.outcomes("search")
    searched = [number for number, kind in run.kinds.items() if not kind.is_anchor]
    drawn = [frozenset(rows.loc[rows["trial"] == number, "item"]) for number in searched]
    assert len(searched) > 3
    assert len(set(drawn)) == 1
    gains = run.points()["domain"]
    assert gains.to_dict() == pytest.approx({n: mean_weight(run.recipe(n)) for n in range(BUDGET)}, abs=1e-4)


@pytest.mark.parametrize("asked", [1, 8])
def test_a_driver_killed_again_and_again_over_a_trial_makes_no_other_of_it(tmp_path: Path, asked: int) -> None:
    for fault in (f"ask.after:{asked}", "ask.after:1", "outcome.before:1"):
        killed = driver(tmp_path, fault)
        killed.join(60)
        assert killed.exitcode == -signal.SIGKILL
    after = driver(tmp_path)
    after.join(60)
    assert after.exitcode == 0
    assert_whole(tmp_path)


def test_a_driver_killed_at_random_times_loses_nothing(tmp_path: Path) -> None:
    rng = random.Random(0)
    patience, kills, seen, process = 0.2, 0, 0, driver(tmp_path)
    process.join(rng.uniform(0, patience))
    while process.exitcode is None:
        process.kill()
        process.join()
        kills += 1
        patience *= 1.0 if progress(tmp_path) > seen else 1.3  # else a slow machine would never come to an end
        seen = progress(tmp_path)
        process = driver(tmp_path)
        process.join(rng.uniform(0, patience))
    assert process.exitcode == 0
    assert kills >= 3
    assert_whole(tmp_path, most_trials=BUDGET + kills)  # a trial without params is given up


def progress(folder: Path) -> int:
    """Outcome files on the disk."""
    return len(list(folder.glob("toy/outcomes/*.parquet")))
