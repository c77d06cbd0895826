"""Does a search pay: what it found against the lines that need none, for the same limit on forgetting.

Both sides choose by the same rule on the search items, and the items that judge compare the two that were chosen. So
the interval is that of one difference that was fixed beforehand: when there is none, it leaves out 0 as seldom as it
says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from evals.objectives import Draws, interval
from optimizer.runs.families import PREPARED
from optimizer.runs.front import best_under
from optimizer.runs.trial import NO_ANCHORS, Role

LINES = (Role.UNIFORM, Role.SLOPE, Role.EXPERT)  # one weight for all layers, or one that rises; they end in the expert
FOUND = (*NO_ANCHORS, *PREPARED)
NOBODY = -1  # in place of a trial, where no point of a side keeps to a limit
COLUMNS = (
    "limit",
    "suite",
    "line_trial",
    "line_kind",
    "line_domain",
    "line_forgetting",
    "trial",
    "kind",
    "domain",
    "forgetting",
    "difference",
    "low",
    "high",
)


def compare_at_limits(
    points: pd.DataFrame,
    roles: pd.Series[Any],
    judged: pd.DataFrame,
    draws: Draws,
    *,
    suite: str,
    limits: Sequence[float],
    kept: Callable[[float], pd.Series[float]],
    sure: float,
) -> pd.DataFrame:
    """Compare, at each limit on forgetting, the best point that was found with the best of the lines.

    Args:
        points: figures by the search items, of every trial.
        roles: of the same trials.
        judged: figures by the items that judge; a trial that has none is not chosen.
        draws: of the items that judge.
        suite: that they are from.
        kept: gives the share of resamplings of the search items in which each trial keeps to a limit.
        sure: the share that a point needs to be chosen.

    Returns:
        A frame of `COLUMNS`: the two points with their gain and forgetting on the items that judge, and how much more
        of the gain the found one has, with its 95 % interval. NaN, and `NOBODY`, where a side has no such point;
        without a row for a limit that neither side keeps to.
    """
    usable = judged.index[judged["domain"].notna()]
    rows = []
    for limit in limits:
        certain = usable[kept(limit)[usable] >= sure]
        line, found = (_best(points.loc[certain[roles[certain].isin(side)]], limit) for side in (LINES, FOUND))
        if line == found == NOBODY:
            continue
        about = [_about(judged, trial) for trial in (line, found)]
        rows.append((limit, suite, *about[0], *about[1], *_difference(draws, found, line)))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _best(points: pd.DataFrame, limit: float) -> int:
    at = best_under(points["domain"], points["forgetting"], max_forgetting=limit)
    return NOBODY if at is None else int(points.index[at])


def _about(judged: pd.DataFrame, trial: int) -> tuple[object, ...]:
    if trial == NOBODY:
        return NOBODY, "", np.nan, np.nan
    row = judged.loc[trial]
    return trial, row["kind"], row["domain"], row["forgetting"]


def _difference(draws: Draws, trial: int, other: int) -> tuple[float, float, float]:
    """Measure how much more of the gain one trial has than another, with its paired 95 % interval."""
    if NOBODY in (trial, other):
        return np.nan, np.nan, np.nan
    columns = draws.column(trial), draws.column(other)
    at, samples = (
        (values[..., columns[0]] - values[..., columns[1]])
        for values in (draws.points["domain"], draws.samples["domain"])
    )
    (low,), (high,) = interval(samples[:, None])
    return float(at), float(low), float(high)
