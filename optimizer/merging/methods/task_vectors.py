"""Methods that add the experts' deltas to the base: pruned or dropped first, where they agree in sign or everywhere.

base + lambda * sum of w_e * pruned(x_e - base). What prunes: nothing, magnitude, chance, or both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from optimizer.merging.methods import kernels
from optimizer.merging.methods.blocks import BLOCK, Arrays, Blend, Deltas, Line, Tensors, Values, Walk, row_width
from optimizer.merging.methods.facts import Cut, RankTable
from optimizer.merging.methods.randomness import STEPS, random_mask, random_steps, rounded, steps_of

# (delta block, index of its first row) -> what is kept of it; called in the order of the rows
PruneWalk = Callable[[Tensor, int], Tensor]


class Prune(Protocol):
    """What is kept of one expert's delta.

    Attributes:
        scale: of what is kept.
    """

    @property
    def scale(self) -> float: ...

    def walk(self) -> PruneWalk:
        """Begin a walk over the blocks of a delta; the scale is left to whoever adds them up."""
        ...

    def fields(self) -> dict[str, float]:
        """What `kernels.PRUNE` says of it."""
        ...


# (base and one expert, its number in the recipe, values) -> a way to prune its delta, None to keep it whole
Pruning = Callable[[Tensors, int, Values], Prune | None]


def task_arithmetic(tensors: Tensors, values: Values) -> Blend:
    """base + lambda * sum of w (expert - base). Source: arXiv 2212.04089."""
    return _sum_of_all(tensors, values, _whole)


def linear(tensors: Tensors, values: Values) -> Blend:
    """Weighted mean in which the base has what the experts leave of 1; equals task arithmetic with lambda 1.

    Source: arXiv 2203.05482 and, for one expert, arXiv 2109.01903.
    """
    return _sum_of_all(tensors, values, _whole)


def ties(tensors: Tensors, values: Values) -> Blend:
    """Keep each delta's largest elements, elect a sign by their weighted sum, add those that agree.

    Source: arXiv 2306.01708, algorithm 1. Of equal magnitudes at the threshold the first in memory are kept.
    """
    return _sum_of_agreeing(tensors, values, _largest)


def dare_linear(tensors: Tensors, values: Values) -> Blend:
    """Keep each element of a delta with probability density, divide by it to keep the mean, and add.

    Source: arXiv 2311.03099, equation 2.
    """
    return _sum_of_all(tensors, values, _drop)


def dare_ties(tensors: Tensors, values: Values) -> Blend:
    """Drop as `dare_linear` does, then elect signs as TIES does. Source: arXiv 2311.03099, equation 2."""
    return _sum_of_agreeing(tensors, values, _drop)


def della_linear(tensors: Tensors, values: Values) -> Blend:
    """Keep each element with a probability that grows with its rank in its row (MAGPRUNE), rescale, and add.

    Source: arXiv 2406.11617, section 3.1.
    """
    return _sum_of_all(tensors, values, _drop_by_rank)


def della(tensors: Tensors, values: Values) -> Blend:
    """Drop as `della_linear` does, then elect signs as TIES does. Source: arXiv 2406.11617, sections 3.1 to 3.3."""
    return _sum_of_agreeing(tensors, values, _drop_by_rank)


def breadcrumbs(tensors: Tensors, values: Values) -> Blend:
    """Leave out the largest elements of a delta (outliers, gamma) and the smallest, and add the rest.

    Of equal magnitudes the first in memory count as the larger.

    Source: arXiv 2312.06795, section 3.
    """
    return _sum_of_all(tensors, values, _middle)


def breadcrumbs_ties(tensors: Tensors, values: Values) -> Blend:
    """Prune as `breadcrumbs` does, then elect signs as TIES does. Source: arXiv 2312.06795 with 2306.01708."""
    return _sum_of_agreeing(tensors, values, _middle)


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
    """Where each delta has the sign of the sum of all."""
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


def _pruning(prunes: Sequence[Prune | None]) -> Callable[[Tensor, Sequence[Tensor], int], list[Tensor]]:
    walks = [None if prune is None else prune.walk() for prune in prunes]

    def step(b: Tensor, xs: Sequence[Tensor], start: int) -> list[Tensor]:
        deltas = [x.sub_(b) for x in xs]
        return [delta if walk is None else walk(delta, start) for delta, walk in zip(deltas, walks, strict=True)]

    return step


def _records(prunes: Sequence[Prune | None], factors: Sequence[float], weights: Sequence[float]) -> kernels.Array:
    records = np.zeros(len(prunes), kernels.PRUNE)
    for i, (prune, factor, weight) in enumerate(zip(prunes, factors, weights, strict=True)):
        fields = {"kind": kernels.WHOLE} if prune is None else prune.fields()
        for name, value in (fields | {"factor": factor, "weight": weight}).items():
            records[name][i] = value
    return records


def _parts(arrays: Arrays, prunes: Sequence[Prune | None]) -> Iterator[tuple[int, Arrays, kernels.Array]]:
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


# Pruning


def _whole(pair: Tensors, i: int, values: Values) -> None:
    return None


def _largest(pair: Tensors, i: int, values: Values) -> Prune | None:
    density, size = values.own["density"][i], pair.base.numel()
    if density >= 1 or size == 0:
        return None
    return _rescaled(pair, values, Band(_delta_cut(pair, max(1, int(density * size)))))


def _middle(pair: Tensors, i: int, values: Values) -> Prune | None:
    """Keep density * size elements below the gamma * size largest; fewer are outliers where there are not enough."""
    density, gamma, size = values.own["density"][i], values.own["gamma"][i], pair.base.numel()
    if density >= 1 or size == 0:
        return None
    kept = int(density * size)
    outliers = min(int(gamma * size), size - kept)
    lower = _delta_cut(pair, kept + outliers) if kept else NOTHING
    return _rescaled(pair, values, Band(lower, _delta_cut(pair, outliers) if outliers else NOTHING))


def _drop(pair: Tensors, i: int, values: Values) -> Prune | None:
    density = values.own["density"][i]
    if density >= 1:
        return None
    return Chance(density, values.seeds[i], 1 / rounded(density) if values.on("rescale") else 1.0)


def _drop_by_rank(pair: Tensors, i: int, values: Values) -> Prune | None:
    """MAGPRUNE: the chance runs along the ranks of a row from density - epsilon (smallest) to density + epsilon.

    Epsilon is at most what keeps chances between 0 and 1, so that density 1 drops nothing.
    """
    density, seed = values.own["density"][i], values.seeds[i]
    epsilon = min(values.own["epsilon"][i], density, 1 - density)
    if density >= 1:
        return None
    if epsilon == 0:
        return _drop(pair, i, values)
    scale = 1.0
    if values.on("rescale"):
        plain, ranked = pair.once("rank weights", lambda: _rank_weights(pair))
        scale = plain / ((density - epsilon) * plain + 2 * epsilon * ranked) if plain else 1.0
    return RankChance(density - epsilon, 2 * epsilon, seed, scale)


NOTHING = Cut(np.inf, 0, 0)


@dataclass(frozen=True, slots=True)
class Band:
    """Keep what is above a cut, and not above another."""

    lower: Cut
    upper: Cut = NOTHING
    scale: float = 1.0

    def walk(self) -> PruneWalk:
        in_reach, largest = self.lower.keeper(), self.upper.keeper()
        return lambda delta, _: in_reach(delta).sub_(largest(delta))

    def fields(self) -> dict[str, float]:
        return {
            "kind": kernels.CUT,
            "low": self.lower.threshold,
            "low_left": self.lower.equal_kept,
            "high": self.upper.threshold,
            "high_left": self.upper.equal_kept,
        }


@dataclass(frozen=True, slots=True)
class Chance:
    """Keep an element with a chance."""

    density: float
    seed: int
    scale: float

    def walk(self) -> PruneWalk:
        def step(delta: Tensor, start: int) -> Tensor:
            place = start * delta.shape[1]
            mask = random_mask(delta.numel(), self.density, seed=self.seed, start=place, device=delta.device)
            return delta.mul_(mask.view_as(delta))

        return step

    def fields(self) -> dict[str, float]:
        return {"kind": kernels.CHANCE, "seed": self.seed, "below": steps_of(self.density)}


@dataclass(frozen=True, slots=True)
class RankChance:
    """Keep an element with the chance lowest + span * rank / (n - 1), its rank in its row being from 0 to n - 1.

    Drawn the other way round: a number u from 0 to 1 asks for a rank above (u - lowest) / span * (n - 1), so an
    element is kept if it is at least as large as the element of the next rank. Among equal magnitudes, which have no
    order, a coin (the half of a rank in which u falls) decides whether they count as the highest of their ranks or
    the lowest.
    """

    lowest: float
    span: float
    seed: int
    scale: float

    def walk(self) -> PruneWalk:
        return lambda delta, start: delta.mul_(self._mask(delta, start))

    def fields(self) -> dict[str, float]:
        return {"kind": kernels.MASK}

    def fill_mask(
        self,
        mask: kernels.Array,
        base: kernels.Array,
        expert: kernels.Array,
        width: int,
        start: int,
        scratch: tuple[kernels.Array, kernels.Array],
    ) -> None:
        """Set the mask of whole rows to 1.0 where a delta is kept, else to 0.0.

        Args:
            start: place of the first element in its tensor.
            scratch: two of int32, of the mask's size and three times that at least.
        """
        if width == 1:
            steps = random_steps(mask.size, seed=self.seed, start=start, device=torch.device("cpu"))
            mask[:] = (steps < (self.lowest + self.span / 2) * STEPS).numpy()
            return
        rows = mask.size // width
        magnitudes, ranked = scratch[0][: mask.size], scratch[1][: rows * (width + 2)].reshape(rows, width + 2)
        kernels.magnitudes(base, expert, magnitudes)
        magnitudes = magnitudes.reshape(rows, width)
        ranked[:, 0], ranked[:, 1:-1], ranked[:, -1] = -1, magnitudes, kernels.INFINITY
        ranked[:, 1:-1].sort(axis=1)
        scale, shift = self._halves_asked(width)
        kernels.rank_mask(magnitudes, ranked, np.uint64(self.seed), start, np.float32(scale), np.float32(shift), mask)

    def _halves_asked(self, width: int) -> tuple[float, float]:
        """Scale and shift of a number of 65,536ths to the rank asked for, in halves, from -1 on."""
        scale = 2 * (width - 1) / self.span
        return scale / STEPS, scale * (0.5 / STEPS - self.lowest) + 2

    def _mask(self, delta: Tensor, start: int) -> Tensor:
        rows, width = delta.shape
        steps = random_steps(delta.numel(), seed=self.seed, start=start * width, device=delta.device).view(rows, width)
        if width == 1:
            return (steps < (self.lowest + self.span / 2) * STEPS).float()
        scale, shift = self._halves_asked(width)
        halves = steps.mul_(scale).add_(shift).clamp_(0, 2 * width + 1).int()
        coin = halves & 1
        magnitudes = delta.abs().view(torch.int32)  # float32 bits sort as the numbers do
        ends = magnitudes.new_tensor([-1, kernels.INFINITY]).expand(rows, 2)
        ranked = torch.cat([ends[:, :1], magnitudes.sort(dim=1).values, ends[:, 1:]], dim=1)
        return (magnitudes >= ranked.gather(1, ((halves >> 1) - coin + 1).long()) + coin).float()


def _rank_weights(pair: Tensors) -> tuple[float, float]:
    """Sums over a delta of |x|, and of |x| * rank / (n - 1)."""
    plain = ranked = 0.0
    width = row_width(pair.base)
    places = torch.linspace(0, 1, width, dtype=torch.float64) if width > 1 else torch.full((1,), 0.5).double()
    for delta in _deltas(pair):
        columns = _sorted_rows(delta.abs_()).double().sum(0).cpu()
        plain += float(columns.sum())
        ranked += float(columns @ places)
    return plain, ranked


def _sorted_rows(block: Tensor) -> Tensor:
    if block.device.type == "cpu":  # numpy's sort has vector instructions
        return torch.from_numpy(np.sort(block.numpy(), axis=1))
    return block.sort(dim=1).values


def _delta_cut(pair: Tensors, kept: int) -> Cut:
    def magnitudes() -> Iterator[Tensor]:
        return (delta.abs_() for delta in _deltas(pair))

    table = pair.once("rank table", lambda: RankTable.of(magnitudes(), pair.base.numel()))
    return table.cut(kept, magnitudes)


def _rescaled(pair: Tensors, values: Values, prune: Band) -> Band:
    """Scale what is kept to the L1 norm of the whole delta, where the recipe asks for it."""
    if not values.on("rescale"):
        return prune
    keep = prune.walk()
    whole = kept = 0.0
    for delta in _deltas(pair):
        whole += float(delta.abs().sum(dtype=torch.float64))
        kept += float(keep(delta, 0).abs().sum(dtype=torch.float64))
    return replace(prune, scale=whole / kept) if whole >= 1e-7 and kept >= 1e-7 else prune


def _deltas(pair: Tensors) -> Iterator[Tensor]:
    return (x.sub_(b) for _, b, (x,) in pair.blocks())
