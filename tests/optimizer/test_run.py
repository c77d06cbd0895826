"""The reading side: everything is recomputed, nothing is changed, and it works while a search is writing."""

from __future__ import annotations

import html
import io
import json
import subprocess
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import pytest
from rich.console import Console

from evals.objectives import draw_objectives, objectives
from evals.outcomes import OUTCOME_COLUMNS, Outcome
from optimizer.errors import RunError
from optimizer.run import Run, open_run
from optimizer.runs.run_folder import RunFolder
from optimizer.views.report import report_html
from optimizer.views.sentences import gap_sentence
from optimizer.views.tables import front_document, print_front, status_document
from tests.toy_run import STUDY, toy_run, toy_space, toy_tasks


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return open_run(toy_run(tmp_path_factory.mktemp("runs") / "toy", trials=12))


def told(run: Run) -> pd.DataFrame:
    """What the study was told, by trial."""
    storage = RunFolder(run.path).storage()
    trials = optuna.load_study(study_name=None, storage=storage).trials
    return pd.DataFrame({t.number: t.values for t in trials if t.values}, index=list(run.objectives)).T


def test_points_are_recomputed_and_equal_what_the_study_was_told(run: Run) -> None:
    points = run.points()
    assert points[list(run.objectives)].to_numpy() == pytest.approx(told(run).to_numpy())
    assert points.loc[0, ["domain", "forgetting"]].tolist() == [0.0, 0.0]
    assert points.loc[1, "domain"] == 1.0
    assert (points["domain_low"] <= points["domain"]).all()
    assert points["front"].sum() == len(run.front())


def test_trials_tell_how_each_ended(run: Run) -> None:
    trials = run.trials()
    assert trials["kind"].iloc[:3].tolist() == ["base", "expert:clinical", "uniform a=0.25"]
    failed = trials[trials["state"] == "fail"]
    assert failed["reason"].str.contains("not finite").all()
    assert "1 trial failed; most often: merge gave a tensor" in " ".join(run.findings())
    assert trials.loc[0, "recipe"] == run.recipe(0).digest


def test_front_runs_from_least_to_most_forgetting(run: Run) -> None:
    front = run.front()
    assert front["forgetting"].is_monotonic_increasing
    assert front["domain"].is_monotonic_increasing
    assert front["holdout_domain"].notna().all()
    by_holdout = run.front("holdout")
    assert by_holdout["holdout_forgetting"].is_monotonic_increasing
    with pytest.raises(RunError, match="a suite is search or holdout"):
        run.front("test")


def test_a_point_is_picked_by_search_items_and_judged_on_others(run: Run) -> None:
    front = run.front()
    worst = run.reference()["forgetting"]
    assert run.knee() == (front["domain"] - front["forgetting"] / worst).idxmax()
    chosen = run.best(0.1)
    assert front.loc[chosen, "forgetting"] <= 0.1
    assert (front.loc[front["forgetting"] <= 0.1, "domain"] <= front.loc[chosen, "domain"]).all()
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
    for look in (run.weights, run.recipe, run.named, run.retention, run.describe, run.does_search_pay):
        for number in (999, -1):
            with pytest.raises(RunError, match=f"run toy has no trial {number}; it has trials 0 to {last}"):
                look(number)
    for look in (run.retention, run.describe, run.does_search_pay):
        with pytest.raises(RunError, match=f"trial {failed} of run toy is not scored: fail, merge gave a tensor"):
            look(failed)
    with pytest.raises(RunError, match="run toy has no trial 999"):
        run.how_sure(999, 0.1)


def test_a_limit_is_a_share_and_may_ask_for_better_than_the_base(run: Run) -> None:
    for limit in (5.0, -5.0, float("nan")):
        with pytest.raises(RunError, match=r"a limit on forgetting is a share: 5 % is 0.05"):
            run.best(limit)
    with pytest.raises(RunError, match=r"how sure to be is a share: 90 % is 0.9; given 90"):
        run.best(0.1, sure=90)
    with pytest.raises(RunError, match="no point of run toy forgets at most -90 %"):
        run.best(-0.9)


def test_retention_turns_forgetting_into_what_is_kept(run: Run) -> None:
    base = run.retention(0)
    assert base["share"].tolist() == [0.0, 0.0, 1.0, 1.0, 1.0]
    knee = run.retention(run.knee())
    assert ((knee["low"] <= knee["share"]) & (knee["share"] <= knee["high"])).all()
    general = knee[knee["role"] == "general"]
    assert 1 - general["share"].mean() == pytest.approx(run.points().loc[run.knee(), "holdout_forgetting"])


def test_hypervolume_never_falls_and_ends_above_the_anchors(run: Run) -> None:
    growth = run.hypervolume()
    assert growth["hypervolume"].is_monotonic_increasing
    assert growth["trial"].tolist() == run.points().index.tolist()
    assert growth["hypervolume"].iloc[-1] >= run.anchors_hypervolume() > 0


