"""Tables of outcomes in which some trials were scored on drawn items of a bank."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from evals.bank import Seen, estimate, regression_error, towards_regression
from evals.drawing import draw_items
from evals.errors import TaskError
from evals.flips import flipped_items, flips
from evals.objectives import Scale, draw_objectives, objectives
from evals.outcomes import TaskInfo
from evals.score_table import margins_of, table_of

ITEMS, CHOICES = 120, 4


def outcomes(trial: int, weight: float, *, task: str = "words", own: float = 0.2) -> pd.DataFrame:
    """A trial's answers to all items of a task with choices: nearer to what the expert knows by its weight."""
    luck = np.random.default_rng(len(task))
    right = luck.integers(CHOICES, size=ITEMS)
    scores = luck.normal(0, 1, (ITEMS, CHOICES))
    gain = luck.normal(1.0, 1.0, ITEMS) * (1 if task == "words" else -1)
    scores[np.arange(ITEMS), right] += 1.0 + weight * gain
    scores += np.random.default_rng(trial).normal(0, own, scores.shape)
    return pd.DataFrame(
        {
            "trial": trial,
            "task": task,
            "suite": "search",
            "item": [f"{i:016x}" for i in range(ITEMS)],
            "value": (scores.argmax(axis=1) == right).astype(float),
            "weight": 1.0,
            "loglikelihoods": list(scores),
            "lengths": [np.ones(CHOICES, dtype=np.int64)] * ITEMS,
            "right": [np.array([place]) for place in right],
            "inclusion": 1.0,
        }
    )


def bank(task: str = "words") -> pd.DataFrame:
    return pd.concat([outcomes(t, w, task=task) for t, w in enumerate([0.0, 1.0, 0.5, 0.25])], ignore_index=True)


def drawn(rows: pd.DataFrame, known: pd.DataFrame, items: int = 30) -> pd.DataFrame:
    """What is left of a trial's rows when it is scored on drawn items alone."""
    chances = draw_items(known[known["trial"] < 2], rows["task"].iloc[0], items=items, seed=0)
    kept = rows[rows["item"].isin(chances)]
    return kept.assign(inclusion=kept["item"].map(chances))


def test_a_drawn_trial_is_estimated_and_the_others_are_as_without_it() -> None:
    known, whole = bank(), outcomes(9, 0.7)
    table = table_of(pd.concat([known, drawn(whole, known)], ignore_index=True), "words")
    alone = table_of(known, "words")
    assert alone.pulls is None
    assert (table.values[:, :4] == alone.values).all()
    truth = whole["value"].mean()
    assert table.scores[4] == pytest.approx(truth, abs=0.08)
    assert table.scores[4] != pytest.approx(drawn(whole, known)["value"].mean(), abs=0.01)
    assert table.stderr()[:4] == pytest.approx(alone.stderr())
    paired = table.stderr_of_difference(9, 0)
    plain = table_of(pd.concat([known, whole], ignore_index=True), "words").stderr_of_difference(9, 0)
    assert plain < paired < 2 * plain  # thirty items for a hundred and twenty


def test_a_drawn_trials_score_is_moved_towards_what_its_anchors_foretell() -> None:
    """Ten candidates of the same weight: their scores lie nearer together than estimates that are corrected alone."""
    known = bank()
    parts = [drawn(outcomes(trial, 0.7), known) for trial in range(10, 20)]
    rows = pd.concat([known, *parts], ignore_index=True)
    scores = table_of(rows, "words").scores[4:]
    anchors, values = (
        np.stack([column[rows["trial"] == t] for t in range(4)], axis=1) for column in (margins_of(rows), rows["value"])
    )
    places = np.array([int(item, 16) for item in parts[0]["item"]])
    error = regression_error(anchors, values, places, are_margins=True)
    corrected, moved = [], []
    for part in parts:
        signals = margins_of(part)
        assert signals is not None
        seen = Seen(places, part["value"].to_numpy(), signals, part["inclusion"].to_numpy())
        found = estimate(anchors, seen, are_margins=True)
        corrected.append(found.total / ITEMS)
        moved.append(towards_regression(found, anchors, seen, error, are_margins=True).total / ITEMS)
    assert scores == pytest.approx(moved)
    assert np.std(scores) < 0.8 * np.std(corrected)


