"""Methods that turn tensors as vectors: each is a mixture whose factors follow from lengths and angles alone.

So the tensors' dot products (a Gram matrix, a fact) are all that is measured, and a candidate costs one mixture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from evals.memory import where_float64_is
from optimizer.errors import MergeError
from optimizer.merging.methods.blocks import Blend, Deltas, Factor, Line, Mixture, Tensors, Values, row_width
from optimizer.merging.methods.facts import exact_sum

DOT_THRESHOLD = 0.9995  # beyond it the arc of slerp is numerically a line
COLLINEAR = 1e-7  # squared sine below which nuslerp's arc is a line: what float32 can tell
EPS = 1e-8

Axis = Literal["whole", "rows", "columns"]
Array = np.ndarray[Any, np.dtype[np.float64]]


def slerp(tensors: Tensors, values: Values) -> Blend:
    """Go along the arc from base to expert, a tensor being one vector; along a line where they are nearly parallel.

    Source: Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985.
    """
    t = values.shared["t"]
    dots = _dots(tensors, "whole", deltas=False)[..., 0]
    length, expert_length = (x if x > EPS else 1.0 for x in np.sqrt(np.diag(dots)).tolist())
    cosine = float(dots[0, 1]) / (length * expert_length)
    if abs(cosine) > DOT_THRESHOLD:
        return Line(t)
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    return _mixed(math.sin((1 - t) * angle) / math.sin(angle), [math.sin(t * angle) / math.sin(angle)])


def nuslerp(tensors: Tensors, values: Values) -> Blend:
    """Go along the arc from base to expert by the expert's share; with two experts, from one delta to the other.

    With two experts only the ratio of the weights counts. Each row (nuslerp_flatten off) or column (nuslerp_row_wise,
    as mergekit calls it) may be a vector of its own.
    """
    axis: Axis = "whole"
    if not values.on("nuslerp_flatten"):
        axis = "columns" if values.on("nuslerp_row_wise") else "rows"
    if len(tensors.experts) == 1:
        (t,) = values.weights
        if t == 1.0:
            return Line(1.0)
        ours, theirs = _arc(_dots(tensors, axis, deltas=False), t)
        return _mixed(_factor(ours, axis), [_factor(theirs, axis)])
    total = sum(values.weights)
    t = values.weights[1] / total if abs(total) >= 1e-6 else 0.5
    return Deltas([_factor(part, axis) for part in _arc(_dots(tensors, axis, deltas=True), t)])


def multislerp(tensors: Tensors, values: Values) -> Blend:
    """Average on the sphere in the tangent space at the weighted mean direction; lengths are averaged by weight.

    Of base and experts, the base having what the weights leave of 1; or of the deltas, around the base.

    Source: Goddard, Multi-SLERP, 2025.

    Raises:
        MergeError: the weighted directions cancel out.
    """
    deltas, weights = values.on("deltas"), np.array(values.weights)
    if not deltas:
        weights = np.array([1.0 - math.fsum(weights), *weights])
    elif values.on("normalize_weights"):
        weights = weights / _nonzero(float(weights.sum()), tensors, "weights sum to 0")
    if len(values.weights) == 1 and (deltas or weights[-1] == 1.0):
        return Line(float(weights[-1]))
    dots, eps = _dots(tensors, "whole", deltas=deltas)[..., 0], values.shared["eps"]
    lengths = np.sqrt(np.diag(dots)) + eps
    units = dots / np.outer(lengths, lengths)
    size = _length(weights, units)
    if size < eps and len(weights) > 2 and dots.any():
        _nonzero(0.0, tensors, "weighted directions cancel out")
    if size < eps:
        factors = weights
    else:
        mean = weights / size
        tangent = weights - (weights @ units @ mean) * mean
        angle = _length(tangent, units) + eps
        turned = mean * math.cos(angle) + tangent * (math.sin(angle) / angle)
        factors = turned * float((lengths - eps) @ weights) / lengths
    parts = factors.tolist()
    return Deltas(parts) if deltas else _mixed(parts[0], parts[1:])


def karcher(tensors: Tensors, values: Values) -> Blend:
    """Find the point on the sphere with the least sum of squared angles to base and experts, at their mean length.

    The base has what the experts' shares leave of 1; mergekit knows equal shares only. Found by gradient descent in
    the tangent space; every iterate is a mixture of the tensors, so it is done on the factors alone.

    Source: Karcher, Riemannian center of mass, 1977; as a merge, arXiv 2603.04972.
    """
    tol, shares = values.shared["tol"], np.array([1.0 - math.fsum(values.weights), *values.weights])
    dots = _dots(tensors, "whole", deltas=False)[..., 0]
    lengths = np.sqrt(np.diag(dots))
    shares[np.abs(shares) < 1e-12] = 0.0
    if len(shares) == 2 and shares[0] == 0.0:
        return Line(1.0)
    used = np.flatnonzero((lengths > tol) & (shares != 0.0))
    if len(used) == 0:
        return _mixed(0.0, [0.0] * len(tensors.experts))
    units = dots[np.ix_(used, used)] / np.outer(lengths[used], lengths[used])
    parts = shares[used] / _nonzero(float(shares[used].sum()), tensors, "shares sum to 0")
    mean = _karcher_mean(units, parts, tol=tol, most=int(values.shared["max_iter"]))
    factors = np.zeros(len(shares))
    factors[used] = float(shares @ lengths) * mean / lengths[used]
    return _mixed(float(factors[0]), factors[1:].tolist())


def _karcher_mean(units: Array, shares: Array, *, tol: float, most: int) -> Array:
    """Iterate on the factors of unit vectors with the given dot products."""
    size = _length(shares, units)
    mean = shares / size if size >= tol else np.eye(len(shares))[0]
    for _ in range(most):
        cosines = np.clip(units @ mean, -1.0, 1.0)
        angles = np.arccos(cosines)
        far = angles >= tol
        steps = np.where(far, shares * angles / np.where(far, np.sin(angles), 1.0), 0.0)
        tangent = steps - float(steps @ cosines) * mean
        length = _length(tangent, units)
        if length < tol:
            break
        mean = math.cos(length) * mean + math.sin(length) / length * tangent
        mean = mean / _length(mean, units)
    return mean


def model_stock(tensors: Tensors, values: Values) -> Blend:
    """Go from the base towards the mean expert by t = N cos / (1 + (N - 1) cos), cos being their deltas' mean cosine.

    t is of the experts' own deltas; a weight scales an expert's part in the mean. One expert has no angle: t is 1.

    Source: arXiv 2403.19522, section 4 and appendix: the ratio for N models.
    """
    count = len(tensors.experts)
    if count == 1:
        return Line(values.weights[0])
    axis: Axis = "rows" if values.on("filter_wise") else "whole"
    dots = _dots(tensors, axis, deltas=True)
    lengths = np.sqrt(dots[range(count), range(count)])
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    cosines = [np.clip(dots[i, j] / np.maximum(lengths[i] * lengths[j], 1e-6), -1.0, 1.0) for i, j in pairs]
    cosine = np.mean(cosines, axis=0)
    divisor = 1 + (count - 1) * cosine
    singular = np.abs(divisor) < 1e-6
    t = np.where(singular, 0.0, count * cosine / np.where(singular, 1.0, divisor))
    return Deltas([_factor(t * weight / count, axis) for weight in values.weights])


def _length(factors: Array, dots: Array) -> float:
    """Compute the length of a mixture of vectors with the given dot products."""
    return math.sqrt(max(0.0, float(factors @ dots @ factors)))


def _arc(dots: Array, t: float) -> tuple[Array, Array]:
    """Compute two vectors' factors (2, 2, vectors) at t on the arc between them; on a line where it is flat."""
    lengths = np.maximum(np.sqrt(dots[[0, 1], [0, 1]]), 1e-7)
    cosine = np.clip(dots[0, 1] / (lengths[0] * lengths[1]), -1.0, 1.0)
    flat = 1 - cosine**2 <= COLLINEAR
    angle = np.arccos(np.where(flat, 0.0, cosine))
    sine = np.where(flat, 1.0, np.sin(angle))
    ours = np.where(flat, 1 - t, np.sin((1 - t) * angle) / sine)
    return ours, np.where(flat, t, np.sin(t * angle) / sine)


