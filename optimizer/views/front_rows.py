"""The rows that a run's tables show, as values: the terminal, the page and JSON only render them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from evals.outcomes import SUITES
from optimizer.runs.frames import rows_of
from optimizer.runs.scored import ScoredRun
from optimizer.runs.trial import TrialKind
from optimizer.words import Interval


@dataclass(frozen=True, slots=True)
class FrontRow:
    """One point of the front, or an anchor beside it.

    Args:
        figures: by suite, then by objective: `domain` (the mean where there are several experts), that of each expert,
            `forgetting`.
    """

    trial: int
    kind: TrialKind
    method: str
    on_front: bool
    is_knee: bool
    figures: Mapping[str, Mapping[str, Interval]]


def front_rows(run: ScoredRun, *, anchors: bool = False) -> list[FrontRow]:
    """The front from least to most forgetting by the search items.

    Args:
        anchors: with the anchors among them.
    """
    front = set(run.front().index)
    if not front:
        return []
    knee, names = run.knee(), dict.fromkeys(["domain", *run.objectives])
    figures = {suite: rows_of(run.points(suite)) for suite in SUITES}
    return [
        FrontRow(
            trial=trial,
            kind=run.kinds[trial],
            method=run.method(trial),
            on_front=trial in front,
            is_knee=trial == knee,
            figures={
                suite: {name: Interval.of(rows[trial], name) for name in names} for suite, rows in figures.items()
            },
        )
        for trial in _by_forgetting(run.points(), front | set(run.anchors().index) if anchors else front)
    ]


def _by_forgetting(points: pd.DataFrame, trials: set[int]) -> list[int]:
    chosen = points.loc[sorted(trials)].sort_values(["forgetting", "domain"], kind="stable")
    return [int(trial) for trial in chosen.index]


@dataclass(frozen=True, slots=True)
class LimitRow:
    """The best point for a limit on forgetting.

    Args:
        limit: the most that it may forget, a share.
        suite: that judges it.
        kept: the share of resamplings in which the limit is kept.
    """

    limit: float
    trial: int
    kind: TrialKind
    suite: str
    domain: Interval
    forgetting: Interval
    kept: float


def limit_rows(run: ScoredRun) -> list[LimitRow]:
    """The best point for each of some limits on forgetting that a point keeps."""
    return [
        LimitRow(
            limit=row["limit"],
            trial=row["trial"],
            kind=TrialKind(row["kind"]),
            suite=row["suite"],
            domain=Interval.of(row, "domain"),
            forgetting=Interval.of(row, "forgetting"),
            kept=row["kept"],
        )
        for row in rows_of(run.by_limit()).values()
    ]


def share_of(row: Mapping[str, Any]) -> Interval:
    """What a trial won or kept of a task.

    Args:
        row: of `ScoredRun.retention`.
    """
    return Interval(row["share"], row["low"], row["high"])
