"""Outcomes as arrays: from frames, from outcomes or joined, they are the same table."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from evals.errors import TaskError
from evals.objectives import Scale, draw_objectives
from evals.outcomes import Outcome, TaskInfo
from evals.score_table import table_from, table_of
from evals.task_rows import TaskRows, joined, rows_by_task, rows_of
from tests.evals.test_score_table import bank, drawn, outcomes


def as_outcomes(frame: pd.DataFrame) -> list[Outcome]:
    return [
        Outcome(
            row.task, row.suite, row.item, row.value, row.weight, tuple(row.loglikelihoods), False,
            tuple(row.lengths), right=tuple(row.right), inclusion=row.inclusion,
        )
        for row in frame.itertuples()
    ]  # fmt: skip


def test_joined_rows_are_the_table_of_the_joined_frame() -> None:
    known = bank()
    own = drawn(outcomes(9, 0.7), known)
    expected = table_of(pd.concat([known, own], ignore_index=True), "words")
    anchors = rows_by_task(known, is_bank=True)["words"]
    for rows in (rows_by_task(own, is_bank=True), rows_of(9, as_outcomes(own), is_bank=True)):
        found = table_from(joined([anchors, rows["words"]]), "words")
        assert (found.values == expected.values).all()
        assert found.pulls is not None
        assert (found.pulls == expected.pulls).all()
        assert found.trials.tolist() == [0, 1, 2, 3, 9]


def test_without_right_answers_of_one_trial_there_are_no_margins() -> None:
    known = bank()
    own = rows_of(9, [Outcome("words", "search", "0" * 16, 1.0, 1.0, (), False, inclusion=0.5)], is_bank=True)
    assert rows_by_task(known, is_bank=True)["words"].margins is not None
    assert joined([rows_by_task(known, is_bank=True)["words"], own["words"]]).margins is None
    assert rows_by_task(known, is_bank=False)["words"].margins is None


def test_objectives_are_the_same_from_arrays() -> None:
    known = pd.concat([bank(), bank("manners")], ignore_index=True)
    own = pd.concat([drawn(outcomes(9, 0.7, task=task), known) for task in ("words", "manners")], ignore_index=True)
    tasks = [
        TaskInfo("words", "domain", "e", "multiple_choice", "acc", True, 0.25, 120, 0, 30),
        TaskInfo("manners", "general", "", "multiple_choice", "acc", True, 0.25, 120, 0, 30),
    ]
    whole = pd.concat([known, own], ignore_index=True)
    plain = draw_objectives(Scale(whole, tasks, "search", 0, {"e": 1}), replicates=20)
    arrays = rows_by_task(whole, is_bank=True)
    made = draw_objectives(Scale(known, tasks, "search", 0, {"e": 1}, arrays), replicates=20)
    for name, points in plain.points.items():
        assert np.array_equal(points, made.points[name])
        assert np.array_equal(plain.samples[name], made.samples[name])
    with pytest.raises(TaskError, match="task manners has no outcome"):
        draw_objectives(Scale(known, tasks, "search", 0, {"e": 1}, {"words": arrays["words"]}))


def test_no_rows_are_no_table() -> None:
    none = np.zeros(0)
    empty = TaskRows(none.astype(np.int64), none.astype(object), none, none, none, None)
    with pytest.raises(TaskError, match="task words has no outcome"):
        table_from(empty, "words")