def _mixed(ours: Factor, theirs: Sequence[Factor]) -> Blend:
    """Mix them; exactly the expert where nothing but it is left."""
    only_expert = len(theirs) == 1 and isinstance(ours, float) and (ours, theirs[0]) == (0.0, 1.0)
    return Line(1.0) if only_expert else Mixture(ours, theirs)


def _factor(factors: Array, axis: Axis) -> Factor:
    if axis == "whole":
        return float(factors[0])
    column = torch.from_numpy(factors).float()
    return column[:, None] if axis == "rows" else column[None, :]


def _nonzero(number: float, tensors: Tensors, problem: str) -> float:
    if number == 0.0:
        names = ", ".join(name for name, _ in tensors.experts)
        raise MergeError(f"there is no mean direction where {problem}: {tensors.name} of {names}; change the weights")
    return number


# Measuring


def _dots(tensors: Tensors, axis: Axis, *, deltas: bool) -> Array:
    """Compute the dot products of base and experts, or of the deltas, as vectors along an axis: (k, k, vectors)."""
    if tensors.base.dim() < 2:
        axis = "whole"
    return tensors.get_or_compute(f"dots {axis} {deltas}", lambda: _measured_dots(tensors, axis, deltas))


def _measured_dots(tensors: Tensors, axis: Axis, deltas: bool) -> Array:
    shape = tensors.base.shape
    columns = math.prod(shape[1:]) if axis == "columns" else row_width(tensors.base)
    parts: list[Array] = []
    for block in _vectors(tensors, deltas, columns):
        count = len(block)
        pairs = [[block[i] * block[j] for j in range(i + 1)] for i in range(count)]
        sums = [[_sum_along(pair, axis) for pair in row] for row in pairs]
        parts.append(np.array([[sums[max(i, j)][min(i, j)] for j in range(count)] for i in range(count)]))
    if not parts:
        count = len(tensors.experts) + (not deltas)
        return np.zeros((count, count, 1))
    return np.concatenate(parts, axis=2) if axis == "rows" else np.sum(parts, axis=0)


def _vectors(tensors: Tensors, deltas: bool, width: int) -> Iterator[list[Tensor]]:
    for _, b, xs in tensors.blocks(width):
        yield [x.sub_(b) for x in xs] if deltas else [b, *xs]


def _sum_along(block: Tensor, axis: Axis) -> Array:
    """Sum to float64 of shape (vectors,)."""
    if axis == "whole":
        return np.array([exact_sum(block)])
    return where_float64_is(block).double().sum(1 if axis == "rows" else 0).cpu().numpy()
