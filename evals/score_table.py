"""One task's outcomes as arrays, items by trials; what a trial was not scored on of a bank is estimated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from evals.bank import Seen, estimate, regression_error, towards_regression
from evals.errors import TaskError
from evals.statistics import score_of
from evals.task_rows import TaskRows, task_rows

Array = NDArray[np.float64]

LARGEST = 1e30  # of what an item adds to a score: sums of such numbers are finite
NEEDED = ("trial", "item", "value", "weight", "inclusion", "statistic", "parts", "cluster")  # of outcomes
OF_MARGINS = ("loglikelihoods", "lengths", "right")  # and where scores are estimated: lists take room and time
AGREEMENT = 0.9  # of the answers that margins must tell, to be what the regression is on


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """One task's outcomes as arrays: n items in hash order, T trials in rising order.

    Args:
        values: those of items that a trial was not scored on are estimated (`evals.bank`).
        clusters: which items share a passage, by number from 0 to k - 1; None where each stands for itself.
        pulls: of each such trial's drawn items on the error of its sum, as of `Estimate`, for items like the bank's;
            None where every trial was scored on all.
        statistic, parts: of a score that is no ratio of values to weights: its name, and what items add to it.
    """

    trials: NDArray[np.int64]  # (T,)
    values: Array  # (n, T)
    weights: Array  # (n,)
    pulls: Array | None = None  # (n, T)
    statistic: str = ""
    parts: Array | None = None  # (n, T, k)
    clusters: NDArray[np.int64] | None = None  # (n,)

    @property
    def scores(self) -> Array:
        if self.parts is not None:
            return score_of(self.statistic, self.parts.sum(axis=0))
        return np.asarray(self.values.sum(axis=0) / self.weights.sum())  # (T,)

    def residuals(self) -> Array:
        """Compute each item's pull on the score's error, or each cluster's; their sum of squares is its variance
        (linearised ratio).

        Returns:
            (k, T), or (2 k, T) where scores are estimated: what the items may be off by, then what the estimates may.
        """
        if self.parts is not None:  # the jackknife's, which for a mean are the same
            parts = self.by_cluster(self.parts)
            without, k = score_of(self.statistic, parts.sum(axis=0) - parts), len(parts)
            return np.asarray((without.mean(axis=0) - without) * np.sqrt((k - 1) / k) if k > 1 else without * np.nan)
        pull = self.by_cluster(self.values - self.scores * self.weights[:, None]) / self.weights.sum()
        k = len(pull)
        sampled = np.asarray(pull * np.sqrt(k / (k - 1)) if k > 1 else pull * np.nan)
        return sampled if self.pulls is None else np.vstack([sampled, self.by_cluster(self.pulls) / self.weights.sum()])

    def by_cluster(self, values: Array) -> Array:
        """Add up values (n, ...) of items that share a passage: (k, ...); as they are where none do."""
        return values if self.clusters is None else summed(values, self.clusters)

    def stderr(self) -> Array:
        return np.asarray(np.sqrt((self.residuals() ** 2).sum(axis=0)))  # (T,)

    def stderr_of_difference(self, trial: int, other: int) -> float:
        residuals = self.residuals()
        difference = residuals[:, self.column(trial)] - residuals[:, self.column(other)]
        return float(np.sqrt((difference**2).sum()))

    def column(self, trial: int) -> int:
        return int(np.searchsorted(self.trials, trial))


def table_of(rows: pd.DataFrame, task: str) -> Table:
    """Arrange a task's outcomes as arrays; estimate what a trial scores on items of a bank that it was not scored on.

    Raises:
        TaskError: there are none, a trial lacks an item or has it twice, or a number is not usable.
    """
    is_of_task = (rows["task"] == task).to_numpy(bool)
    is_drawn = "inclusion" in rows and bool((rows["inclusion"].to_numpy()[is_of_task] < 1).any())
    needed = [name for name in rows.columns if name in (NEEDED + OF_MARGINS if is_drawn else NEEDED)]
    return table_from(task_rows(rows.loc[is_of_task, needed]), task)


def table_from(rows: TaskRows, task: str) -> Table:
    """Arrange rows as `table_of` arranges outcomes; errors as there."""
    trial_codes, trials = pd.factorize(rows.trials, sort=True)
    item_codes, items = pd.factorize(rows.items, sort=True)
    n, t = len(items), len(trials)
    if not n:
        raise TaskError(f"task {task} has no outcome on this suite")
    filled = np.zeros((n, t), dtype=np.int64)
    np.add.at(filled, (item_codes, trial_codes), 1)
    is_drawn = np.bincount(trial_codes, rows.inclusion < 1, minlength=t) > 0  # (T,)
    wrong = (filled > 1) | ((filled != 1) & ~is_drawn)
    if wrong.any():
        item, trial = np.argwhere(wrong)[0]
        raise TaskError(
            f"every trial needs each item once: trial {trials[trial]} has item {items[item]} of task {task} "
            f"{filled[item, trial]} times"
        )
    if is_drawn.all():
        raise TaskError(f"task {task}: an estimate from some items of a bank needs a trial that was scored on all")
    values, weights = np.zeros((n, t)), np.full((n, t), np.nan)
    values[item_codes, trial_codes] = rows.values
    weights[item_codes, trial_codes] = rows.weights
    known = weights[:, int(np.flatnonzero(~is_drawn)[0])]
    if not (np.isfinite(values).all() and ((weights == known[:, None]) == filled).all() and (known > 0).all()):
        raise TaskError(f"outcomes of task {task} must be finite and weigh each item alike in every trial")
    numbers, clusters = np.asarray(trials, dtype=np.int64), clusters_of(rows.clusters, item_codes, n)
    if named := sorted(rows.statistics - {""}):
        parts = _parts(rows.parts, task, filled, (item_codes, trial_codes))
        if len(rows.statistics) > 1:
            raise TaskError(f"outcomes of task {task} must be of one score; they are of {', '.join(named)}")
        return Table(numbers, values, known, statistic=named[0], parts=parts, clusters=clusters)
    if not is_drawn.any():
        return Table(numbers, values, known, clusters=clusters)
    signals, chances = values, np.ones((n, t))
    chances[item_codes, trial_codes] = rows.inclusion
    if (found := telling_margins(rows)) is not None:
        signals = np.zeros((n, t))
        signals[item_codes, trial_codes] = found
    pulls = _estimate_into(values, signals, filled == 1, chances, is_drawn)
    return Table(numbers, values, known, pulls, clusters=clusters)


def clusters_of(names: NDArray[np.object_] | None, item_codes: NDArray[np.int64], n: int) -> NDArray[np.int64] | None:
    """Find which items share a passage: (n,) from 0; None where each stands for itself, as in what was kept before.

    Args:
        names: (R,) of the passage of each row, "" for none; None: of no row.
        item_codes: (R,) which of the n items each row is of.
    """
    if names is None:
        return None
    told = names != ""
    whole = np.array([f"item {i}" for i in range(n)], dtype=object)  # what shares nothing is a cluster of its own
    whole[item_codes[told]] = names[told]
    codes, found = pd.factorize(whole)
    return np.asarray(codes, dtype=np.int64) if len(found) < n else None


def summed(values: Array, clusters: NDArray[np.int64]) -> Array:
    """Add up values (n, ...) by cluster: (k, ...)."""
    order = np.argsort(clusters, kind="stable")
    starts = np.searchsorted(clusters[order], np.arange(clusters.max() + 1))
    return np.asarray(np.add.reduceat(values[order], starts, axis=0))


def _parts(
    given: Sequence[Sequence[float] | None], task: str, filled: NDArray[np.int64], at: tuple[NDArray[np.int64], ...]
) -> Array:
    """Arrange what items add to a score: (n, T, k)."""
    sizes = {0 if part is None else len(part) for part in given}
    if len(sizes) != 1 or 0 in sizes or (filled != 1).any():
        raise TaskError(f"outcomes of task {task} must have parts of one length for each item")
    parts = np.zeros((*filled.shape, sizes.pop()))
    parts[at] = np.array(
        [list(part) for part in given if part is not None], dtype=np.float64
    )  # none is None: no size is 0
    if not (np.abs(parts) < LARGEST).all():
        raise TaskError(f"outcomes of task {task} must be finite, and below {LARGEST:g}")
    return parts


def margins_of(rows: pd.DataFrame) -> Array | None:
    """Compute the margin of each of a task's outcomes, for each token of a choice where that tells more answers.

    Returns:
        (R,) in nats, or in nats a token; None where an outcome has no choices, where its right ones were not kept, or
        where the margins do not tell the answers.
    """
    return telling_margins(task_rows(rows, is_bank=True))


def telling_margins(rows: TaskRows) -> Array | None:
    """Choose the margins that tell more of the answers; as `margins_of`."""
    if rows.margins is None:
        return None
    answers = rows.values == 1
    found = max(rows.margins, key=lambda margins: int(((margins > 0) == answers).sum()))
    return found if ((found > 0) == answers).mean() >= AGREEMENT and np.isfinite(found).all() else None


def _estimate_into(
    values: Array, signals: Array, is_there: NDArray[np.bool_], chances: Array, is_drawn: NDArray[np.bool_]
) -> Array:
    """Estimate what is not there of the drawn trials' values (n, T), in place; gives the pulls (n, T)."""
    are_margins = signals is not values
    anchors, of_anchors, n = signals[:, ~is_drawn].copy(), values[:, ~is_drawn].copy(), len(values)
    pulls, errors = np.zeros_like(values), {}
    for trial in np.flatnonzero(is_drawn):
        places = np.flatnonzero(is_there[:, trial])
        seen = Seen(places, values[places, trial], signals[places, trial].copy(), chances[places, trial])
        if (draw := places.tobytes()) not in errors:  # candidates share theirs
            errors[draw] = regression_error(anchors, of_anchors, places, are_margins=are_margins)
        found = estimate(anchors, seen, are_margins=are_margins)
        found = towards_regression(found, anchors, seen, errors[draw], are_margins=are_margins)
        values[:, trial] = found.values
        # the bank's items stand for others like them: what is foretold varies less than what would be measured
        pulls[:, trial] = found.pulls * np.sqrt(1 + len(places) / n)
    return pulls
