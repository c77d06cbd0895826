"""Scores that are no mean over items: each is a function of sums of the items' parts, and is recomputed from these.

What an item adds is kept with its outcome, so that a score can be had of any resampling of the items, without lm-eval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from evals.errors import TaskError

Array = NDArray[np.float64]

F1, MCC, PERPLEXITY, RATIO = "f1", "mcc", "perplexity", "ratio"
OWN = "own"  # a task's own aggregation: its items have pseudo-values, whose mean is the score
MOST_CLASSES = 32


def f1(sums: Array) -> Array:
    """Compute the F1 of the second of two choices, 0 where nothing is told or found.

    Args:
        sums: (..., 3) true positives, false positives, false negatives.
    """
    true, other = 2 * sums[..., 0], sums[..., 1] + sums[..., 2]
    return _divided(true, true + other)


def mcc(sums: Array) -> Array:
    """Compute Matthews' correlation coefficient of any number of classes, 0 where one side is always the same.

    Args:
        sums: (..., K * K) items by right class, then by the class that was chosen.

    Source: Gorodkin, "Comparing two K-category assignments by a K-category correlation coefficient", 2004, equation 8.
    """
    k = math.isqrt(sums.shape[-1])
    table = sums.reshape(*sums.shape[:-1], k, k)
    right, chosen, total = table.sum(axis=-1), table.sum(axis=-2), table.sum(axis=(-1, -2))
    hits = np.trace(table, axis1=-2, axis2=-1)
    both = total * hits - (right * chosen).sum(axis=-1)
    spread = (total**2 - (right**2).sum(axis=-1)) * (total**2 - (chosen**2).sum(axis=-1))
    return _divided(both, np.sqrt(np.maximum(spread, 0.0)))


def perplexity(sums: Array) -> Array:
    """Compute exp(-log-likelihood / size) from (..., 2): log-likelihoods in nats, and what they are of."""
    with np.errstate(over="ignore"):
        return np.asarray(np.exp(-_divided(sums[..., 0], sums[..., 1])))


def ratio(sums: Array) -> Array:
    """Compute the first of (..., 2) sums over the second."""
    return _divided(sums[..., 0], sums[..., 1])


STATISTICS: Mapping[str, Callable[[Array], Array]] = {F1: f1, MCC: mcc, PERPLEXITY: perplexity, RATIO: ratio}


def score_of(statistic: str, sums: Array) -> Array:
    """Compute a statistic of sums of parts (..., k): (...).

    Raises:
        TaskError: it is not known, or has other parts.
    """
    k = sums.shape[-1]
    fits = {F1: k == 3, MCC: 0 < k == math.isqrt(k) ** 2, PERPLEXITY: k == 2, RATIO: k == 2}
    if not fits.get(statistic):
        raise TaskError(f"outcomes of a score that this version cannot recompute: {statistic!r} of {k} parts")
    return STATISTICS[statistic](sums)


def parts_of_choice(statistic: str, given: object, classes: int) -> tuple[float, ...]:
    """Return what one item adds to F1 or MCC.

    Args:
        given: lm-eval's pair of the right choice and the chosen one, by their places.
        classes: choices of the task's items, at most.

    Raises:
        TaskError: no such pair.
    """
    right, chosen = given if isinstance(given, tuple | list) and len(given) == 2 else (None, None)
    places = [int(n) if isinstance(n, int | np.integer) and 0 <= n < classes else None for n in (right, chosen)]
    if None in places:
        raise TaskError(f"{statistic} needs the places of right and chosen choice, below {classes}: {given!r} given")
    if statistic == F1:
        return tuple(float(pair == tuple(places)) for pair in ((1, 1), (0, 1), (1, 0)))
    cell = places[0] * classes + places[1]  # type: ignore[operator]
    return tuple(float(i == cell) for i in range(classes * classes))


def pseudo_values(aggregate: Callable[[list[object]], float], items: list[object]) -> list[float]:
    """Return a value for each item whose mean is the aggregate of all, and whose spread is that of leaving it out.

    Source: Tukey's jackknife; Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 11.
    """
    whole, n = float(aggregate(items)), len(items)
    if n < 2:
        return [whole] * n
    without = np.array([float(aggregate(items[:i] + items[i + 1 :])) for i in range(n)])
    return [float(value) for value in whole - (n - 1) * (without - without.mean())]


def _divided(above: Array, below: Array) -> Array:
    return np.divide(above, below, out=np.zeros(np.broadcast(above, below).shape), where=below != 0)
