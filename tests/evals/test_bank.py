"""The bank's estimate: exact where all is known, honest over simulated studies, whatever anchors and candidate are."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.bank import DRAWS, KINDS, simulated, simulation
from evals.bank import (
    LEAST_OF_STRATUM,
    STRATA,
    Seen,
    draw_order,
    estimate,
    foretell,
    inclusion_of,
    margins,
    regression_error,
    t_quantile,
    towards_regression,
)


def drawn(n: int, *, kind: str = "choices", seed: int = 0) -> tuple[np.ndarray, np.ndarray, Seen, bool]:
    """The anchors, the truth, and a candidate on n drawn items of a simulated task."""
    case = simulated(kind, np.random.default_rng(seed))
    order, strata = draw_order(case.anchors, are_margins=case.are_margins, seed=seed, task="t")
    places = order[:n]
    signals, values = case.signals[:, 0], case.values[:, 0]
    seen = Seen(places, values[places], signals[places], inclusion_of(strata, places))
    return case.anchors, values, seen, case.are_margins


@pytest.mark.parametrize("kind", ["choices", "texts", "written"])
def test_all_items_drawn_is_the_measured_score_without_error(kind: str) -> None:
    anchors, values, seen, are_margins = drawn(300, kind=kind)
    found = estimate(anchors, seen, are_margins=are_margins)
    assert found.values == pytest.approx(values)
    assert found.stderr == 0


def test_what_was_measured_stays_and_only_drawn_items_have_a_pull() -> None:
    anchors, values, seen, _ = drawn(40)
    found = estimate(anchors, seen, are_margins=True)
    assert (found.values[seen.places] == values[seen.places]).all()
    assert set(np.flatnonzero(found.pulls)) <= set(seen.places)
    assert found.stderr == pytest.approx(np.linalg.norm(found.pulls))


def test_a_candidate_that_is_an_anchor_is_foretold() -> None:
    anchors, _, seen, _ = drawn(30, kind="texts")
    own = anchors[:, 3]
    copy = Seen(seen.places, own[seen.places], own[seen.places], seen.inclusion)
    found = estimate(anchors, copy, are_margins=False)
    assert found.total == pytest.approx(own.sum(), rel=1e-3)


@pytest.mark.parametrize("n", DRAWS)
@pytest.mark.parametrize("kind", KINDS)
def test_intervals_hold_and_the_estimate_is_never_worse_than_the_paired_difference(kind: str, n: int) -> None:
    row = simulation(kind, n, 150)
    assert 0.90 <= row.held <= 0.995  # three standard errors of 150 studies around 95 %
    assert row.held_moved >= 0.90
    assert row.moved < row.paired
    assert row.corrected < row.paired or kind == "mixed"  # level with it there, where anchors tell little
    assert row.moved < 1.1 * row.corrected  # a candidate may be unlike all anchors
    if row.case in ("choices", "texts"):
        assert row.corrected / row.paired < 0.6
    if row.case == "choices":
        assert row.moved < 0.8 * row.corrected


@pytest.mark.parametrize("kind", ["choices", "written", "learner"])
def test_an_estimate_moves_towards_the_regression_by_one_standard_error_at_most(kind: str) -> None:
    anchors, _, seen, are_margins = drawn(30, kind=kind)
    found = estimate(anchors, seen, are_margins=are_margins)
    foretold, _, _ = foretell(anchors, seen, are_margins=are_margins)
    foretold[seen.places] = seen.values
    trusted = towards_regression(found, anchors, seen, 0.0, are_margins=are_margins)
    assert trusted.stderr == found.stderr
    assert abs(trusted.total - found.total) == pytest.approx(min(abs(foretold.sum() - found.total), found.stderr))
    assert abs(trusted.total - foretold.sum()) < abs(found.total - foretold.sum())
    assert (trusted.values[seen.places] == seen.values).all()
    between = towards_regression(found, anchors, seen, 0.5 * found.stderr, are_margins=are_margins)
    assert abs(between.total - found.total) < abs(trusted.total - found.total) + 1e-12
    assert towards_regression(found, anchors, seen, np.inf, are_margins=are_margins).total == found.total


def test_the_regression_errs_by_what_anchors_are_foretold_wrong() -> None:
    anchors, _, seen, _ = drawn(30, kind="texts")
    exact = np.hstack([anchors[:, :2], anchors[:, :1], anchors[:, 1:2]])  # each anchor has a twin
    assert regression_error(exact, exact, seen.places, are_margins=False) < 1e-2 * np.ptp(anchors.sum(axis=0))
    wrong = exact + 0.0
    wrong[:, 3] = np.random.default_rng(0).permutation(wrong[:, 3])
    assert regression_error(wrong, wrong, seen.places, are_margins=False) > 100 * regression_error(
        exact, exact, seen.places, are_margins=False
    )
    assert regression_error(anchors[:, :1], anchors[:, :1], seen.places, are_margins=False) == np.inf


def test_the_correction_is_unbiased_where_the_regression_is_not() -> None:
    """A candidate whose margin hides what it answers: the regression is wrong, its correction is right on average."""
    rng = np.random.default_rng(0)
    anchors = rng.normal(0.5, 1.0, (200, 3))
    values = (rng.random(200) < 0.2).astype(float)
    totals, plain, errors = [], [], []
    for seed in range(300):
        order, strata = draw_order(anchors, are_margins=True, seed=seed, task="t")
        places = order[:40]
        seen = Seen(places, values[places], anchors[places].mean(axis=1), inclusion_of(strata, places))
        found = estimate(anchors, seen, are_margins=True)
        foretold, _, _ = foretell(anchors, seen, are_margins=True)
        totals.append(found.total)
        plain.append(foretold.sum())
        errors.append(found.stderr)
    assert abs(np.mean(plain) - values.sum()) > 30
    assert abs(np.mean(totals) - values.sum()) < 4 * np.std(totals) / np.sqrt(len(totals))
    assert np.mean(errors) == pytest.approx(np.std(totals), rel=0.25)


def test_each_item_of_a_stratum_is_drawn_as_often_as_its_inclusion_says() -> None:
    case = simulated("choices", np.random.default_rng(3))
    counts, expected = np.zeros(300), np.zeros(300)
    for seed in range(600):
        order, strata = draw_order(case.anchors, are_margins=True, seed=seed, task="t")
        places = order[:45]
        counts[places] += 1
        for stratum in range(STRATA):
            mine = strata == stratum
            expected[mine] += np.isin(places, np.flatnonzero(mine)).sum() / mine.sum()
    spread = np.sqrt(expected * (1 - expected / 600))
    assert np.abs((counts - expected) / spread).max() < 5
    assert expected.max() > 1.5 * expected.min()  # what anchors are unsure of comes up more often


def test_a_longer_draw_holds_the_shorter_and_each_stratum_has_some() -> None:
    case = simulated("choices", np.random.default_rng(4))
    order, strata = draw_order(case.anchors, are_margins=True, seed=1, task="t")
    again, _ = draw_order(case.anchors, are_margins=True, seed=1, task="t")
    assert (order == again).all()
    assert sorted(order) == list(range(300))
    assert (np.bincount(strata[order[:12]]) >= LEAST_OF_STRATUM).all()
    other, _ = draw_order(case.anchors, are_margins=True, seed=1, task="another")
    assert (order != other).any()


def test_margins_of_several_right_answers_and_of_choices_that_are_not_there() -> None:
    scores = np.array([[-1.0, -2.0, -3.0, -np.inf], [-4.0, -1.0, -2.0, -3.0]])
    right = np.array([[True, False, False, False], [True, False, False, True]])
    assert margins(scores, right) == pytest.approx([1.0, -2.0])


def test_students_quantile() -> None:
    for freedom, known in {3: 3.182, 5: 2.571, 10: 2.228, 30: 2.042, 1e9: 1.960}.items():
        assert t_quantile(freedom) == pytest.approx(known, rel=0.01)
