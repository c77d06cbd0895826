"""Methods that add the experts' deltas to the base: pruned or dropped first, where they agree in sign or everywhere.

base + lambda * sum of w_e * pruned(x_e - base). What prunes: nothing, magnitude, chance, or both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from optimizer.merging.methods.blocks import BLOCK, Arrays, Blend, Deltas, Line, Mixture, Tensors, Values, Walk
from optimizer.merging.methods.compiled import Array, kernels
from optimizer.merging.methods.pruning import (
    Prune,
    Pruning,
    RankChance,
    drop,
    drop_by_rank,
    keep_largest,
    keep_middle,
    keep_whole,
)


def task_arithmetic(tensors: Tensors, values: Values) -> Blend:
    """Compute base + lambda * sum of w (expert - base). Source: arXiv 2212.04089."""
    return _sum_of_all(tensors, values, keep_whole)


def linear(tensors: Tensors, values: Values) -> Blend:
    """Average with weights of which the base has what the experts leave of 1; equals task arithmetic with lambda 1.

    Where they are to add up to another sum, the base has what is left of that.

    Source: arXiv 2203.05482 and, for one expert, arXiv 2109.01903.
    """
    if (total := values.shared.get("sum", 1.0)) != 1.0:
        return Mixture(total - math.fsum(values.weights), values.weights)
    return _sum_of_all(tensors, values, keep_whole)


def ties(tensors: Tensors, values: Values) -> Blend:
    """Keep each delta's largest elements, elect a sign by their weighted sum, add those that agree.

    Source: arXiv 2306.01708, algorithm 1. Of equal magnitudes at the threshold the first in memory are kept.
    """
    return _sum_of_agreeing(tensors, values, keep_largest)


def dare_linear(tensors: Tensors, values: Values) -> Blend:
    """Keep each element of a delta with probability density, divide by it to keep the mean, and add.

    Source: arXiv 2311.03099, equation 2.
    """
    return _sum_of_all(tensors, values, drop)


def dare_ties(tensors: Tensors, values: Values) -> Blend:
    """Drop as `dare_linear` does, then elect signs as TIES does. Source: arXiv 2311.03099, equation 2."""
    return _sum_of_agreeing(tensors, values, drop)


def della_linear(tensors: Tensors, values: Values) -> Blend:
    """Keep each element with a probability that grows with its rank in its row (MAGPRUNE), rescale, and add.

    Source: arXiv 2406.11617, section 3.1.
    """
    return _sum_of_all(tensors, values, drop_by_rank)


def della(tensors: Tensors, values: Values) -> Blend:
    """Drop as `della_linear` does, then elect signs as TIES does. Source: arXiv 2406.11617, sections 3.1 to 3.3."""
    return _sum_of_agreeing(tensors, values, drop_by_rank)


def breadcrumbs(tensors: Tensors, values: Values) -> Blend:
    """Leave out the largest elements of a delta (outliers, gamma) and the smallest, and add the rest.

    Of equal magnitudes the first in memory count as the larger.

    Source: arXiv 2312.06795, section 3.
    """
    return _sum_of_all(tensors, values, keep_middle)


def breadcrumbs_ties(tensors: Tensors, values: Values) -> Blend:
    """Prune as `breadcrumbs` does, then elect signs as TIES does. Source: arXiv 2312.06795 with 2306.01708."""
    return _sum_of_agreeing(tensors, values, keep_middle)


# Adding up


def _sum_of_all(tensors: Tensors, values: Values, pruning: Pruning) -> Blend:
    total = sum(values.weights)
    divisor = total if values.on("normalize") and abs(total) >= 1e-8 else 1.0
    scale = values.shared.get("lambda", 1.0) / divisor
    factors = [scale * weight for weight in values.weights]
    prunes = _prunes(tensors, values, pruning)
    if all(prune is None for prune in prunes):
        return Line(factors[0]) if len(factors) == 1 else Deltas(factors)
    return PrunedSum(prunes, factors)


def _sum_of_agreeing(tensors: Tensors, values: Values, pruning: Pruning) -> Blend:
    scale, normalize = values.shared["lambda"], values.on("normalize")
    prunes = _prunes(tensors, values, pruning)
    if len(prunes) > 1:
        return AgreeingSum(prunes, values.weights, scale, normalize)
    # there is no sign to elect, and the only weight is its own divisor
    factor = scale * (1.0 if normalize else values.weights[0])
    return Line(factor) if prunes[0] is None else PrunedSum(prunes, [factor])


def _prunes(tensors: Tensors, values: Values, pruning: Pruning) -> list[Prune | None]:
    return [pruning(tensors.only(name), i, values) for i, (name, _) in enumerate(tensors.experts)]


@dataclass(frozen=True, slots=True)
class PrunedSum:
    """The blend base + sum of factor * what is kept of (expert - base)."""

    prunes: Sequence[Prune | None]
    factors: Sequence[float]

    def walk(self) -> Walk:
        prune, factors = _pruning(self.prunes), _scaled(self.factors, self.prunes)

        def step(b: Tensor, xs: Sequence[Tensor], start: int) -> Tensor:
            for delta, factor in zip(prune(b, xs, start), factors, strict=True):
                b.add_(delta, alpha=factor)
            return b

        return step

    def one_pass(self, arrays: Arrays) -> int | None:
        records = _records(self.prunes, _scaled(self.factors, self.prunes), self.factors)
        parts = _parts(arrays, self.prunes)
        return max(
            (
                kernels.pruned_sum(part.base, part.experts, records, masks, start, part.out)
                for start, part, masks in parts
            ),
            default=0,
        )


@dataclass(frozen=True, slots=True)
class AgreeingSum:
    """The blend base + scale * sum of those weighted, pruned deltas whose sign is that of their sum.

    Attributes:
        normalize: divide by the weights of those that agree.
    """

    prunes: Sequence[Prune | None]
    weights: Sequence[float]
    scale: float
    normalize: bool

    def walk(self) -> Walk:
        prune, factors = _pruning(self.prunes), _scaled(self.weights, self.prunes)

        def step(b: Tensor, xs: Sequence[Tensor], start: int) -> Tensor:
            weighted = [delta.mul_(factor) for delta, factor in zip(prune(b, xs, start), factors, strict=True)]
            return b.add_(agreeing_sum(weighted, self.weights if self.normalize else None), alpha=self.scale)

        return step

    def one_pass(self, arrays: Arrays) -> int | None:
        records, scale = _records(self.prunes, _scaled(self.weights, self.prunes), self.weights), np.float32(self.scale)
        parts = _parts(arrays, self.prunes)
        return max(
            (
                kernels.agreeing_sum(part.base, part.experts, records, masks, start, scale, self.normalize, part.out)
                for start, part, masks in parts
            ),
            default=0,
        )


def agreeing_sum(deltas: Sequence[Tensor], weights: Sequence[float] | None) -> Tensor:
    """Sum per element the deltas whose sign is the sign of the sum of all (a sum of 0 counts as +).

    Args:
        deltas: blocks of one shape, weighted.
        weights: divide by the weights of those that agree, where they do not sum to 0.
    """
    agree = agreeing(deltas)
    merged = sum_of([delta * mask for delta, mask in zip(deltas, agree, strict=True)])
    if weights is None:
        return merged
    divisor = sum_of([mask * weight for mask, weight in zip(agree, weights, strict=True)])
    return merged / divisor.masked_fill_(divisor == 0, 1.0)


def agreeing(deltas: Sequence[Tensor]) -> list[Tensor]:
    """Tell where each delta has the sign of the sum of all."""
    up = sum_of(deltas) >= 0
    return [torch.where(up, delta > 0, delta < 0) for delta in deltas]


def sum_of(blocks: Sequence[Tensor]) -> Tensor:
    """Add up in the given order."""
    total = blocks[0].clone()
    for block in blocks[1:]:
        total += block
    return total


def _scaled(factors: Sequence[float], prunes: Sequence[Prune | None]) -> list[float]:
    return [factor * (1.0 if prune is None else prune.scale) for factor, prune in zip(factors, prunes, strict=True)]


def pruned_deltas(prunes: Sequence[Prune | None]) -> Callable[[Tensor, Sequence[Tensor], int], list[Tensor]]:
    """Begin a walk that gives what is kept of each delta, scaled as the method scales it."""
    prune, scales = _pruning(prunes), _scaled([1.0] * len(prunes), prunes)

    def step(b: Tensor, xs: Sequence[Tensor], start: int) -> list[Tensor]:
        return [delta.mul_(scale) for delta, scale in zip(prune(b, xs, start), scales, strict=True)]

    return step


def _pruning(prunes: Sequence[Prune | None]) -> Callable[[Tensor, Sequence[Tensor], int], list[Tensor]]:
    walks = [None if prune is None else prune.walk() for prune in prunes]

    def step(b: Tensor, xs: Sequence[Tensor], start: int) -> list[Tensor]:
        deltas = [x.sub_(b) for x in xs]
        return [delta if walk is None else walk(delta, start) for delta, walk in zip(deltas, walks, strict=True)]

    return step


def _records(prunes: Sequence[Prune | None], factors: Sequence[float], weights: Sequence[float]) -> Array:
    records = np.zeros(len(prunes), kernels.PRUNE)
    for i, (prune, factor, weight) in enumerate(zip(prunes, factors, weights, strict=True)):
        fields = {"kind": kernels.WHOLE} if prune is None else prune.fields()
        for name, value in (fields | {"factor": factor, "weight": weight}).items():
            records[name][i] = value
    return records


def _parts(arrays: Arrays, prunes: Sequence[Prune | None]) -> Iterator[tuple[int, Arrays, Array]]:
    """Yield (first element, arrays, masks): the tensor as one, or whole rows where a delta is pruned by a mask."""
    size = arrays.out.size
    ranked = [(e, prune) for e, prune in enumerate(prunes) if isinstance(prune, RankChance)]
    if not ranked:
        yield 0, arrays, np.empty((len(prunes), 0), np.float32)
        return
    length = max(1, BLOCK // arrays.width) * arrays.width
    masks = np.empty((len(prunes), length), np.float32)
    scratch = np.empty(length, np.int32), np.empty(3 * length, np.int32)
    for start in range(0, size, length):
        part = slice(start, min(start + length, size))
        base, experts = arrays.base[part], tuple(expert[part] for expert in arrays.experts)
        for e, prune in ranked:
            prune.fill_mask(masks[e, : base.size], base, experts[e], arrays.width, start, scratch)
        yield start, Arrays(base, experts, arrays.out[part], arrays.width), masks
