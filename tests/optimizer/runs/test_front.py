"""Fronts and hypervolumes against brute force and Optuna's own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from optuna._hypervolume import compute_hypervolume

from optimizer.runs.front import (
    best_under,
    front_without,
    gaps,
    hypervolume,
    hypervolumes,
    knee,
    losses,
    non_dominated,
    on_front,
)

GRID = st.integers(0, 6).map(float)  # a small grid, so that ties and duplicates are common


def points(objectives: int) -> st.SearchStrategy[np.ndarray]:
    return st.integers(0, 9).flatmap(lambda n: arrays(float, (n, objectives), elements=GRID))


def dominated(point: np.ndarray, others: np.ndarray) -> bool:
    return any((other <= point).all() and (other < point).any() for other in others)


@given(st.integers(1, 4).flatmap(points))
def test_non_dominated_equals_brute_force(values: np.ndarray) -> None:
    assert non_dominated(values).tolist() == [not dominated(point, values) for point in values]


@given(st.integers(1, 3).flatmap(points))
@settings(max_examples=50)
def test_hypervolume_counts_the_unit_cells_below(values: np.ndarray) -> None:
    corner = np.full(values.shape[1], 5.0)
    cells = np.stack(np.meshgrid(*[np.arange(5.0)] * values.shape[1]), axis=-1).reshape(-1, values.shape[1])
    covered = sum(any((point <= cell).all() for point in values) for cell in cells)
    assert hypervolume(values, corner) == pytest.approx(covered)


@given(
    st.integers(1, 4).flatmap(
        lambda m: arrays(float, st.tuples(st.just(3), st.integers(0, 6), st.just(m)), elements=GRID)
    )
)
@settings(max_examples=50)
def test_hypervolumes_of_many_sets_are_those_of_each(sets: np.ndarray) -> None:
    corner = np.full(sets.shape[2], 5.0)
    assert hypervolumes(sets, corner) == pytest.approx([hypervolume(one, corner) for one in sets])


@pytest.mark.parametrize("objectives", [2, 3, 4])
def test_hypervolume_equals_optunas(objectives: int) -> None:
    values = np.random.default_rng(objectives).random((30, objectives))
    corner = np.ones(objectives)
    assert hypervolume(values, corner) == pytest.approx(compute_hypervolume(values, corner))


def test_points_beyond_the_reference_cover_nothing() -> None:
    assert hypervolume([[0.0, 2.0], [2.0, 0.0], [1.0, 0.5]], [1.0, 1.0]) == 0.0
    assert hypervolume([[0.5, 0.5], [0.0, 2.0]], [1.0, 1.0]) == pytest.approx(0.25)


def test_knee_is_farthest_above_the_chord() -> None:
    domain, forgetting = [0.0, 0.5, 0.8, 1.0], [0.0, 0.02, 0.10, 0.30]
    assert knee(domain, forgetting, expert_forgetting=0.30) == 2
    assert knee(domain, forgetting, expert_forgetting=0.0) == 3  # nothing to lose: take the gain


def test_knee_does_not_trade_gain_for_less_than_no_forgetting() -> None:
    assert knee([0.6, 0.8], [-0.10, 0.01], expert_forgetting=0.20) == 1
    assert knee([0.8, 0.8], [-0.01, -0.10], expert_forgetting=0.20) == 1


def test_knee_of_equals_forgets_least() -> None:
    assert knee([0.5, 0.5, 0.5], [0.1, 0.0, 0.0], expert_forgetting=0.0) == 1


def test_the_widest_gap_is_where_a_point_could_add_most() -> None:
    front = [(0.0, 0.0), (0.1, 10.0), (0.9, 15.0), (1.0, 100.0)]
    assert gaps(front) == [(2, pytest.approx(8.5)), (1, pytest.approx(4.0)), (0, pytest.approx(1.0))]
    assert [place for place, _ in gaps(front, least=0.03)] == [2, 1]
    assert gaps([(1.0, 0.0), (1.0, 2.0)]) == []


def test_a_fitted_point_hides_no_point_that_was_not() -> None:
    points = [(0.0, 1.0), (0.5, 0.5), (1.0, 0.4), (0.4, 0.3), (0.2, 0.3)]  # the last two were fitted
    assert non_dominated(points).tolist() == [True, False, False, False, True]
    assert on_front(points, [False, False, False, True, True]).tolist() == [True, True, True, False, True]
    assert on_front(points, [False] * 5).tolist() == non_dominated(points).tolist()
    mask, off = front_without(points, lambda place: place == 4, [False, False, False, True, True])
    assert mask.tolist() == [True, True, True, True, False]
    assert off.tolist() == [False, False, False, False, True]


def test_best_under_takes_the_most_gain_that_is_allowed() -> None:
    domain, forgetting = [0.0, 0.5, 0.8, 0.8], [0.0, 0.05, 0.12, 0.11]
    assert best_under(domain, forgetting, max_forgetting=0.05) == 1
    assert best_under(domain, forgetting, max_forgetting=0.5) == 3
    assert best_under(domain, forgetting, max_forgetting=-0.1) is None


def test_losses_negate_every_gain_and_leave_forgetting() -> None:
    assert losses([[0.5, 0.25, 0.1], [-1.0, 0.0, -0.2]]).tolist() == [[-0.5, -0.25, 0.1], [1.0, 0.0, -0.2]]


def test_who_is_kept_off_leaves_the_front_to_those_behind() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        points, off = rng.integers(0, 5, (12, 2)).astype(float), rng.random(12) < 0.5
        mask, kept_off = front_without(points, off.tolist().__getitem__)
        assert (mask[~off] == non_dominated(points[~off])).all()
        assert not mask[off].any()
        for place in np.flatnonzero(off):  # only those are named that would be on the front
            rest = np.append(np.flatnonzero(~off), place)
            assert kept_off[place] <= non_dominated(points[rest])[-1]
