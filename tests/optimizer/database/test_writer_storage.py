"""The one writer's storage: Optuna reads what it writes as its own, and nothing is half written."""

from __future__ import annotations

import json
import random
import sqlite3
from contextlib import closing
from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState

from optimizer.database.study_db import open_storage, read_storage
from optimizer.database.trial_rows import read_rows
from optimizer.database.writer_storage import WriterStorage

DIRECTIONS = ["maximize", "minimize"]


@pytest.fixture
def database(tmp_path: Path) -> Path:
    storage = open_storage(tmp_path / "study.db")
    optuna.create_study(study_name="toy", storage=storage, directions=DIRECTIONS)
    storage.engine.dispose()
    return tmp_path / "study.db"


def search(study: optuna.Study, storage: BaseStorage, seed: int) -> None:
    """Ask, write and tell at random: trials that are queued, finish in every way, or stay open."""
    luck = random.Random(seed)
    study.enqueue_trial({"a": 0.25, "word": "x"}, user_attrs={"kind": "base"})
    study.enqueue_trial({}, user_attrs={"kind": "waits"})
    for turn in range(12):
        trial = study.ask()
        word = trial.suggest_categorical("word", ["x", "y"])
        trial.suggest_float("a", 0.0, 1.0)
        if word == "x":
            trial.suggest_int("n", 1, 9, step=2)
        trial.set_user_attr("recipe", json.dumps({"turn": turn}))
        trial.set_user_attr("recipe", "twice")
        trial.set_constraint("limit", luck.random() - 0.5)
        match luck.randrange(4):
            case 0:
                study.tell(trial, [luck.random(), float("inf")])
            case 1:
                study.tell(trial, state=TrialState.FAIL)
            case 2:
                continue
            case _:
                study.tell(trial.number, [luck.random(), -0.0])
    study.enqueue_trial({"a": 0.5}, user_attrs={"kind": "queued"})


def plain(trials: list[FrozenTrial]) -> list[object]:
    """Trials without the times, in which two searches differ."""
    return [
        (t.number, t.state, t.values, t.params, t.distributions, t.user_attrs, t.system_attrs, t._trial_id)
        for t in trials
    ]


@pytest.mark.parametrize("seed", [0, 2])
def test_what_it_writes_optuna_reads_as_its_own(database: Path, tmp_path: Path, seed: int) -> None:
    storage = open_storage(database)
    ours = WriterStorage(storage, "toy")
    search(optuna.Study("toy", ours, sampler=optuna.samplers.RandomSampler(seed=seed)), ours, seed)
    for trial in ours.get_all_trials(1, states=(TrialState.RUNNING,)):
        ours.write(trial._trial_id)

    theirs = RDBStorage(f"sqlite:///{tmp_path / 'theirs.db'}")
    study = optuna.create_study(
        study_name="toy", storage=theirs, directions=DIRECTIONS, sampler=optuna.samplers.RandomSampler(seed=seed)
    )
    search(study, theirs, seed)
    expected = plain(theirs.get_all_trials(1))
    assert {trial.state for trial in theirs.get_all_trials(1)} == {
        TrialState.COMPLETE,
        TrialState.FAIL,
        TrialState.RUNNING,
        TrialState.WAITING,
    }

    assert plain(ours.get_all_trials(1)) == expected
    assert plain(RDBStorage(f"sqlite:///{database}").get_all_trials(1)) == expected
    assert read_rows(storage.engine, 1) == storage.get_all_trials(1)
    assert WriterStorage(storage, "toy").get_all_trials(1) == storage.get_all_trials(1)


def test_a_trial_is_on_the_disk_whole_or_without_its_parameters(database: Path) -> None:
    ours = WriterStorage(open_storage(database), "toy")
    study = optuna.Study("toy", ours)
    trial = study.ask()
    for name in "abc":
        trial.suggest_float(name, 0.0, 1.0)
    trial.set_user_attr("recipe", "{}")

    def on_disk() -> FrozenTrial:
        return read_storage(database).get_all_trials(1)[0]

    assert (on_disk().state, on_disk().params, on_disk().user_attrs) == (TrialState.RUNNING, {}, {})
    ours.write(trial._trial_id)
    assert on_disk().params == trial.params
    assert on_disk().user_attrs == {"recipe": "{}"}
    trial.set_user_attr("seconds", 3.0)
    study.tell(trial, [1.0, 2.0])
    assert on_disk().user_attrs == {"recipe": "{}", "seconds": 3.0}
    assert on_disk().values == [1.0, 2.0]


def test_a_parameter_keeps_its_distribution_and_a_finished_trial_its_values(database: Path) -> None:
    ours = WriterStorage(open_storage(database), "toy")
    study = optuna.Study("toy", ours)
    first, second = study.ask(), study.ask()
    first.suggest_float("a", 0.0, 1.0)
    with pytest.raises(ValueError, match="Cannot set different distribution kind"):
        ours.set_trial_param(second._trial_id, "a", 0, CategoricalDistribution(["x"]))
    study.tell(first, [1.0, 2.0])
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        ours.set_trial_user_attr(first._trial_id, "reason", "late")
    ours.set_trial_param(second._trial_id, "a", 0.5, FloatDistribution(0.0, 2.0))
    ours.set_trial_param(second._trial_id, "n", 3, IntDistribution(1, 9, step=2))
    assert ours.get_trial(second._trial_id).params == {"a": 0.5, "n": 3}


def test_a_step_that_cannot_be_written_is_not_in_memory_either(database: Path) -> None:
    storage = open_storage(database, busy_seconds=0.1)
    ours = WriterStorage(storage, "toy")
    study = optuna.Study("toy", ours)
    trial = study.ask()
    with closing(sqlite3.connect(database, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(Exception, match="locked"):
            study.tell(trial, [1.0, 2.0])
        assert ours.get_trial(trial._trial_id).state == TrialState.RUNNING
        other.execute("ROLLBACK")
    study.tell(trial, [1.0, 2.0])
    assert read_storage(database).get_all_trials(1)[0].values == [1.0, 2.0]
