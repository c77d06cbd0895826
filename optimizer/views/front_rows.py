"""The rows that a run's tables show, as values: the terminal, the page and JSON only render them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from evals.outcomes import ACCURACIES, SUITES
from optimizer.runs.frames import rows_of
from optimizer.runs.scored import ScoredRun
from optimizer.runs.trial import TrialKind
from optimizer.words import POINTS, Change, Interval, one_line


@dataclass(frozen=True, slots=True)
class FrontRow:
    """One point of the front, or an anchor beside it.

    Args:
        is_flagged: a guard of written answers flags it.
        chance: the share of resamplings of the search items in which no other point beats it.
        figures: by suite, then by objective: `domain` (the mean where there are several experts), that of each expert,
            `forgetting`.
    """

    trial: int
    kind: TrialKind
    method: str
    on_front: bool
    is_knee: bool
    is_flagged: bool
    chance: float
    figures: Mapping[str, Mapping[str, Interval]]


def front_rows(run: ScoredRun, *, anchors: bool = False) -> list[FrontRow]:
    """Return the front from least to most forgetting by the search items.

    Args:
        anchors: with the anchors among them, and what a guard of written answers keeps off.
    """
    front = set(run.front().index)
    if not front:
        return []
    knee, names = run.knee(), dict.fromkeys(["domain", *run.objectives])
    figures = {suite: rows_of(run.points(suite)) for suite in SUITES}
    chances = run.points()["front_chance"]
    flagged, others = {*run.flagged}, {*run.anchors().index, *run.kept_off} if anchors else set()
    return [
        FrontRow(
            trial=trial,
            kind=run.kinds[trial],
            method=run.method(trial),
            on_front=trial in front,
            is_knee=trial == knee,
            is_flagged=trial in flagged,
            chance=float(chances[trial]),
            figures={
                suite: {name: Interval.of(rows[trial], name) for name in names} for suite, rows in figures.items()
            },
        )
        for trial in _by_forgetting(run.points(), front | others)
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
    """Return the best point for each of some limits on forgetting that a point keeps."""
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


@dataclass(frozen=True, slots=True)
class SentinelRow:
    """What one point of the front, or an anchor, won or lost on the sentinel tasks.

    Args:
        changes: by task; a task that a trial was not scored on is not among them.
    """

    trial: int
    kind: TrialKind
    method: str
    on_front: bool
    is_knee: bool
    changes: Mapping[str, Change]


def sentinel_rows(run: ScoredRun) -> list[SentinelRow]:
    """Return front and anchors on the sentinel tasks, in the order of `front_rows`; empty where nothing was scored."""
    changes: dict[int, dict[str, Change]] = {}
    for row in rows_of(run.sentinels()).values():
        changes.setdefault(int(row["trial"]), {})[row["task"]] = change_of(row)
    return [
        SentinelRow(row.trial, row.kind, row.method, row.on_front, row.is_knee, changes[row.trial])
        for row in (front_rows(run, anchors=True) if changes else [])
        if row.trial in changes
    ]


def change_of(row: Mapping[str, Any]) -> Change:
    """Return what a trial won or lost on a sentinel task.

    Args:
        row: of `ScoredRun.sentinels`.
    """
    unit = POINTS if row["metric"] in ACCURACIES else one_line(row["metric"])
    return Change(row["change"], row["low"], row["high"], unit)


def sentinel_titles(run: ScoredRun) -> dict[str, str]:
    """Return each sentinel task that was scored, its unit and the base's score, by the task's name."""
    first = {row["task"]: row for row in reversed(rows_of(run.sentinels()).values())}
    titles = {}
    for task in (task.name for task in run.tasks if task.name in first):
        unit, score = change_of(first[task]).unit, first[task]["base_score"]
        base = f"{100 * score:.1f}" if unit == POINTS else f"{score:.3f}"
        titles[task] = f"{one_line(task)}, {unit}, base at {base}"
    return titles


def share_of(row: Mapping[str, Any]) -> Interval:
    """Return what a trial won or kept of a task.

    Args:
        row: of `ScoredRun.retention`.
    """
    return Interval(row["share"], row["low"], row["high"])
