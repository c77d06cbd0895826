"""What a merge lost and won, answer by answer, against counts by hand and scipy's own test."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from scipy.stats import binomtest

from evals.engine import Engine
from evals.flips import flipped_items, flips, mcnemar
from evals.lm_texts import item_texts
from evals.objectives import Scale
from evals.outcomes import HOLDOUT, TaskInfo
from tests.evals.conftest import load, questions, write_task

TASKS = (
    TaskInfo("quiz", "general", "", "multiple_choice", "acc", True, 0.25, 0, 8),
    TaskInfo("notes", "domain", "", "loglikelihood_rolling", "bits_per_byte", False, 0.0, 0, 8),
)
BASE, MERGE = [1, 1, 1, 1, 0, 0, 0, 1], [0, 0, 0, 1, 1, 0, 0, 1]


def rows() -> pd.DataFrame:
    values = [("quiz", 0, BASE), ("quiz", 1, MERGE), ("notes", 0, [7] * 8), ("notes", 1, [8] * 8)]
    return pd.DataFrame(
        {"trial": trial, "task": task, "suite": "holdout", "item": f"{i}", "value": float(value), "weight": 1.0}
        for task, trial, of in values
        for i, value in enumerate(of)
    )


def test_flips_are_counted_on_tasks_of_right_and_wrong() -> None:
    scale = Scale(rows(), TASKS, "holdout", 0, {"x": 1})
    (row,) = flips(scale, 1).to_dict("records")
    assert (row["task"], row["items"], row["lost"], row["won"]) == ("quiz", 8, 3, 1)
    assert row["flip_rate"] == 0.5
    assert row["lost_knowledge"] == pytest.approx(2 / 8 / 0.75)
    assert row["p"] == pytest.approx(binomtest(1, 4).pvalue)
    found = flipped_items(scale, 1)
    assert found.set_index("item")["change"].to_dict() == {"0": "lost", "1": "lost", "2": "lost", "4": "won"}


@pytest.mark.parametrize("pair", [(0, 0), (5, 5), (79, 10), (10, 79), (3, 0), (600, 500)])
def test_the_test_is_exact(pair: tuple[int, int]) -> None:
    expected = binomtest(pair[0], sum(pair)).pvalue if sum(pair) else 1.0
    assert mcnemar(*pair) == pytest.approx(expected)


def test_an_item_is_read_again_as_the_task_asks_it(tmp_path: Path, engine: Engine) -> None:
    """What a model answered, by its stored log-likelihoods, is right where the score says so."""
    folder = write_task(tmp_path / "quiz", questions(24))
    for metric in ("acc", "acc_norm"):
        harness = load(folder / "quiz.yaml", search=8, holdout=12, metric=metric)
        outcomes = harness.score(engine, HOLDOUT)
        texts = item_texts(harness, HOLDOUT, {"quiz": [outcome.item for outcome in outcomes]})
        asked = {row["question"]: row for row in questions(24)}
        assert len(texts) == 12
        for outcome in outcomes:
            text = texts["quiz", outcome.item]
            row = asked[text.question.removeprefix("Question: ").removesuffix("\nAnswer:")]
            assert text.choices == tuple(row["choices"])
            assert text.right == (row["choices"][row["gold"]],)
            assert (text.answer(outcome.loglikelihoods) in text.right) == bool(outcome.value)
    assert item_texts(harness, HOLDOUT, {"quiz": ["0" * 16]}) == {}
