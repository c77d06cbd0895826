"""Certificates err as seldom as they say, and their losses are the study's own objectives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks.certify import LOSS_FREE, Truth, study_losses
from evals.certificates import Hypothesis, Part, Start, items_for, play, smallest_limit, start_of, verdicts
from evals.errors import TaskError
from evals.hypotheses import Known, estimate, forgetting_hypotheses, gain_hypothesis
from evals.outcomes import HOLDOUT
from optimizer.run import Run, open_run
from tests.toy_run import toy_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return open_run(toy_run(tmp_path_factory.mktemp("runs") / "toy"))


def known_of(run: Run, trial: int, items: int = 50) -> Known:
    assert run.references is not None
    base, experts = run.references
    sizes = {task.name: items for task in run.tasks}
    return Known(run.outcomes(HOLDOUT), base, trial, experts, run.tasks, sizes)


def part(task: str, items: int) -> Part:
    return Part(task, items, base=0.9, candidate=-1.0, experts={}, constant=0.025, most=0.925, is_bounded=False)


@pytest.mark.parametrize("limit", [0.03, 0.2])
def test_the_mean_loss_is_the_objective_less_the_limit(run: Run, limit: float) -> None:
    """On the items that the scale is from: bits per byte, accuracies above chance, several tasks of each role."""
    for trial in run.front().index[1:]:
        known = known_of(run, int(trial))
        (hypothesis,) = forgetting_hypotheses(known, limit, each_task=False, delta=0.1)
        points = run.points(HOLDOUT).loc[trial]
        assert estimate(known, hypothesis.parts)[0] == pytest.approx(points["forgetting"] - limit, abs=1e-12)
        gain = gain_hypothesis(known, limit, delta=0.1)
        assert estimate(known, gain.parts)[0] == pytest.approx(limit - points["domain"], abs=1e-12)


def test_with_task_weights_it_is_the_objective_still(run: Run, tmp_path: Path) -> None:
    weighed = tmp_path / "weighed"
    shutil.copytree(run.path, weighed)
    manifest = json.loads((weighed / "tasks.json").read_text())
    for entry, weight in zip(manifest["tasks"], (3.0, 0.5, 2.0, 1.0), strict=False):
        entry["weight"] = weight
    (weighed / "tasks.json").write_text(json.dumps(manifest))
    other = open_run(weighed)
    assert len({task.weight for task in other.tasks}) > 1
    judged = other.points(HOLDOUT)["domain"].dropna().index
    front = [trial for trial in judged if not other.kinds[trial].is_reference]
    assert front
    for trial in front:
        points, before = other.points(HOLDOUT).loc[trial], run.points(HOLDOUT).loc[trial]
        assert points["forgetting"] != before["forgetting"]
        (hypothesis,) = forgetting_hypotheses(known_of(other, int(trial)), 0.1, each_task=False, delta=0.1)
        assert estimate(known_of(other, int(trial)), hypothesis.parts)[0] == pytest.approx(points["forgetting"] - 0.1)
        gain = gain_hypothesis(known_of(other, int(trial)), 0.1, delta=0.1)
        assert estimate(known_of(other, int(trial)), gain.parts)[0] == pytest.approx(0.1 - points["domain"])


def test_each_task_has_the_mean_loss_of_its_own_forgetting(run: Run) -> None:
    trial = int(run.front().index[-1])
    known, kept = known_of(run, trial), run.retention(trial, HOLDOUT).set_index("task")
    for one in forgetting_hypotheses(known, 0.05, each_task=True, delta=0.1):
        assert estimate(known, one.parts)[0] == pytest.approx(1 - kept.loc[one.parts[0].task, "share"] - 0.05)


def test_a_gain_of_several_experts_is_the_mean_of_theirs(tmp_path: Path) -> None:
    run = open_run(toy_run(tmp_path / "two", experts=("clinical", "legal"), trials=6))
    trial = int(run.front().index[1])
    gain = gain_hypothesis(known_of(run, trial), 0.4, delta=0.1)
    expected = 0.4 - run.points(HOLDOUT).loc[trial, "domain"]
    assert estimate(known_of(run, trial), gain.parts)[0] == pytest.approx(expected)


def test_no_loss_is_above_the_largest(run: Run) -> None:
    known = known_of(run, int(run.front().index[-1]))
    for hypothesis in [
        *forgetting_hypotheses(known, 0.1, each_task=False, delta=0.1),
        gain_hypothesis(known, 0.5, delta=0.1),
    ]:
        for one in (one for one in hypothesis.parts if not one.is_bounded):
            grid = np.array(np.meshgrid([0.0, 1.0], [0.0, 1.0], [0.0, 1.0])).reshape(3, -1)
            values = {"base": grid[0], "candidate": grid[1], **dict.fromkeys(known.experts, grid[2])}
            losses, above = one.losses(values, np.ones(8))
            assert losses.max() == pytest.approx(one.most)
            assert above == 0


def test_a_loss_above_a_stated_bound_counts_as_it_and_is_told(run: Run) -> None:
    known = known_of(run, int(run.front().index[-1]))
    (hypothesis,) = forgetting_hypotheses(known, 0.1, each_task=False, delta=0.1)
    (text,) = (one for one in hypothesis.parts if one.is_bounded)
    losses, above = text.losses(
        {"base": np.array([900.0, 900.0]), "candidate": np.array([910.0, 1e9])}, np.full(2, 1e3)
    )
    assert above == 1
    assert losses[1] == text.most
    assert losses[0] < text.most


def test_a_task_without_items_cannot_be_certified(run: Run) -> None:
    with pytest.raises(TaskError, match="has no items for certificates"):
        forgetting_hypotheses(known_of(run, 3, items=0), 0.1, each_task=True, delta=0.1)


def test_a_round_has_items_of_every_task_as_many_as_it_can_have() -> None:
    hypothesis = Hypothesis("forgetting", 0.1, (part("few", 4), part("many", 10)), Start(0.0, 1.0, 5.0))
    few, many = np.arange(4.0), np.arange(10.0)
    expected = few + np.array([np.mean(many[a:b]) for a, b in ((0, 2), (2, 5), (5, 7), (7, 10))])
    assert hypothesis.round_losses({"few": few, "many": many}) == pytest.approx(expected)
    assert hypothesis.round_losses({"few": few, "many": many[:6]}) == pytest.approx(expected[:2])
    assert hypothesis.round_losses({"few": few[:1], "many": many}) == pytest.approx(expected[:1])


def test_a_bet_knows_nothing_of_what_comes() -> None:
    losses = np.random.default_rng(0).uniform(-1, 0.9, (2, 30))
    losses[1, :20] = losses[0, :20]
    game = play(losses, most=0.9, start=start_of(0.05, 0.3, 0.1))
    assert (game.bets[0, :21] == game.bets[1, :21]).all()
    assert (game.bets >= 0).all()
    assert game.capital[0] == pytest.approx(np.cumprod(1 - game.bets[0] * losses[0]))
    assert (1 - game.bets * 0.9 > 0).all()


def test_what_ends_a_game_is_what_comes_first() -> None:
    quiet, bad = [-0.1, 0.1] * 20, [0.5, 0.3] * 20
    rising, level = np.linspace(1, 40, 40), np.ones(40)
    won, rounds = verdicts([quiet, quiet, bad], [rising, level, level], 0.1, rounds=400, most=1.0)
    assert won.tolist() == [1, 0, -1]
    assert rounds.tolist() == [10, 40, 20]
    won, rounds = verdicts([quiet], [level], 0.1, rounds=40, most=1.0)
    assert won.tolist() == [-1]
    assert rounds[0] < 40


@pytest.mark.parametrize("truth", [Truth(), Truth(candidates=40), Truth(cluster=5), Truth(drift=True)], ids=str)
def test_false_certificates_are_as_rare_as_asked(truth: Truth) -> None:
    """At the limit itself, where errors are most frequent; 200 studies of 300 items."""
    delta, studies = 0.1, 200
    false = study_losses(truth, forgets=0.1, limit=0.1, studies=studies, items=300, seed=1)
    assert false.share_certified(delta) <= delta + 2 * np.sqrt(delta * (1 - delta) / studies)


def test_a_merge_that_forgets_nothing_is_certified_with_the_items_of_the_closed_form() -> None:
    found = study_losses(Truth(), forgets=LOSS_FREE, limit=0.1, studies=200, items=600, seed=2)
    assert items_for(0.1, 1, 0.1) == 111
    assert 80 <= found.median_items(0.1) <= 140
    assert smallest_limit({"task": 111}, 0.1) == pytest.approx(0.1, rel=0.01)
    assert smallest_limit({"one": 111, "other": 111}, 0.1) == pytest.approx(0.1 / np.sqrt(2), rel=0.01)