def test_search_against_a_line_is_the_difference_of_the_objectives(run: Run) -> None:
    on_line = run.points().index[run.points()["kind"] == "uniform a=0.50"][0]
    gap = run.does_search_pay(int(on_line))
    assert gap["line"].tolist() == ["uniform", "slope"]
    uniform = gap.iloc[0]
    assert uniform["difference"] == pytest.approx(0)  # it is on that line
    assert uniform["low"] <= uniform["high"] <= 1e-9
    knee = run.does_search_pay()
    assert knee["difference"].to_numpy() == pytest.approx((knee["domain"] - knee["line_domain"]).to_numpy())
    assert ((knee["low"] <= knee["difference"]) & (knee["difference"] <= knee["high"])).all()
    assert len(run.verdict()) == 2


def test_a_trial_that_forgets_less_than_any_line_is_held_against_its_least(run: Run) -> None:
    gap = run.does_search_pay().iloc[0].to_dict() | {"forgetting": -0.01, "line_forgetting": 0.0, "line_domain": 0.0}
    sentence = (
        "No point with one weight for all layers forgets so little; the nearest, at 0.0 %, keeps 0.0 % of the gain"
    )
    assert gap_sentence(gap).startswith(sentence)


def test_how_sure_a_limit_is_kept(run: Run) -> None:
    limits = np.linspace(-0.2, 0.6, 9)
    shares = np.array([run.within(limit, "search") for limit in limits])  # (9, trials)
    assert (np.diff(shares, axis=0) >= 0).all()  # more forgetting allowed, surer
    assert (shares[:, 0] == (limits >= 0)).all()  # the base forgets nothing, in any resampling
    points = run.points()
    for trial, middle in points["forgetting"].iloc[1:].items():
        assert 0.2 < run.within(middle, "search")[trial] < 0.8
    assert (run.within(0.9, "holdout").index == points.index[points["holdout_domain"].notna()]).all()


def test_the_surer_the_limit_the_less_is_taken(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = float(run.front()["forgetting"].median())
    bold, sure = run.best(limit), run.best(limit, sure=0.9)
    points = run.points()
    assert points["forgetting"][sure] < points["forgetting"][bold]
    assert run.within(limit, "search")[sure] >= 0.9 > run.within(limit, "search")[bold]
    assert run.how_sure(bold, limit).startswith("In ")
    monkeypatch.setattr(Run, "within", lambda *_: pd.Series(0.5, index=points.index))
    with pytest.raises(RunError, match=r"in 90 % of resamplings; allow more forgetting"):
        run.best(limit, sure=0.9)


def test_each_limit_has_the_point_that_keeps_to_it_by_the_search_items(run: Run) -> None:
    answers = run.by_limit()
    assert len(answers) >= 2
    assert answers["domain"].notna().all()
    for limit, trial, kept in answers[["limit", "trial", "kept"]].itertuples(index=False):
        assert trial == run.best(limit, sure=0.9)
        assert kept == run.within(limit, run.suite_of(trial))[trial]
        assert limit < run.reference()["forgetting"]
    assert [row["trial"] for row in front_document(run)["limits"]] == answers["trial"].tolist()
    assert "<h2>The most domain gain for a limit on forgetting</h2>" in report_html(run)


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


def test_a_run_without_holdout_scores_says_so(tmp_path: Path) -> None:
    run = open_run(toy_run(tmp_path / "toy", trials=12, holdout=False))
    assert run.points()["holdout_domain"].isna().all()
    assert "items the search used" in run.summary()
    assert set(run.does_search_pay()["suite"]) <= {"search"}


def test_several_experts_have_an_objective_each(tmp_path: Path) -> None:
    run = open_run(toy_run(tmp_path / "toy", trials=8, experts=("clinical", "legal")))
    assert run.objectives == ("domain_clinical", "domain_legal", "forgetting")
    points = run.points()
    mean = points[["domain_clinical", "domain_legal"]].mean(axis=1)
    assert points["domain"].to_numpy() == pytest.approx(mean.to_numpy())
    assert run.knee() in run.front().index
    assert run.does_search_pay().empty
    assert set(run.weights(run.knee())["expert"]) == {"clinical", "legal"}


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


def test_scores_can_be_rebuilt_from_the_files_alone(run: Run) -> None:
    folder = RunFolder(run.path)
    frame = pd.concat([folder.read_outcomes(trial, "search") for trial in run.points().index])
    again = objectives(draw_objectives(frame, tasks=run.tasks, suite="search", base=0, experts={"clinical": 1}))
    assert np.array_equal(again["domain_low"], run.points()["domain_low"])


NOT_BETTER = "The search found no better one."


def test_a_knee_that_needs_no_search_is_said_to_need_none(tmp_path: Path) -> None:
    run = open_run(toy_run(tmp_path / "toy", trials=0))
    assert run.does_search_pay().empty
    assert run.verdict() == [f"The knee needs no search: it is {run.points()['kind'][run.knee()]}. {NOT_BETTER}"]


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
