"""The Pareto front of a set of points: who is on it, how much it covers, and which point to pick.

Shapes: n points of m objectives, all to be minimised (`losses` negates what is maximised).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

LIMITS = (0.01, 0.02, 0.05, 0.1, 0.2)  # on forgetting, for which a run gives its answer unasked
SURE = 0.9  # and how sure that is, a share of resamplings


def losses(objectives: ArrayLike) -> NDArray[np.float64]:
    """Negate what is maximised, so that all is minimised.

    Args:
        objectives: (n, m) in a study's order: the domain gain of each expert, then forgetting.
    """
    turned = np.array(objectives, dtype=float)
    turned[..., :-1] *= -1
    return turned


def non_dominated(values: ArrayLike) -> NDArray[np.bool_]:
    """Mark the points that no other point beats.

    One point dominates another when it is nowhere worse and somewhere better; equal points do not dominate each other.

    Args:
        values: (n, m), minimised, finite.

    Returns:
        (n,) True on the front.
    """
    points = _points(values)
    mask = np.zeros(len(points), dtype=bool)
    # In lexicographic order a point can be dominated only by an earlier one, and then by an earlier one on the front.
    for i in np.lexsort(points.T[::-1]):
        front = points[mask]
        dominated = (front <= points[i]).all(axis=1) & (front < points[i]).any(axis=1)
        mask[i] = not dominated.any()
    return mask


def on_front(values: ArrayLike, is_fitted: ArrayLike) -> NDArray[np.bool_]:
    """Mark the points that no other beats, where a point that was fitted to the items beats only others of its kind.

    By items that it was fitted to it looks better than it is, and would hide points that are better than it.

    Args:
        values: (n, m), minimised, finite.
        is_fitted: (n,).

    Returns:
        (n,) True on the front.
    """
    points, fitted = _points(values), np.asarray(is_fitted, dtype=bool)
    mask = non_dominated(points)
    mask[~fitted] = non_dominated(points[~fitted])
    return mask


def front_without(
    values: ArrayLike, is_kept_off: Callable[[int], bool], is_fitted: ArrayLike | None = None
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Mark the points on the front, without those that are kept off; only who would be on it is asked.

    Args:
        values: (n, m), minimised, finite.
        is_kept_off: tells it of a position.
        is_fitted: (n,) as of `on_front`; None: none was.

    Returns:
        (n,) True on the front; (n,) True for those that would be, but for being kept off.
    """
    points = _points(values)
    off = np.zeros(len(points), dtype=bool)
    fitted = np.zeros(len(points), dtype=bool) if is_fitted is None else np.asarray(is_fitted, dtype=bool)
    while True:
        mask = np.zeros(len(points), dtype=bool)
        mask[~off] = on_front(points[~off], fitted[~off])
        found = [int(place) for place in np.flatnonzero(mask) if is_kept_off(int(place))]
        if not found:
            return mask, off
        off[found] = True


def hypervolume(values: ArrayLike, reference: ArrayLike) -> float:
    """Compute the volume between the points and a reference point: larger is better, exact in any number of objectives.

    A point that is not better than the reference in every objective covers nothing.

    Args:
        values: (n, m), minimised, finite.
        reference: (m,), the worst corner that still counts.

    Source: While et al., "A faster algorithm for calculating hypervolume", 2006 (slicing objectives).
    """
    points = _points(values)
    corner = np.asarray(reference, dtype=float)
    assert corner.shape == points.shape[1:], "the reference needs one value per objective"
    points = points[(points < corner).all(axis=1)]
    return _sliced(points[non_dominated(points)], corner)


def growth(values: ArrayLike, reference: ArrayLike) -> list[float]:
    """Compute the hypervolume of the first point, of the first two, and so on; arguments as of `hypervolume`."""
    points = _points(values)
    covered, front, found = 0.0, np.empty((0, points.shape[1])), []
    for point in points:
        candidates = np.vstack([front, point])
        mask = non_dominated(candidates)
        if mask[-1]:
            front = candidates[mask]
            covered = hypervolume(front, reference)
        found.append(covered)
    return found


def hypervolumes(values: ArrayLike, reference: ArrayLike) -> NDArray[np.float64]:
    """Give the hypervolume of many sets of as many points each, all at once.

    Args:
        values: (B, n, m), minimised, finite.
        reference: (m,), the worst corner that still counts.

    Returns:
        (B,) what `hypervolume` gives for each set.
    """
    sets, corner = np.asarray(values, dtype=float), np.asarray(reference, dtype=float)
    assert corner.shape == sets.shape[2:], "the reference needs one value per objective"
    return _all_sliced(np.minimum(sets, corner), corner)  # at the corner a point covers nothing


