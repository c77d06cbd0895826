"""Outcomes of one task as arrays, one place per row: what tables are made of, joined from trials without a frame."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from evals.bank import margins
from evals.outcomes import Outcome

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class TaskRows:
    """Outcomes of one task: R rows, of one trial or of several.

    Args:
        trials: (R,).
        items: (R,) hashes.
        values, weights: (R,).
        inclusion: (R,) probability with which each was drawn; 1 where an earlier version kept none.
        margins: (R,) each, in nats and in nats a token; None where an outcome has no choices, or where its right ones
            were not kept.
        statistics: what the score is, where it is no ratio of sums; "" stands for one that is.
        parts: (R,) what each item adds to such a score; () where there is none.
        clusters: (R,) the passage that each item shares with others, "" for none; None where none is known.
    """

    trials: NDArray[np.int64]
    items: NDArray[np.object_]
    values: Array
    weights: Array
    inclusion: Array
    margins: tuple[Array, Array] | None
    statistics: frozenset[str] = frozenset({""})
    parts: tuple[Sequence[float] | None, ...] = ()
    clusters: NDArray[np.object_] | None = None


def task_rows(rows: pd.DataFrame, *, is_bank: bool | None = None) -> TaskRows:
    """Give one task's outcomes as arrays.

    Args:
        rows: columns `trial` and those of `Outcome`.
        is_bank: whether margins are wanted; None: where an item was drawn.
    """
    inclusion = _inclusion(rows)
    wants_margins = bool((inclusion < 1).any()) if is_bank is None else is_bank
    return TaskRows(
        rows["trial"].to_numpy(dtype=np.int64),
        rows["item"].to_numpy(dtype=object),
        rows["value"].to_numpy(dtype=np.float64),
        rows["weight"].to_numpy(dtype=np.float64),
        inclusion,
        _margins_in(rows) if wants_margins else None,
        *_parts_in(rows),
        clusters=clusters_in(rows),
    )


def rows_by_task(outcomes: pd.DataFrame, *, is_bank: bool) -> dict[str, TaskRows]:
    """Give the outcomes of each task as arrays; `is_bank` as of `task_rows`."""
    return {str(task): task_rows(rows, is_bank=is_bank) for task, rows in outcomes.groupby("task", sort=False)}


def joined(parts: Sequence[TaskRows]) -> TaskRows:
    """Give the rows of some parts, one part after another."""
    if len(parts) == 1:
        return parts[0]
    kept = [part.margins for part in parts if part.margins is not None]
    pair = None
    if len(kept) == len(parts):
        pair = (np.concatenate([one for one, _ in kept]), np.concatenate([other for _, other in kept]))
    return TaskRows(
        trials=np.concatenate([part.trials for part in parts]),
        items=np.concatenate([part.items for part in parts]),
        values=np.concatenate([part.values for part in parts]),
        weights=np.concatenate([part.weights for part in parts]),
        inclusion=np.concatenate([part.inclusion for part in parts]),
        margins=pair,
        statistics=frozenset().union(*(part.statistics for part in parts)),
        parts=_joined_parts(parts),
        clusters=_joined_clusters(parts),
    )


def _joined_parts(rows: Sequence[TaskRows]) -> tuple[Sequence[float] | None, ...]:
    if not any(part.parts for part in rows):
        return ()
    return tuple(chain.from_iterable(part.parts or [None] * len(part.values) for part in rows))


def _joined_clusters(rows: Sequence[TaskRows]) -> NDArray[np.object_] | None:
    if all(part.clusters is None for part in rows):
        return None
    return np.concatenate(
        [np.full(len(part.values), "", dtype=object) if part.clusters is None else part.clusters for part in rows]
    )


def clusters_in(rows: pd.DataFrame) -> NDArray[np.object_] | None:
    """Give the passage that the item of each row shares with others, "" for none: (R,); None where none is known."""
    if "cluster" not in rows or not (told := rows["cluster"].notna() & (rows["cluster"] != "")).any():
        return None
    return np.where(told, rows["cluster"].to_numpy(object), "")


def rows_of(trial: int, outcomes: Iterable[Outcome], *, is_bank: bool) -> dict[str, TaskRows]:
    """Give one trial's outcomes as arrays, by task; `is_bank` as of `task_rows`."""
    by_task: dict[str, list[Outcome]] = {}
    for row in outcomes:
        by_task.setdefault(row.task, []).append(row)
    return {task: _of_outcomes(trial, rows, is_bank=is_bank) for task, rows in by_task.items()}


