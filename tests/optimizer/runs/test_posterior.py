"""The chance of being on the front: against brute force, ties included."""

from __future__ import annotations

import numpy as np
import pytest

from optimizer.runs.front import non_dominated
from optimizer.runs.posterior import FEW, front_chances


@pytest.mark.parametrize("objectives", [2, 3])
def test_chances_are_the_share_of_fronts(objectives: int) -> None:
    rng = np.random.default_rng(objectives)
    samples = rng.integers(0, 5, (FEW, 12, objectives)).astype(float)  # many ties
    expected = np.mean([non_dominated(row) for row in samples], axis=0)
    assert front_chances(samples) == pytest.approx(expected)
    assert 0 < expected.min() < expected.max() < 1


def test_equal_points_do_not_beat_each_other_and_a_beaten_one_has_no_chance() -> None:
    samples = np.tile(np.array([[0.0, 1.0], [0.0, 1.0], [1.0, 1.0], [0.5, 0.5]]), (3, 1, 1))
    assert front_chances(samples).tolist() == [1, 1, 0, 1]


def test_without_resamplings_nothing_is_known() -> None:
    assert np.isnan(front_chances(np.empty((0, 3, 2)))).all()
