"""The reading side: everything is recomputed, nothing is changed, and it works while a search is writing."""

from __future__ import annotations

import json
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import optuna
import pytest

from evals.outcomes import OUTCOME_COLUMNS, Outcome
from optimizer.errors import RunError
from optimizer.run import Run, open_run
from optimizer.runs.run_folder import RunFolder
from tests.toy_run import STUDY, toy_run, toy_space, toy_tasks

pytestmark = pytest.mark.slow  # whole studies are run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return open_run(toy_run(tmp_path_factory.mktemp("runs") / "toy", trials=12))


def test_trials_tell_how_each_ended(run: Run) -> None:
    trials = run.trials()
    assert trials["kind"].iloc[:3].tolist() == ["base", "expert:clinical", "uniform a=0.25"]
    failed = trials[trials["state"] == "fail"]
    assert failed["reason"].str.contains("not finite").all()
    assert "1 trial failed; most often: merge gave a tensor" in " ".join(run.findings())
    assert trials.loc[0, "recipe"] == run.recipe(0).digest


def test_a_point_is_picked_by_search_items_and_judged_on_others(run: Run) -> None:
    front = run.front()
    worst = run.reference()["forgetting"]
    assert run.knee() == (front["domain"] - front["forgetting"] / worst).idxmax()
    chosen = run.best(0.1)
    surely = run.within(0.1, "search")[front.index] >= 0.9
    assert surely[chosen]
    assert (front.loc[surely, "domain"] <= front.loc[chosen, "domain"]).all()
    with pytest.raises(RunError, match="no point of run toy forgets at most"):
        run.best(-1.0)
    assert "items the search never saw" in run.describe(chosen)
    unjudged = run.points()["holdout_domain"].isna().idxmax()
    assert "items the search used" in run.describe(unjudged)


def test_weights_follow_the_recipe(run: Run) -> None:
    weights = run.weights(run.knee())
    recipe = run.recipe(run.knee())
    assert weights["group"].iloc[[0, 1, -1]].tolist() == ["embed", "layer.00.attn", "head"]
    assert weights["layer"].tolist() == [*sorted(weights["layer"].iloc[:-1]), -1]
    for row in weights.itertuples():
        assert row.weight == recipe.value("weight", expert="clinical", group=row.group)


def test_a_trial_that_is_not_there_is_refused_with_those_that_are(run: Run) -> None:
    last = len(run.trials()) - 1
    failed = int(run.trials().query("state == 'fail'").index[0])
    for look in (run.weights, run.recipe, run.named, run.retention, run.describe):
        for number in (999, -1):
            with pytest.raises(RunError, match=f"run toy has no trial {number}; it has trials 0 to {last}"):
                look(number)
    for look in (run.retention, run.describe):
        with pytest.raises(RunError, match=f"trial {failed} of run toy is not scored: fail, merge gave a tensor"):
            look(failed)
    with pytest.raises(RunError, match="run toy has no trial 999"):
        run.how_sure(999, 0.1)


def test_reading_changes_no_file(tmp_path: Path) -> None:
    path = toy_run(tmp_path / "toy", trials=12)
    before = {file: sha256(file.read_bytes()).digest() for file in path.rglob("*") if file.is_file()}
    open_run(path).summary()
    assert {file: sha256(file.read_bytes()).digest() for file in path.rglob("*") if file.is_file()} == before


def test_a_run_can_be_read_while_it_is_written(tmp_path: Path) -> None:
    path = toy_run(tmp_path / "toy", trials=12)
    writer = RunFolder(path)
    with writer.lock():
        study = optuna.load_study(study_name=None, storage=writer.storage())
        trial = study.ask()
        scored = [Outcome(*row) for row in writer.read_outcomes(8, "search")[list(OUTCOME_COLUMNS)].to_numpy()]
        writer.write_outcomes(trial.number, "search", "digest", scored)
        run = open_run(path)
        assert run.trials().loc[trial.number, "state"] == "running"
        assert trial.number not in run.points().index  # scored, but not told yet


def test_a_run_without_a_finished_trial(tmp_path: Path) -> None:
    infos = [task.info for task in toy_tasks(("clinical",))]
    folder = RunFolder.create_or_resume(tmp_path / "toy", STUDY, {}, tasks=infos)
    run = open_run(folder.path)
    assert run.front().empty
    assert "No finished trial yet" in run.summary()
    assert run._repr_html_()
    study = optuna.create_study(storage=folder.storage(), directions=["maximize", "minimize"])
    anchor = toy_space().anchors()[0]
    study.enqueue_trial(anchor.params, user_attrs={"kind": "base"})
    study.ask(toy_space().distributions())
    run = open_run(folder.path)
    assert list(run.points().columns) == list(open_run(toy_run(tmp_path / "full", trials=12)).points().columns)
    with pytest.raises(RunError, match="No finished trial yet"):
        run.knee()


def test_what_is_not_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="does not exist"):
        open_run(tmp_path / "nothing")
    with pytest.raises(RunError, match="is not a run folder"):
        open_run(tmp_path)


def test_a_crafted_recipe_is_refused(tmp_path: Path) -> None:
    path = toy_run(tmp_path / "toy", trials=12)
    study = optuna.load_study(study_name=None, storage=RunFolder(path).storage())
    study.add_trial(optuna.trial.create_trial(values=[0.0, 0.0], user_attrs={"recipe": json.dumps({"method": "!"})}))
    with pytest.raises(RunError, match=f"trial {len(study.trials) - 1} has a recipe that cannot be read"):
        open_run(path).trials()


def test_reading_needs_no_torch_ray_or_lm_eval(tmp_path: Path) -> None:
    path = toy_run(tmp_path / "toy", trials=12)
    code = (
        "import sys; from optimizer.run import open_run; from optimizer.views.report import report_html\n"
        "run = open_run(sys.argv[1]); run.summary(); report_html(run)\n"
        "print(sorted({'torch', 'ray', 'lm_eval', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