def _of_outcomes(trial: int, rows: list[Outcome], *, is_bank: bool) -> TaskRows:
    items = np.empty(len(rows), dtype=object)
    items[:] = [row.item for row in rows]
    columns = ([getattr(row, name) for row in rows] for name in ("value", "weight", "inclusion"))
    values, weights, inclusion = (np.array(column, dtype=np.float64) for column in columns)
    choices = ([row.loglikelihoods for row in rows], [row.lengths for row in rows], [row.right for row in rows])
    margins = _both_margins(*choices) if is_bank else None
    statistics = frozenset(row.statistic for row in rows)
    parts = tuple(row.parts for row in rows) if statistics != {""} else ()
    trials = np.full(len(rows), trial, dtype=np.int64)
    clusters = np.array([row.cluster for row in rows], dtype=object)
    shared = clusters if (clusters != "").any() else None
    return TaskRows(trials, items, values, weights, inclusion, margins, statistics, parts, shared)


def _parts_in(rows: pd.DataFrame) -> tuple[frozenset[str], tuple[Sequence[float] | None, ...]]:
    if "statistic" not in rows or not (named := {*rows["statistic"].dropna().unique()} - {""}):
        return frozenset({""}), ()
    statistics = named | ({""} if not rows["statistic"].isin(named).all() else set())
    if "parts" not in rows:
        return frozenset(statistics), ()
    return frozenset(statistics), tuple(rows["parts"].astype(object).where(rows["parts"].notna(), None))


def _margins_in(rows: pd.DataFrame) -> tuple[Array, Array] | None:
    columns = ("loglikelihoods", "lengths", "right")
    if not set(columns) <= set(rows) or rows[["right", "lengths"]].isna().any(axis=None):
        return None
    return _both_margins(*(rows[name].to_list() for name in columns))


def _both_margins(
    loglikelihoods: Sequence[Sequence[float]], lengths: Sequence[Sequence[int]], right: Sequence[Sequence[int]]
) -> tuple[Array, Array] | None:
    """Compute the margin of each of R outcomes, in nats and in nats for each token of a choice.

    Returns:
        (R,) each; None where an outcome has no choices, or where its right ones were not kept.
    """
    counts, rights = np.array([*map(len, loglikelihoods)]), np.array([*map(len, right)])
    if not len(counts) or not rights.all() or not (counts > rights).all() or [*map(len, lengths)] != counts.tolist():
        return None
    at, width = np.arange(len(counts)).repeat(counts), int(counts.max())
    place = np.arange(len(at)) - (np.cumsum(counts) - counts).repeat(counts)
    scores, tokens = np.full((len(counts), width), -np.inf), np.ones((len(counts), width))
    scores[at, place] = np.concatenate(loglikelihoods)
    tokens[at, place] = np.maximum(np.concatenate(lengths), 1)
    is_right = np.zeros((len(counts), width), dtype=bool)
    chosen = np.concatenate(right).astype(np.int64)
    if not ((chosen >= 0) & (chosen < counts.repeat(rights))).all():
        return None
    is_right[np.arange(len(counts)).repeat(rights), chosen] = True
    return margins(scores, is_right), margins(scores / tokens, is_right)


def _inclusion(rows: pd.DataFrame) -> Array:
    """Give the probability with which each row's item was drawn; 1 where an earlier version kept none."""
    if "inclusion" not in rows:
        return np.ones(len(rows))
    return np.asarray(rows["inclusion"].astype(float).fillna(1.0), dtype=np.float64)
