"""The figures of a run are recomputed from its outcomes, and points are picked by them."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import pytest

from evals.objectives import Scale, draw_objectives, objectives
from evals.outcomes import OUTCOME_COLUMNS, Outcome
from optimizer.errors import RunError
from optimizer.run import Run, open_run
from optimizer.runs.comparison import FOUND, LINES
from optimizer.runs.front import hypervolume, losses
from optimizer.runs.run_folder import RunFolder
from optimizer.views.report import report_html
from optimizer.views.tables import front_document
from tests.toy_run import toy_run

pytestmark = pytest.mark.slow  # whole studies are run


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


def test_front_runs_from_least_to_most_forgetting(run: Run) -> None:
    front = run.front()
    assert front["forgetting"].is_monotonic_increasing
    assert front["domain"].is_monotonic_increasing
    assert front["holdout_domain"].notna().all()
    by_holdout = run.front("holdout")
    assert by_holdout["holdout_forgetting"].is_monotonic_increasing
    with pytest.raises(RunError, match="a suite is search or holdout"):
        run.front("test")


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


def test_what_was_found_is_compared_with_the_best_of_the_lines(run: Run) -> None:
    pays, points = run.does_search_pay(), run.points("holdout")
    assert len(pays)
    for row in pays.to_dict("records"):
        for trial, gain in ((row["trial"], row["domain"]), (row["line_trial"], row["line_domain"])):
            assert gain == points["domain"][trial]
            assert run.within(row["limit"], "search")[trial] >= 0.9
        assert run.kinds[row["line_trial"]].role in LINES
        assert run.kinds[row["trial"]].role in FOUND
        assert row["low"] <= row["difference"] <= row["high"]
    assert len(run.verdict()) == len(pays)


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
    bold, sure = run.best(limit, sure=0.0), run.best(limit)
    points = run.points()
    assert points["forgetting"][sure] < points["forgetting"][bold]
    assert run.within(limit, "search")[sure] >= 0.9 > run.within(limit, "search")[bold]
    assert run.how_sure(bold, limit).startswith("In ")
    monkeypatch.setattr(Run, "within", lambda *_: pd.Series(0.5, index=points.index))
    with pytest.raises(RunError, match=r"in 90 % of resamplings; allow more forgetting, be less sure \(--sure\)"):
        run.best(limit)


def test_each_limit_has_the_point_that_keeps_to_it_by_the_search_items(run: Run) -> None:
    answers = run.by_limit()
    assert len(answers) >= 2
    assert answers["domain"].notna().all()
    for limit, trial, kept in answers[["limit", "trial", "kept"]].itertuples(index=False):
        assert trial == run.best(limit)
        assert kept == run.within(limit, run.suite_of(trial))[trial]
        assert limit < run.reference()["forgetting"]
    assert [row["trial"] for row in front_document(run)["limits"]] == answers["trial"].tolist()
    assert "<h2>The most domain gain for a limit on forgetting</h2>" in report_html(run)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with points derived and learned, of which one was learned between searched ones."""
    path = tmp_path_factory.mktemp("runs") / "made"
    return open_run(toy_run(path, trials=12, derived=("regmean 0.4",), learned=(0.3, 0.6)))


def test_derived_and_learned_points_are_anchors_wherever_they_stand(made: Run) -> None:
    kinds = made.trials()["kind"]
    late = int(kinds.index[kinds == "learned p=0.60"][0])
    assert kinds[late - 1] == kinds[late + 1] == "search"
    assert set(made.anchors().index) == set(kinds.index[kinds != "search"])
    without = made.points()[made.points()["kind"] != "search"]
    covered = hypervolume(losses(without[list(made.objectives)]), losses(list(made.reference().values())))
    assert made.anchors_hypervolume() == pytest.approx(covered)
    growth = made.hypervolume().set_index("trial")
    assert growth["kind"].equals(made.points()["kind"])


def test_a_weight_for_every_tensor_is_shown_by_group_as_their_mean(made: Run) -> None:
    late = int(made.lessons().index[-1])
    recipe, weights = made.recipe(late), made.weights(late).set_index("group")["weight"]
    assert weights.index.tolist() == made.weights(0)["group"].tolist()
    names = [f"model.layers.3.self_attn.{part}_proj.weight" for part in "qk"]
    of_tensors = [recipe.value("weight", expert="clinical", group=name) for name in names]
    assert of_tensors[0] != of_tensors[1]
    assert weights["layer.03.attn"] == pytest.approx(np.mean(of_tensors))


def test_a_derived_expert_has_one_weight_in_every_group(made: Run) -> None:
    kinds = made.trials()["kind"]
    weights = made.weights(int(kinds.index[kinds == "derived regmean 0.4"][0]))
    assert weights["group"].tolist() == made.weights(0)["group"].tolist()
    assert set(weights["weight"]) == {1.0}


def test_lessons_are_those_of_learned_trials_and_missing_where_nothing_is_said(made: Run, tmp_path: Path) -> None:
    lessons = made.lessons()
    assert lessons["kind"].tolist() == ["learned p=0.30", "learned p=0.60"]
    assert lessons["preference"].tolist() == [0.3, 0.6]
    assert (lessons["kept"] < lessons["kept_before"]).all()
    path = tmp_path / "silent"
    shutil.copytree(made.path, path)
    with closing(sqlite3.connect(path / "study.db")) as connection:
        connection.execute("DELETE FROM trial_user_attributes WHERE key = 'lesson'")
        connection.commit()
    silent = open_run(path).lessons()
    assert silent["preference"].tolist() == [0.3, 0.6]  # the kind says it
    assert silent[["steps", "kept", "candidates"]].isna().all(axis=None)
    assert "What was learned" in report_html(open_run(path))
    assert open_run(toy_run(tmp_path / "plain", trials=12)).lessons().empty


