"""Methods that add the experts' deltas to the base: pruned or dropped first, where they agree in sign or everywhere.

base + lambda * sum of w_e * pruned(x_e - base). What prunes: nothing, magnitude, chance, or both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from optimizer.methods.blocks import Blend, Deltas, Line, Tensors, Values, row_width
from optimizer.methods.facts import Cut, RankTable
from optimizer.methods.randomness import STEPS, random_mask, random_steps, rounded

_INFINITY = 0x7F800000  # as the bits of a float32

# (delta block, index of its first row) -> what is kept of it; called in the order of the rows
Prune = Callable[[Tensor, int], Tensor]
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

    def blend(b: Tensor, xs: Sequence[Tensor], start: int) -> Tensor:
        deltas = _pruned(b, xs, prunes, start)
        for delta, factor in zip(deltas, factors, strict=True):
            b.add_(delta, alpha=factor)
        return b

    return blend


def _sum_of_agreeing(tensors: Tensors, values: Values, pruning: Pruning) -> Blend:
    scale, normalize = values.shared["lambda"], values.on("normalize")
    prunes = _prunes(tensors, values, pruning)
    if len(prunes) == 1:  # there is no sign to elect, and the only weight is its own divisor
        factor = scale * (1.0 if normalize else values.weights[0])
        if prunes[0] is None:
            return Line(factor)
        return lambda b, xs, start: b.add_(_pruned(b, xs, prunes, start)[0], alpha=factor)

    def blend(b: Tensor, xs: Sequence[Tensor], start: int) -> Tensor:
        deltas = _pruned(b, xs, prunes, start)
        weighted = [delta.mul_(weight) for delta, weight in zip(deltas, values.weights, strict=True)]
        return b.add_(agreeing_sum(weighted, values.weights if normalize else None), alpha=scale)

    return blend


def agreeing_sum(deltas: Sequence[Tensor], weights: Sequence[float] | None) -> Tensor:
    """Sum per element the deltas whose sign is the sign of the sum of all (a sum of 0 counts as +).

    Args:
        deltas: blocks of one shape, weighted.
        weights: divide by the weights of those that agree, where they do not sum to 0.
    """
    up = _total([delta.clamp(min=0) for delta in deltas])
    down = _total([delta.clamp(max=0) for delta in deltas])
    # of up and -down the larger has the elected sign: two thirds of the time of masks on a CPU
    merged = torch.maximum(up, -down).copysign_(up.add_(down))
    if weights is None:
        return merged
    elected = torch.ones_like(up).copysign_(up)
    agree = [torch.sign(delta).mul_(elected).clamp_(min=0).mul_(w) for delta, w in zip(deltas, weights, strict=True)]
    divisor = _total(agree)
    return merged.div_(divisor.masked_fill_(divisor == 0, 1.0))


def _prunes(tensors: Tensors, values: Values, pruning: Pruning) -> list[Prune | None]:
    return [pruning(tensors.only(name), i, values) for i, (name, _) in enumerate(tensors.experts)]


def _pruned(b: Tensor, xs: Sequence[Tensor], prunes: Sequence[Prune | None], start: int) -> list[Tensor]:
    deltas = [x.sub_(b) for x in xs]
    return [delta if prune is None else prune(delta, start) for delta, prune in zip(deltas, prunes, strict=True)]


def _total(blocks: Sequence[Tensor]) -> Tensor:
    total = blocks[0]
    for block in blocks[1:]:
        total = total.add_(block)
    return total


# Pruning


def _whole(pair: Tensors, i: int, values: Values) -> None:
    return None


def _largest(pair: Tensors, i: int, values: Values) -> Prune | None:
    density, size = values.own["density"][i], pair.base.numel()
    if density >= 1 or size == 0:
        return None
    kept = max(1, int(density * size))
    return _rescaled(pair, values, lambda: _keeping(_delta_cut(pair, kept)))


def _middle(pair: Tensors, i: int, values: Values) -> Prune | None:
    """Keep density * size elements below the gamma * size largest; fewer are outliers where there are not enough."""
    density, gamma, size = values.own["density"][i], values.own["gamma"][i], pair.base.numel()
    if density >= 1 or size == 0:
        return None
    kept = int(density * size)
    outliers = min(int(gamma * size), size - kept)
    upper = _delta_cut(pair, outliers) if outliers else None
    lower = _delta_cut(pair, kept + outliers) if kept else upper

    def start_walk() -> Prune:
        if lower is None:
            return lambda delta, _: delta.zero_()
        in_reach, largest = lower.keeper(), upper.keeper() if upper else torch.zeros_like
        return lambda delta, _: in_reach(delta).sub_(largest(delta))

    return _rescaled(pair, values, start_walk)


def _drop(pair: Tensors, i: int, values: Values) -> Prune | None:
    density, seed = values.own["density"][i], values.seeds[i]
    if density >= 1:
        return None
    divisor = rounded(density) if values.on("rescale") else 1.0

    def prune(delta: Tensor, start: int) -> Tensor:
        place = start * delta.shape[1]
        mask = random_mask(delta.numel(), density, seed=seed, start=place, device=delta.device)
        return delta.mul_(mask.view_as(delta)).div_(divisor)

    return prune


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
    divisor = 1.0
    if values.on("rescale"):
        plain, ranked = pair.once("rank weights", lambda: _rank_weights(pair))
        kept = (density - epsilon) * plain + 2 * epsilon * ranked
        divisor = kept / plain if plain else 1.0

    def prune(delta: Tensor, start: int) -> Tensor:
        mask = rank_mask(delta, density - epsilon, 2 * epsilon, seed=seed, start=start)
        return delta.mul_(mask).div_(divisor)

    return prune


def rank_mask(delta: Tensor, lowest: float, span: float, *, seed: int, start: int) -> Tensor:
    """Keep an element with the chance lowest + span * rank / (n - 1), its rank in its row being from 0 to n - 1.

    Drawn the other way round: a number u from 0 to 1 asks for a rank above (u - lowest) / span * (n - 1), so an
    element is kept if it is at least as large as the element of the next rank. Among equal magnitudes, which have no
    order, a coin decides whether they count as the highest of their ranks or the lowest.

    Returns:
        1.0 and 0.0, of the delta's shape.
    """
    rows, width = delta.shape
    magnitudes = delta.abs()
    steps = random_steps(delta.numel(), seed=seed, start=start * width, device=delta.device).view(rows, width)
    if width == 1:
        return (steps < (lowest + span / 2) * STEPS).float()
    coin, u = steps & 1, (steps >> 1).float().add_(0.5).div_(STEPS / 2)
    needed = u.sub_(lowest).mul_((width - 1) / span).floor_().add_(1).clamp_(0, width).long()
    ascending = pad(_sorted_rows(magnitudes).view(torch.int32), (1, 0), value=-1)  # float32 bits sort as the numbers do
    ascending = pad(ascending, (0, 1), value=_INFINITY)
    least = ascending.gather(1, needed.add_(1).sub_(coin)).add_(coin)  # coin 1: more than the rank below has
    return (magnitudes.view(torch.int32) >= least).float()


def _rank_weights(pair: Tensors) -> tuple[float, float]:
    """Sums over a delta of |x|, and of |x| * rank / (n - 1)."""
    plain = ranked = 0.0
    width = row_width(pair.base)
    places = torch.linspace(0, 1, width, dtype=torch.float64) if width > 1 else torch.full((1,), 0.5).double()
    for delta in _deltas(pair):
        columns = _sorted_rows(delta.abs()).double().sum(0).cpu()
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


def _keeping(cut: Cut) -> Prune:
    keep = cut.keeper()
    return lambda delta, _: keep(delta)


def _rescaled(pair: Tensors, values: Values, start_walk: Callable[[], Prune]) -> Prune:
    """Scale what is kept to the L1 norm of the whole delta, where the recipe asks for it."""
    prune = start_walk()
    if not values.on("rescale"):
        return prune
    trial = start_walk()
    whole = kept = 0.0
    for delta in _deltas(pair):
        whole += float(delta.abs().sum(dtype=torch.float64))
        kept += float(trial(delta, 0).abs().sum(dtype=torch.float64))
    factor = whole / kept if whole >= 1e-7 and kept >= 1e-7 else 1.0
    return lambda delta, start: prune(delta, start).mul_(factor)


def _deltas(pair: Tensors) -> Iterator[Tensor]:
    return (x.sub_(b) for _, b, (x,) in pair.blocks())
