"""What derived, learned and searched points add: the front of each set, on the items that judge."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from evals.objectives import Draws
from optimizer.run import Run, open_run
from optimizer.runs.families import SETS, fronts_by_set, what_sets_cover
from optimizer.runs.front import hypervolume, losses, on_front
from optimizer.runs.trial import Role
from tests.toy_run import toy_run

pytestmark = pytest.mark.slow  # whole studies are run

NAMES = ("domain", "forgetting")
ROLES = (Role.BASE, Role.EXPERT, Role.UNIFORM, Role.DERIVED, Role.LEARNED, Role.SEARCHED)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    path = tmp_path_factory.mktemp("runs") / "toy"
    return open_run(toy_run(path, trials=12, derived=("regmean 0.2",), learned=(0.3, 0.6)))


def table(run: Run) -> pd.DataFrame:
    return run.what_pays().set_index("set")


def test_each_set_is_judged_on_the_holdout_items_by_its_own_front(run: Run) -> None:
    points, reference = run.points(), run.reference()
    corner = losses([reference[name] for name in NAMES])
    extra = {"derived": "+ derived", "learned": "+ learned", "search": "+ searched"}
    family = [extra.get(kind.split(" ")[0], "anchors") for kind in points["kind"]]
    for name, row in table(run).iterrows():
        chosen = points[[one in ("anchors", name) or name == "all" for one in family]]
        is_learned = chosen["kind"].str.startswith("learned")
        front = chosen[on_front(losses(chosen[list(NAMES)]), is_learned)]
        unseen = losses(front[["holdout_domain", "holdout_forgetting"]])
        assert row["points"] == len(front)
        assert row["suite"] == "holdout"
        assert row["hypervolume"] == pytest.approx(hypervolume(unseen, corner))


def test_the_difference_is_to_anchors_and_searched_points(run: Run) -> None:
    rows = table(run)
    assert rows.index.tolist() == list(SETS)
    without = rows.loc["+ searched"]
    assert (without[["share", "low", "high"]] == 0).all()
    assert rows["share"].tolist() == pytest.approx((rows["hypervolume"] / without["hypervolume"] - 1).tolist())
    assert (rows["low"] <= rows["share"]).all()
    assert (rows["share"] <= rows["high"]).all()


def test_the_interval_is_paired() -> None:
    """Luck that all points share cancels: of two sets that rise and fall together one has always a tenth more."""
    luck = np.random.default_rng(0).uniform(0.5, 1.5, (500, 1))
    domain, forgetting = np.array([0.0, 1.0, 0.5, 0.55]), np.array([0.0, 0.4, 0.1, 0.1])
    draws = Draws(
        np.arange(4),
        {"domain": domain, "forgetting": forgetting},
        {"domain": luck * domain, "forgetting": np.tile(forgetting, (500, 1))},
    )
    fronts = {"+ searched": [0, 2], "all": [0, 3]}
    every = what_sets_cover(draws, fronts, names=NAMES, corner=[0.0, 0.4]).set_index("set").loc["all"]
    assert every[["share", "low", "high"]].tolist() == pytest.approx([0.1, 0.1, 0.1])


def test_where_others_cover_nothing_there_is_no_share() -> None:
    draws = Draws(
        np.arange(2),
        {"domain": np.array([0.0, 0.5]), "forgetting": np.array([0.0, 0.1])},
        {"domain": np.array([[0.0, 0.5]]), "forgetting": np.array([[0.0, 0.1]])},
    )
    every = what_sets_cover(draws, {"anchors": [0], "all": [0, 1]}, names=NAMES, corner=[0.0, 0.4]).iloc[1]
    assert every["hypervolume"] == pytest.approx(0.15)
    assert every[["share", "low", "high"]].isna().all()


@pytest.mark.parametrize(("nothing", "high"), [(1, 0.1), (100, np.inf)])
def test_resamplings_in_which_the_others_cover_nothing_leave_the_interval_there(nothing: int, high: float) -> None:
    domain = np.tile([0.0, 1.0, 0.5, 0.55], (500, 1))
    domain[:nothing, 1:3] = -1.0
    forgetting = np.array([0.0, 0.4, 0.1, 0.1])
    draws = Draws(
        np.arange(4),
        {"domain": domain[-1], "forgetting": forgetting},
        {"domain": domain, "forgetting": np.tile(forgetting, (500, 1))},
    )
    fronts = {"+ searched": [0, 2], "all": [0, 3]}
    every = what_sets_cover(draws, fronts, names=NAMES, corner=[0.0, 0.4]).set_index("set").loc["all"]
    assert every[["share", "low", "high"]].tolist() == pytest.approx([0.1, 0.1, high])


def test_a_set_without_a_point_of_its_own_is_left_out() -> None:
    minimised = pd.DataFrame({"domain": [0.0, -1.0, -0.5], "forgetting": [0.0, 0.4, 0.1]}, index=[0, 1, 5])
    roles = pd.Series([Role.BASE, Role.EXPERT, Role.SEARCHED], index=minimised.index)
    assert fronts_by_set(minimised, roles) == {"anchors": [0, 1], "+ searched": [0, 1, 5], "all": [0, 1, 5]}


def test_what_was_fitted_to_the_items_hides_no_searched_point_of_a_set() -> None:
    minimised = pd.DataFrame({"domain": [0.0, -0.8, -0.7], "forgetting": [0.0, 0.1, 0.2]}, index=[0, 1, 2])
    roles = pd.Series([Role.BASE, Role.LEARNED, Role.SEARCHED], index=minimised.index)
    assert fronts_by_set(minimised, roles)["all"] == [0, 1]
    assert fronts_by_set(minimised, roles, fitted={1})["all"] == [0, 1, 2]


def test_all_is_the_front_that_the_run_reports(run: Run) -> None:
    assert table(run).loc["all", "points"] == run.points()["front"].sum()


def test_a_front_point_without_holdout_scores_leaves_all_to_the_search_items(tmp_path: Path) -> None:
    path = toy_run(tmp_path / "toy", trials=12, learned=(0.6,))
    whole = open_run(path)
    front = whole.points()[whole.points()["front"]]
    searched = front.index[front["kind"] == "search"]
    assert len(searched)
    (path / "outcomes" / f"{searched[0]:05d}-holdout.parquet").unlink()
    assert set(whole.what_pays()["suite"]) == {"holdout"}
    assert set(open_run(path).what_pays()["suite"]) == {"search"}


def test_several_experts_and_no_made_points(tmp_path: Path) -> None:
    run = open_run(toy_run(tmp_path / "two", trials=6, experts=("clinical", "legal"), learned=(0.6,)))
    assert table(run).index.tolist() == ["anchors", "+ learned", "+ searched", "all"]
    plain = open_run(toy_run(tmp_path / "plain", trials=12))
    assert not plain.has_prepared_points
    assert table(plain).loc["all", "share"] == 0
