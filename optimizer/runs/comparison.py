"""Does a search pay: one trial against a line of anchors, at the same forgetting and on the same items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evals.objectives import Draws, interval

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Gap:
    """How much more of the domain gain a trial has than a line, at the trial's forgetting.

    Args:
        line_forgetting: the trial's, or the least of the line where that is more.
        line_domain: what the line has there.
        difference: the trial's less the line's, a share of the expert's gain.
        low, high: its 95 % interval.
    """

    line_forgetting: float
    line_domain: float
    difference: float
    low: float
    high: float


def gap_to_line(draws: Draws, trial: int, line: Sequence[int]) -> Gap:
    """Measure a trial against a line of anchors, with an interval for the same question asked of resampled items.

    How much each point forgets is as uncertain as what it gains; so where the line is met, and which of its points
    count, is found anew for every resampling.

    Args:
        line: trials that are its points, the base among them.
    """
    column, stops = draws.column(trial), [draws.column(stop) for stop in line]

    def on_line(forgetting: Array, domain: Array) -> float:
        return most_domain(forgetting[column], forgetting[stops], domain[stops])

    at = on_line(draws.points["forgetting"], draws.points["domain"])
    samples = draws.samples["domain"][:, column] - [
        on_line(*row) for row in zip(draws.samples["forgetting"], draws.samples["domain"], strict=True)
    ]
    (low,), (high,) = interval(samples[:, None])
    forgetting, domain = draws.points["forgetting"], float(draws.points["domain"][column])
    return Gap(float(max(forgetting[column], forgetting[stops].min())), at, domain - at, float(low), float(high))


def most_domain(target: float, forgetting: Array, domain: Array) -> float:
    """Find the most domain gain on a line at a forgetting.

    The line joins its points in the order of what they forget, without those another one beats; between two of them
    lies what sharing the items between them would give, as gain and forgetting are linear in an item's value. Beyond
    its ends counts the nearer end.

    Args:
        target: the forgetting asked for.
        forgetting, domain: (k,) of the points, in any order.
    """
    order = np.lexsort((-domain, forgetting))
    forgetting, domain = forgetting[order], domain[order]
    best = np.maximum.accumulate(domain)
    rises = np.append(True, domain[1:] > best[:-1])
    return float(np.interp(target, forgetting[rises], domain[rises]))
