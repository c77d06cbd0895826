"""How sure a front is: the share of resamplings in which no other point beats a point."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from optimizer.runs.front import non_dominated

Array = NDArray[np.float64]

BELOW = 0.1587  # the quantile one standard error below
FEW = 200  # resamplings that are enough where each one takes a loop of its own


def front_chances(samples: Array) -> Array:
    """Count the share of resamplings in which each point is on the front.

    Args:
        samples: (B, T, m) objectives of T points, minimised; row b of the same items for all points.

    Returns:
        (T,) shares, 0 to 1; NaN where there is no resampling.
    """
    if not len(samples):
        return np.full(samples.shape[1], np.nan)
    if samples.shape[2] == 2:
        return np.asarray(_on_front(samples[:, :, 0], samples[:, :, 1]).mean(axis=0))
    return np.asarray(np.mean([non_dominated(row) for row in samples[:FEW]], axis=0))


def knee_by_samples(samples: Array, front: NDArray[np.int64], is_expert: NDArray[np.bool_]) -> int:
    """Find the point of a front that is farthest above the line from base to expert one standard error below its mean.

    The largest of many measured heights was also the luckiest; what a point surely has does not win by luck.

    Args:
        samples: (B, T, m) as of `front_chances`.
        front: (F,) which of the T are on the front.
        is_expert: (T,) which are experts.

    Returns:
        The position of the point among the F.
    """
    lost = np.maximum(samples[:, front, -1], 0.0)
    most = np.maximum(samples[:, is_expert, -1].max(axis=1, initial=0.0), 1e-9)[:, None]
    heights = -samples[:, front, :-1].mean(axis=2) - lost / most  # (B, F)
    return int(np.argmax(np.quantile(heights, BELOW, axis=0)))


def _on_front(x: Array, y: Array) -> NDArray[np.bool_]:
    """Mark the points that none beats, in every resampling at once: (B, T).

    In lexicographic order only an earlier point can dominate: one that is lower in y, or as low and lower in x.
    """
    by_y = np.argsort(y, axis=1, kind="stable")
    by_x = np.argsort(np.take_along_axis(x, by_y, axis=1), axis=1, kind="stable")
    order = np.take_along_axis(by_y, by_x, axis=1)
    xs, ys = np.take_along_axis(x, order, axis=1), np.take_along_axis(y, order, axis=1)
    lowest = np.minimum.accumulate(ys, axis=1)
    before = np.hstack([np.full((len(x), 1), np.inf), lowest[:, :-1]])
    first = np.maximum.accumulate(np.where(ys < before, np.arange(x.shape[1]), 0), axis=1)
    x_of_lowest = np.take_along_axis(xs, np.hstack([np.zeros((len(x), 1), dtype=first.dtype), first[:, :-1]]), axis=1)
    is_beaten = (before < ys) | ((before == ys) & (x_of_lowest < xs))
    marks = np.empty_like(is_beaten)
    np.put_along_axis(marks, order, ~is_beaten, axis=1)
    return marks
