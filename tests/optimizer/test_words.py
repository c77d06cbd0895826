"""Shares are written in per cent, with their interval where they have one."""

from __future__ import annotations

import math

import pytest

from optimizer.words import Change, Interval


@pytest.mark.parametrize(
    ("interval", "figure", "bounds"),
    [
        (Interval(0.92, 0.884, 0.961), "92 %", "[88, 96]"),
        (Interval(0.061, 0.039, 0.12), "6.1 %", "[3.9, 12.0]"),  # as many digits as the value has
        (Interval(-0.0001, -0.02, 0.02), "0.0 %", "[-2.0, 2.0]"),
        (Interval(0.0, 0.0, 0.0), "0.0 %", ""),  # the base: nothing to be unsure of
        (Interval(0.5, math.nan, math.nan), "50 %", ""),
        (Interval(math.nan, math.nan, math.nan), "", ""),
    ],
)
def test_an_interval_is_a_figure_and_its_bounds(interval: Interval, figure: str, bounds: str) -> None:
    assert (interval.figure, interval.bounds) == (figure, bounds)
    assert interval.text() == f"{figure} {bounds}".strip()
    assert interval.text("\n") == f"{figure}\n{bounds}".strip()


def test_an_interval_is_read_from_the_columns_of_a_row() -> None:
    assert Interval.of({"domain": 0.5, "domain_low": 0.4, "domain_high": 0.6}, "domain") == Interval(0.5, 0.4, 0.6)


@pytest.mark.parametrize(
    ("change", "text", "sentence"),
    [
        (Change(-0.012, -0.03, 0.006, "points"), "-1.2 [-3.0, 0.6]", "1.2 points below the base [-3.0, 0.6]"),
        (Change(0.012, 0.003, 0.02, "points"), "1.2 [0.3, 2.0]", "1.2 points above the base [0.3, 2.0]"),
        (
            Change(-0.0124, -0.02, -0.001, "bits_per_byte"),
            "-0.012 [-0.020, -0.001]",
            "0.012 bits_per_byte worse than the base [-0.020, -0.001]",
        ),
        (Change(0.0, -0.01, 0.01, "points"), "0.0 [-1.0, 1.0]", "level with the base [-1.0, 1.0]"),
        (Change(-0.0001, -0.01, 0.01, "points"), "0.0 [-1.0, 1.0]", "level with the base [-1.0, 1.0]"),
        (Change(0.0, 0.0, 0.0, "points"), "0.0", "level with the base"),
        (Change(math.nan, math.nan, math.nan, "points"), "", ""),
    ],
)
def test_a_change_is_in_the_tasks_own_unit(change: Change, text: str, sentence: str) -> None:
    assert change.text() == text
    assert change.from_base == sentence
