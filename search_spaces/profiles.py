"""Profiles: weights along the layers, and the few numbers (knots) that a shape makes them of.

Linear throughout: a layer's weight is a knot's or lies on the line between two, so knots are found back from weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from search_spaces.shape import Shape

Array = NDArray[np.float64]
Profile = Callable[[float], float]  # depth in [0, 1] -> weight


@dataclass(frozen=True, slots=True)
class Knot:
    """A sampled number of a layer profile: its name's last part and the depth in [0, 1] it stands for."""

    suffix: str
    depth: float


def knots_of(shape: Shape, layers: int) -> list[Knot]:
    """Give the knots of one profile, first layer to last."""
    kind, n, last = shape.kind, shape.n, max(layers - 1, 1)
    if kind == "uniform":
        return [Knot("", 0.5)]
    if kind == "slope":
        return [Knot("slope.0", 0.0), Knot("slope.1", 1.0)]
    if kind == "curve":
        return [Knot(f"curve.{i}", i / (n - 1)) for i in range(n)]
    if kind == "layers":
        return [Knot(f"layer.{i:02d}", i / last) for i in range(layers)]
    blocks = [[i for i in range(layers) if i * n // layers == block] for block in range(n)]
    return [Knot(f"block.{i}", (block[0] + block[-1]) / (2 * last)) for i, block in enumerate(blocks)]


def weight_at(shape: Shape, layer: int, layers: int, knot: Callable[[int], float]) -> float:
    """Give a layer's weight: its block's, or on the line between two knots.

    Args:
        knot: the value of a knot by its number, counted from the first layer.
    """
    n = _count(shape, layers)
    if shape.kind not in ("slope", "curve"):
        return knot(layer * n // layers)
    place = layer * (n - 1) / max(layers - 1, 1)
    left = min(int(place), n - 2)
    return _between(knot(left), knot(left + 1), place - left)


def fit_knots(shape: Shape, weights: Mapping[int, float], layers: int) -> list[float]:
    """Give the knots whose profile comes nearest to the weights of some layers."""
    knots = np.linalg.lstsq(_shares(shape, list(weights), layers), np.array(list(weights.values())), rcond=None)[0]
    return [round(float(knot), 12) + 0.0 for knot in knots]


def live_knots(shape: Shape, present: Sequence[int], layers: int) -> list[int]:
    """Give the numbers of the knots that some of these layers hang on."""
    return [int(knot) for knot in np.flatnonzero(_shares(shape, present, layers).any(axis=0))]


def _shares(shape: Shape, present: Sequence[int], layers: int) -> Array:
    """Return how much each knot counts in each layer: (layers given, knots)."""
    unit = np.eye(_count(shape, layers))
    return np.array([[weight_at(shape, i, layers, row.__getitem__) for row in unit] for i in present])


def _count(shape: Shape, layers: int) -> int:
    """Count the knots of one profile."""
    return {"uniform": 1, "slope": 2, "layers": layers}.get(shape.kind, shape.n)


def straight(first: float, last: float) -> Profile:
    """Give the line from the first layer's weight to the last's."""
    return lambda depth: _between(first, last, depth)


def _between(first: float, last: float, share: float) -> float:
    return last if share == 1.0 else first + share * (last - first)
