"""A trial against a line of anchors: where the line lies, and an interval that holds what is not known of it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals.objectives import Draws, Scale, draw_objectives
from evals.outcomes import TaskInfo
from optimizer.runs.comparison import Gap, gap_to_line, most_domain

pytestmark = pytest.mark.slow  # studies are simulated

TASKS = (
    TaskInfo("notes", "domain", "", "multiple_choice", "acc", True, 0.0, 200, 0),
    TaskInfo("facts", "general", "", "multiple_choice", "acc", True, 0.25, 200, 0),
)
BASE, EXPERT, ANCHOR, TRIAL = range(4)
SHARES = st.integers(-30, 60).map(lambda percent: percent / 30)
POINTS = st.lists(st.tuples(SHARES, SHARES), min_size=1, max_size=6)
ROUNDING = 1e-12


@given(POINTS, SHARES, st.floats(0, 1))
def test_a_line_has_what_its_points_have_at_that_forgetting_and_never_less_at_more(
    points: list[tuple[float, float]], target: float, more: float
) -> None:
    forgetting, domain = np.array(points).T
    at = most_domain(target, forgetting, domain)
    assert domain.min() - ROUNDING <= at <= domain.max() + ROUNDING
    assert at >= max(domain[forgetting <= target], default=-np.inf) - ROUNDING
    assert most_domain(target + more, forgetting, domain) >= at - ROUNDING


def test_between_two_points_lies_their_mixture_and_a_beaten_one_counts_for_nothing() -> None:
    forgetting, domain = np.array([0.0, 0.4, 0.1, 0.2]), np.array([0.0, 1.0, 0.6, 0.5])
    assert most_domain(0.05, forgetting, domain) == pytest.approx(0.3)
    assert most_domain(0.2, forgetting, domain) == pytest.approx(0.6 + 0.4 / 3)  # not 0.5, which 0.6 at 0.1 beats
    assert most_domain(-0.1, forgetting, domain) == 0.0
    assert most_domain(0.9, forgetting, domain) == 1.0


def drawn(chances: dict[int, tuple[float, float]], rng: np.random.Generator, n: int) -> pd.DataFrame:
    """Outcomes of n items of both tasks, right by chance: trial to its true accuracies."""
    return pd.DataFrame(
        {
            "trial": trial,
            "task": task.name,
            "suite": "holdout",
            "item": f"{i:04d}",
            "value": float(rng.random() < chance),
            "weight": 1.0,
        }
        for trial, pair in chances.items()
        for task, chance in zip(TASKS, pair, strict=True)
        for i in range(n)
    )


def test_the_interval_holds_no_difference_when_there_is_none() -> None:
    """A trial as good as the anchor, met on the steep first part of the line, where all hangs on what each forgets."""
    chances = {BASE: (0.3, 0.8), EXPERT: (0.8, 0.5), ANCHOR: (0.7, 0.77), TRIAL: (0.7, 0.77)}
    rng = np.random.default_rng(0)
    shows = 0
    for _ in range(100):
        draws = draw_objectives(Scale(drawn(chances, rng, 100), TASKS, "holdout", BASE, {"x": EXPERT}), replicates=300)
        gap = gap_to_line(draws, TRIAL, [BASE, ANCHOR, EXPERT])
        assert gap.low <= gap.difference <= gap.high
        shows += not gap.low <= 0 <= gap.high
    assert shows <= 10  # with where the line is met held fixed, 38


def test_beyond_its_least_forgetting_a_line_counts_with_that() -> None:
    draws = Draws(
        np.arange(3),
        {"domain": np.array([0.0, 1.0, 0.7]), "forgetting": np.array([0.0, 0.3, -0.1])},
        {"domain": np.array([[0.0, 1.0, 0.6]]), "forgetting": np.array([[0.0, 0.3, 0.15]])},
    )
    gap = gap_to_line(draws, 2, [0, 1])
    assert gap == Gap(0.0, 0.0, 0.7, pytest.approx(0.1), pytest.approx(0.1))


def test_a_real_difference_is_shown() -> None:
    chances = {BASE: (0.3, 0.8), EXPERT: (0.8, 0.3), ANCHOR: (0.5, 0.6), TRIAL: (0.75, 0.62)}
    outcomes = drawn(chances, np.random.default_rng(1), 400)
    draws = draw_objectives(Scale(outcomes, TASKS, "holdout", BASE, {"x": EXPERT}))
    assert gap_to_line(draws, TRIAL, [BASE, ANCHOR, EXPERT]).low > 0
    assert gap_to_line(draws, ANCHOR, [BASE, ANCHOR, EXPERT]).high <= 0  # on the line: never above it