def test_several_experts_have_an_objective_each(tmp_path: Path) -> None:
    run = open_run(toy_run(tmp_path / "toy", trials=8, experts=("clinical", "legal")))
    assert run.objectives == ("domain_clinical", "domain_legal", "forgetting")
    points = run.points()
    mean = points[["domain_clinical", "domain_legal"]].mean(axis=1)
    assert points["domain"].to_numpy() == pytest.approx(mean.to_numpy())
    assert run.knee() in run.front().index
    assert set(run.does_search_pay()["limit"]) <= {0.01, 0.02, 0.05, 0.1, 0.2}
    assert set(run.weights(run.knee())["expert"]) == {"clinical", "legal"}


def test_scores_can_be_rebuilt_from_the_files_alone(run: Run) -> None:
    folder = RunFolder(run.path)
    frame = pd.concat([folder.read_outcomes(trial, "search") for trial in run.points().index])
    again = objectives(draw_objectives(Scale(frame, run.tasks, "search", 0, {"clinical": 1})))
    assert np.array_equal(again["domain_low"], run.points()["domain_low"])


def test_the_figures_of_one_suite_bear_no_prefix(run: Run) -> None:
    both = run.points()
    for suite, prefix in (("search", ""), ("holdout", "holdout_")):
        points = run.points(suite)
        assert points.columns.tolist() == [name for name in both.columns if not name.startswith("holdout_")]
        for name in ("domain", "domain_low", "forgetting_high", "forgetting_stderr"):
            assert points[name].equals(both[f"{prefix}{name}"].rename(name))
        assert points["front"].equals(both["front"])


def test_unusable_holdout_outcomes_have_a_fault_before_any_figure_is_asked_for(tmp_path: Path) -> None:
    path = toy_run(tmp_path / "toy", trials=12)
    assert open_run(path).holdout_fault == ""
    (path / "outcomes" / "00000-holdout.parquet").unlink()
    assert open_run(path).holdout_fault.endswith("trial 0 has no holdout outcome")
    assert open_run(toy_run(tmp_path / "unscored", trials=12, holdout=False)).holdout_fault == ""


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run as it is with two sentinels."""
    return open_run(toy_run(tmp_path_factory.mktemp("runs") / "toy", trials=12, sentinel=True))


def test_sentinels_enter_no_figure_of_a_run(run: Run, watched: Run) -> None:
    pd.testing.assert_frame_equal(watched.points(), run.points())
    assert set(watched.retention(watched.knee())["task"]) == set(run.retention(run.knee())["task"])
    assert watched.findings() == run.findings()


def test_sentinels_are_told_against_the_base_for_front_and_anchors(watched: Run) -> None:
    frame = watched.sentinels()
    assert set(frame["trial"]) == {*watched.front().index, *watched.anchors().index}
    assert set(frame["task"]) == {"minimal_pairs", "letters"}
    base = frame[frame["trial"] == 0]
    assert (base[["change", "low", "high"]] == 0).all(axis=None)
    expert = frame[frame["trial"] == 1].set_index("task")
    assert expert["metric"].to_dict() == {"minimal_pairs": "acc", "letters": "bits_per_byte"}
    scores = {trial: watched.scores(trial, "holdout") for trial in (0, 1)}
    for task, sign in (("minimal_pairs", 1), ("letters", -1)):
        assert expert["change"][task] == pytest.approx(sign * (scores[1][task] - scores[0][task]))
        assert expert["low"][task] <= expert["change"][task] <= expert["high"][task] < 0
        assert expert["base_score"][task] == scores[0][task]


def test_there_is_no_sentinel_row_where_nothing_was_scored(run: Run, tmp_path: Path) -> None:
    assert run.sentinels().empty
    unjudged = open_run(toy_run(tmp_path / "toy", trials=12, sentinel=True, holdout=False))
    assert unjudged.sentinels().empty
    assert unjudged.sentinels().columns.tolist() == run.sentinels().columns.tolist()
    nothing = open_run(toy_run(tmp_path / "lost", trials=3, sentinel=True))
    (nothing.path / "outcomes" / "00000-holdout.parquet").unlink()
    assert nothing.sentinels().empty  # holdout_fault says why


def test_a_trial_that_left_the_front_has_no_sentinel_row(tmp_path: Path) -> None:
    run = open_run(toy_run(tmp_path / "toy", trials=12, sentinel=True))
    points = run.points()
    beaten = int(points.index[~points["front"] & (points["kind"] == "search")][0])
    frame = RunFolder(run.path).read_outcomes(run.knee(), "holdout")
    rows = [Outcome(*row) for row in frame[list(OUTCOME_COLUMNS)].itertuples(index=False)]
    RunFolder(run.path).write_outcomes(beaten, "holdout", run.recipe(beaten).digest, rows)
    again = open_run(run.path)
    assert again.suite_of(beaten) == "holdout"
    assert beaten not in set(again.sentinels()["trial"])