def _all_sliced(sets: NDArray[np.float64], corner: NDArray[np.float64]) -> NDArray[np.float64]:
    count, n, m = sets.shape
    if not n:
        return np.zeros(count)
    if m == 1:
        return np.asarray(corner[0] - sets[:, :, 0].min(axis=1))
    order = np.argsort(sets[:, :, -1], axis=1)[:, :, None]
    sets = np.take_along_axis(sets, order, axis=1)
    ends = np.full((count, 1), corner[-1])
    depths = np.diff(np.hstack([sets[:, :, -1], ends]), axis=1)  # (B, n)
    areas = [_all_sliced(sets[:, : i + 1, :-1], corner[:-1]) for i in range(n)]
    return np.asarray((depths * np.stack(areas, axis=1)).sum(axis=1))


def _sliced(points: NDArray[np.float64], corner: NDArray[np.float64]) -> float:
    if not len(points):
        return 0.0
    if points.shape[1] == 1:
        return float(corner[0] - points.min())
    points = points[np.argsort(points[:, -1])]
    depths = np.diff(np.append(points[:, -1], corner[-1]))
    # Between two heights of the last objective, the points below cover the same area of the other objectives.
    slices = (_sliced(points[: i + 1, :-1], corner[:-1]) * depth for i, depth in enumerate(depths) if depth > 0)
    return float(sum(slices))


def knee(domain: ArrayLike, forgetting: ArrayLike, *, expert_forgetting: float) -> int:
    """Find the point farthest above the straight line from the base (0, 0) to the expert (its forgetting, 1).

    A point better than the base at general tasks counts as one that forgot nothing: no such luck buys domain skill.

    Args:
        domain: (n,) share of the expert's gain.
        forgetting: (n,) share of the base's ability lost.
        expert_forgetting: what the expert forgot, the worst one of several; where it forgot nothing, the largest
            domain gain is the knee.

    Returns:
        The position of the point; of equals the one that forgets least, then the first.
    """
    gain, loss = np.asarray(domain, dtype=float), np.asarray(forgetting, dtype=float)
    assert len(gain), "a knee needs at least one point"
    height = heights_above(gain, loss, expert_forgetting=expert_forgetting)
    return int(np.lexsort((loss, -height))[0])


def heights_above(domain: ArrayLike, forgetting: ArrayLike, *, expert_forgetting: float) -> NDArray[np.float64]:
    """Compute how far points are above the line from the base to the expert; arguments as of `knee`.

    Returns:
        (n,) in shares of the domain gain.
    """
    gain, loss = np.asarray(domain, dtype=float), np.asarray(forgetting, dtype=float)
    return gain - np.maximum(loss, 0.0) / expert_forgetting if expert_forgetting > 0 else gain


def knee_of(losses: ArrayLike, is_expert: ArrayLike, is_on: ArrayLike | None = None) -> int:
    """Find the knee of a study's points, experts among them: the one a search tells of and a run recommends.

    Args:
        losses: (n, m) the negated domain gain of each expert, then forgetting.
        is_expert: (n,) which points are experts; before one is there, the largest domain gain is the knee.
        is_on: (n,) which points are on the front; None: those that no other beats.

    Returns:
        The position of the point among the n.
    """
    points, experts = _points(losses), np.asarray(is_expert, dtype=bool)
    front = np.flatnonzero(non_dominated(points) if is_on is None else is_on)
    gain, loss = -points[front, :-1].mean(axis=1), points[front, -1]
    return int(front[knee(gain, loss, expert_forgetting=points[experts, -1].max(initial=0.0))])


def best_under(domain: ArrayLike, forgetting: ArrayLike, *, max_forgetting: float) -> int | None:
    """Find the point with the most domain gain among those that forget at most so much, or None where there is none.

    Returns:
        The position of the point; of equals the one that forgets least, then the first.
    """
    gain, loss = np.asarray(domain, dtype=float), np.asarray(forgetting, dtype=float)
    allowed = np.flatnonzero(loss <= max_forgetting)
    if not len(allowed):
        return None
    return int(allowed[np.lexsort((loss[allowed], -gain[allowed]))[0]])


def gaps(values: ArrayLike, *, least: float = 0.0) -> list[tuple[int, float]]:
    """Find the neighbours on a front of two objectives between which a point could add most to the hypervolume.

    That is at most the area of the rectangle that has them for two of its corners.

    Args:
        values: (n, 2), n at least 2: a front in the order of either objective.
        least: of the area of the whole front's rectangle, below which a gap is none.

    Returns:
        i and the area between the points i and i + 1, the largest first; of equals the first.
    """
    points = _points(values)
    areas = np.abs(np.diff(points, axis=0)).prod(axis=1)
    order = np.argsort(-areas, kind="stable")
    return [(int(i), float(areas[i])) for i in order if areas[i] > least * np.ptp(points, axis=0).prod()]


def _points(values: ArrayLike) -> NDArray[np.float64]:
    points = np.asarray(values, dtype=float)
    assert points.ndim == 2, f"points come as rows, shape (n, m), not {points.shape}"
    assert np.isfinite(points).all(), "a failed trial has no objectives and is not a point"
    return points