def test_the_draw_follows_from_rows_and_seed() -> None:
    known = bank()
    first, again = (draw_items(known, "words", items=30, seed=0) for _ in range(2))
    assert first == again
    assert len(first) == 30
    assert first != draw_items(known, "words", items=30, seed=1)
    assert set(draw_items(known, "words", items=15, seed=0)) < set(first)
    assert set(draw_items(known, "words", items=ITEMS, seed=0).values()) == {1.0}


def test_margins_tell_the_answers_or_are_none() -> None:
    rows = bank()
    found = margins_of(rows)
    assert found is not None
    assert ((found > 0) == (rows["value"] == 1)).all()
    assert margins_of(rows.assign(right=None)) is None  # an earlier version kept no right answer
    assert margins_of(rows.assign(right=[np.array([], dtype=int)] * len(rows))) is None
    assert margins_of(rows.assign(value=1 - rows["value"])) is None


def test_without_right_answers_the_estimate_is_from_the_outcomes() -> None:
    known, whole = bank().assign(right=None), outcomes(9, 0.7).assign(right=None)
    table = table_of(pd.concat([known, drawn(whole, known)], ignore_index=True), "words")
    assert table.scores[4] == pytest.approx(whole["value"].mean(), abs=0.15)


def test_what_is_no_draw_is_refused() -> None:
    known, whole = bank(), outcomes(9, 0.7)
    some = drawn(whole, known)
    with pytest.raises(TaskError, match=r"trial 9 has item .* 0 times"):
        table_of(pd.concat([known, some.assign(inclusion=1.0)], ignore_index=True), "words")
    with pytest.raises(TaskError, match=r"trial 9 has item .* 2 times"):
        table_of(pd.concat([known, some, some.iloc[:1]], ignore_index=True), "words")
    with pytest.raises(TaskError, match="needs a trial that was scored on all"):
        table_of(some, "words")


def test_objectives_of_a_drawn_trial_have_the_error_of_its_estimate() -> None:
    tasks = (
        TaskInfo("words", "domain", "", "multiple_choice", "acc", True, 0.25, ITEMS, 0, 30),
        TaskInfo("general", "general", "", "multiple_choice", "acc", True, 0.25, ITEMS, 0, 30),
    )
    known = pd.concat([bank(task.name) for task in tasks], ignore_index=True)
    whole = pd.concat([outcomes(9, 0.7, task=task.name) for task in tasks], ignore_index=True)
    parts = [drawn(whole[whole["task"] == t.name], known[known["task"] == t.name]) for t in tasks]
    frames = [objectives(draw_objectives(Scale(pd.concat([known, *rest]), tasks, "search", 0, {"x": 1})))
              for rest in ([whole], parts, [])]  # fmt: skip
    full, estimated, without = frames
    assert estimated.loc[[0, 1, 2, 3]].equals(without)
    for name in ("domain", "forgetting"):
        gap = abs(full.loc[9, name] - estimated.loc[9, name])
        assert gap < 3 * estimated.loc[9, f"{name}_stderr"]
        assert full.loc[9, f"{name}_stderr"] < estimated.loc[9, f"{name}_stderr"]


def test_flips_leave_out_what_was_drawn() -> None:
    tasks = (TaskInfo("words", "domain", "", "multiple_choice", "acc", True, 0.25, ITEMS, 0, 30),)
    known = bank()
    part = drawn(outcomes(9, 0.7), known)
    scale = Scale(pd.concat([known, part], ignore_index=True), tasks, "search", 0, {"x": 1})
    assert flips(scale, 9).empty
    assert flips(scale, 2)["items"].tolist() == [ITEMS]
    assert set(flipped_items(scale, 9)["item"]) < set(part["item"])
