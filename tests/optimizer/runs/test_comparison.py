"""What was found beside the lines: both chosen alike, and an interval that holds no difference when there is none."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from evals.objectives import Scale, draw_objectives, objectives
from evals.outcomes import TaskInfo
from optimizer.runs.comparison import NOBODY, compare_at_limits
from optimizer.runs.trial import Role

pytestmark = pytest.mark.slow  # studies are simulated

TASKS = (
    TaskInfo("notes", "domain", "", "multiple_choice", "acc", True, 0.0, 200, 0),
    TaskInfo("facts", "general", "", "multiple_choice", "acc", True, 0.25, 200, 0),
)
BASE, EXPERT = 0, 1
ROLES = [Role.BASE, Role.EXPERT, Role.UNIFORM, Role.SLOPE, Role.SEARCHED, Role.SEARCHED, Role.LEARNED]
LIMIT = 0.2


def drawn(chances: list[tuple[float, float]], suite: str, rng: np.random.Generator, n: int) -> pd.DataFrame:
    """Outcomes of n items of both tasks, with the same luck for every trial for the most part."""
    frames = []
    for t, task in enumerate(TASKS):
        luck = rng.random(n)
        for trial, pair in enumerate(chances):
            own = np.where(rng.random(n) < 0.2, rng.random(n), luck)
            frames.append(
                pd.DataFrame(
                    {
                        "trial": trial,
                        "task": task.name,
                        "suite": suite,
                        "item": [f"{i:04d}" for i in range(n)],
                        "value": (own < pair[t]).astype(float),
                        "weight": 1.0,
                    }
                )
            )
    return pd.concat(frames, ignore_index=True)


def compared(chances: list[tuple[float, float]], seed: int, *, n: int = 150, sure: float = 0.6) -> pd.DataFrame:
    """One study of these true accuracies, (domain, general) by trial, at one limit."""
    rng, suites = np.random.default_rng(seed), {}
    for suite in ("search", "holdout"):
        scale = Scale(drawn(chances, suite, rng, n), TASKS, suite, BASE, {"x": EXPERT})
        suites[suite] = draw_objectives(scale, replicates=200)
    points = {suite: objectives(draws) for suite, draws in suites.items()}
    for frame in points.values():
        frame["kind"] = [role.name for role in ROLES]
    samples = suites["search"].samples["forgetting"]
    return compare_at_limits(
        points["search"],
        pd.Series(ROLES, dtype=object),
        points["holdout"],
        suites["holdout"],
        suite="holdout",
        limits=[LIMIT],
        kept=lambda limit: pd.Series((samples <= limit).mean(axis=0)),
        sure=sure,
    )


def test_the_interval_holds_no_difference_when_there_is_none() -> None:
    alike = [(0.3, 0.8), (0.8, 0.4), *[(0.65, 0.77)] * 5]
    found = pd.concat([compared(alike, seed) for seed in range(120)]).dropna()
    assert len(found) > 90
    shows = (found["low"] > 0) | (found["high"] < 0)
    assert 0 < shows.mean() <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / len(found))
    assert abs(found["difference"].mean()) < 0.02  # neither side is favoured by being chosen from more points


def test_a_real_difference_is_shown() -> None:
    row = compared([(0.3, 0.8), (0.8, 0.4), *[(0.5, 0.77)] * 2, *[(0.7, 0.77)] * 3], 0).iloc[0]
    assert row["low"] > 0
    assert row["difference"] == pytest.approx(row["domain"] - row["line_domain"])
    assert ROLES[row["line_trial"]] in (Role.UNIFORM, Role.SLOPE)
    assert ROLES[row["trial"]] in (Role.SEARCHED, Role.LEARNED)


def test_the_base_is_no_line() -> None:
    row = compared([(0.3, 0.8), (0.8, 0.3), *[(0.7, 0.35)] * 2, *[(0.6, 0.78)] * 3], 0).iloc[0]
    assert row["line_trial"] == NOBODY
    assert row["trial"] >= 4
    assert np.isnan(row["difference"])


def test_a_limit_that_neither_side_keeps_has_no_row() -> None:
    assert compared([(0.3, 0.8), (0.8, 0.3), *[(0.7, 0.35)] * 5], 0).empty
