"""Merge methods: pure functions from a base tensor and expert tensors to the merged one.

Called by `merge` for one tensor at a time. A method first looks at the whole tensors (norms, thresholds) and returns a
blend; the blend then maps float32 blocks of base and experts to a float32 block, so that scratch memory stays small.
The numbers each method takes are declared in `search_spaces.METHODS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import hardshrink, pad

BLOCK = 1 << 18  # elements: three float32 blocks stay in a core's cache; also the unit of DARE's random masks
DOT_THRESHOLD = 0.9995  # beyond it the arc of slerp is numerically a line
EPS = 1e-8

# (base block (n,), expert blocks each (n,), index of the block's first element) -> merged block (n,), all float32
Blend = Callable[[Tensor, Sequence[Tensor], int], Tensor]
# (base, experts, values) -> blend; tensors in their stored dtype, any shape
Method = Callable[[Tensor, Sequence[Tensor], "Values"], Blend]


@dataclass(frozen=True, slots=True)
class Values:
    """The numbers of a recipe at one tensor.

    Attributes:
        weights: one per expert, not 0.
        densities: one per expert, in (0, 1].
        seeds: one per expert, of 63 bits; the same seed gives the same mask.
        t: place on the arc from base (0) to expert (1).
        scale: of the merged delta ("lambda").
        normalize: divide by the weights of the experts that agree.
        rescale: divide what DARE keeps by the density.
    """

    weights: tuple[float, ...]
    densities: tuple[float, ...]
    seeds: tuple[int, ...]
    t: float = 1.0
    scale: float = 1.0
    normalize: bool = False
    rescale: bool = True


@dataclass(frozen=True, slots=True)
class Line:
    """The blend base + weight (expert - base), of the first expert.

    Below one half it starts from the base, above from the expert, so that both ends are exact (torch.lerp).
    """

    weight: float

    def __call__(self, b: Tensor, xs: Sequence[Tensor], _: int) -> Tensor:
        return torch.lerp(b, xs[0], self.weight)


def task_arithmetic(base: Tensor, experts: Sequence[Tensor], values: Values) -> Blend:
    """base + lambda * sum of w (expert - base). Source: arXiv 2212.04089."""
    if len(experts) == 1:
        return Line(values.scale * values.weights[0])

    def blend(b: Tensor, xs: Sequence[Tensor], _: int) -> Tensor:
        deltas = [(x - b).mul_(weight) for x, weight in zip(xs, values.weights, strict=True)]
        return torch.add(b, _sum(deltas), alpha=values.scale)

    return blend


def linear(base: Tensor, experts: Sequence[Tensor], values: Values) -> Blend:
    """Weighted mean in which the base has what the experts leave of 1; equals task arithmetic with lambda 1.

    Source: arXiv 2203.05482 and, for one expert, arXiv 2109.01903.
    """
    return task_arithmetic(base, experts, values)


def slerp(base: Tensor, experts: Sequence[Tensor], values: Values) -> Blend:
    """Go along the arc from base to expert, a tensor being one vector; along a line where they are nearly parallel.

    Source: Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985.
    """
    (expert,), t = experts, values.t
    squares, dots, expert_squares = [], [], []
    for _, b, (x,) in float_blocks(base, [expert]):
        squares.append(_row_sums(b * b))
        dots.append(_row_sums(b * x))
        expert_squares.append(_row_sums(x * x))
    length, expert_length = _length(squares), _length(expert_squares)
    cosine = _exact_sum(dots) / (length * expert_length)
    if abs(cosine) > DOT_THRESHOLD:
        return Line(t)
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    ours, theirs = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    return lambda b, xs, _: (b * ours).add_(xs[0], alpha=theirs)


def ties(base: Tensor, experts: Sequence[Tensor], values: Values) -> Blend:
    """Keep each delta's largest elements, elect a sign by their weighted sum, add those that agree.

    Source: arXiv 2306.01708, algorithm 1. Of equal magnitudes at the threshold the first in memory are kept.
    """
    if values.densities == (1.0,):
        return _whole_delta(values)
    cuts = [_cut(base, expert, density) for expert, density in zip(experts, values.densities, strict=True)]

    def blend(b: Tensor, xs: Sequence[Tensor], start: int) -> Tensor:
        deltas = [(x - b) if cut is None else cut.keep_largest(x - b, start) for x, cut in zip(xs, cuts, strict=True)]
        return torch.add(b, _elect(deltas, values), alpha=values.scale)

    return blend


def dare_ties(base: Tensor, experts: Sequence[Tensor], values: Values) -> Blend:
    """Keep each element of a delta with probability density, rescale to keep its mean, then elect signs as TIES does.

    Source: arXiv 2311.03099, equation 2.
    """
    if values.densities == (1.0,):
        return _whole_delta(values)

    def blend(b: Tensor, xs: Sequence[Tensor], start: int) -> Tensor:
        deltas = []
        for x, density, seed in zip(xs, values.densities, values.seeds, strict=True):
            delta = x - b
            if density < 1:
                delta.mul_(random_mask(delta.numel(), density, seed=seed, start=start))
                delta.div_(density if values.rescale else 1.0)
            deltas.append(delta)
        return torch.add(b, _elect(deltas, values), alpha=values.scale)

    return blend


METHODS: dict[str, Method] = {
    "linear": linear,
    "task_arithmetic": task_arithmetic,
    "slerp": slerp,
    "ties": ties,
    "dare_ties": dare_ties,
}


def float_blocks(base: Tensor, experts: Sequence[Tensor]) -> Iterator[tuple[int, Tensor, list[Tensor]]]:
    """Yield (index of first element, base block, expert blocks): flat, float32, at most BLOCK elements."""
    flat, others = base.reshape(-1), [expert.reshape(-1) for expert in experts]
    for start in range(0, flat.numel(), BLOCK):
        part = slice(start, start + BLOCK)
        yield start, flat[part].float(), [other[part].float() for other in others]


def random_mask(count: int, density: float, *, seed: int, start: int) -> Tensor:
    """Return `count` booleans, each true with probability density; a function of (seed, start) alone."""
    bits = np.random.Philox(key=seed, counter=[0, start, 0, 0]).random_raw((count + 1) // 2).view(np.uint32)[:count]
    return torch.from_numpy(bits < np.uint32(min(density * 2**32, 2**32 - 1)))


@dataclass(frozen=True, slots=True)
class _Cut:
    """Which elements of a delta are among its k largest: above the threshold, or at it and not after `last`."""

    threshold: float
    last: int

    def keep_largest(self, delta: Tensor, start: int) -> Tensor:
        """Zero the other elements of a block."""
        below = float(np.nextafter(np.float32(self.threshold), np.float32(0)))
        equal_kept = max(self.last + 1 - start, 0)
        if equal_kept >= delta.numel():
            return hardshrink(delta, below)  # zeroes |x| <= below
        return torch.cat([hardshrink(delta[:equal_kept], below), hardshrink(delta[equal_kept:], self.threshold)])


def _cut(base: Tensor, expert: Tensor, density: float) -> _Cut | None:
    """Find the k-th largest magnitude of a delta, k = density * size rounded down but at least 1."""
    size = base.numel()
    if density >= 1 or size == 0:
        return None
    kept = max(1, int(density * size))
    magnitudes = torch.empty(size)
    for start, b, (x,) in float_blocks(base, [expert]):
        torch.abs(x - b, out=magnitudes[start : start + b.numel()])
    array = magnitudes.numpy()
    array.partition(size - kept)  # in place: the largest are now at the end
    threshold = array[size - kept]
    if not np.any(array[: size - kept] == threshold):
        return _Cut(float(threshold), size - 1)
    wanted = int(np.count_nonzero(array[size - kept :] == threshold))
    return _Cut(float(threshold), _place_of_nth_equal(base, expert, float(threshold), wanted))


def _place_of_nth_equal(base: Tensor, expert: Tensor, threshold: float, nth: int) -> int:
    for start, b, (x,) in float_blocks(base, [expert]):
        places = ((x - b).abs_() == threshold).nonzero().flatten()
        if places.numel() >= nth:
            return start + int(places[nth - 1])
        nth -= places.numel()
    raise AssertionError("the threshold was found in these tensors")


def _whole_delta(values: Values) -> Line:
    """The blend of a single delta that is not pruned: there is no sign to elect."""
    return Line(values.scale * (1.0 if values.normalize else values.weights[0]))


def _elect(deltas: Sequence[Tensor], values: Values) -> Tensor:
    """Weigh the deltas and sum per element those whose sign is the sign of the sum (a sum of 0 counts as +)."""
    weighted = [delta * weight for delta, weight in zip(deltas, values.weights, strict=True)]
    if len(weighted) == 1 and not values.normalize:
        return weighted[0]
    up = _sum(weighted) >= 0
    down = ~up
    # products with booleans: torch.where is several times slower on CPU
    merged = _sum([d.clamp(min=0) for d in weighted]) * up + _sum([d.clamp(max=0) for d in weighted]) * down
    if not values.normalize:
        return merged
    agreeing = [((d > 0) & up | (d < 0) & down) * w for d, w in zip(weighted, values.weights, strict=True)]
    divisor = _sum(agreeing)
    return merged.div_(divisor.masked_fill_(divisor == 0, 1.0))


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total.add_(tensor)
    return total


def _row_sums(block: Tensor) -> Tensor:
    """Sum rows of 1024: short enough that threads never share a sum, so their number cannot change a bit."""
    return pad(block, (0, -block.numel() % 1024)).view(-1, 1024).sum(1)


def _exact_sum(parts: Sequence[Tensor]) -> float:
    return math.fsum(number for part in parts for number in part.tolist())


def _length(squares: Sequence[Tensor]) -> float:
    length = math.sqrt(_exact_sum(squares))
    return length if length > EPS else 1.0
