"""Methods that add the experts' deltas to the base: pruned or dropped first, where they agree in sign or everywhere.

base + lambda * sum of w_e * pruned(x_e - base). What prunes: nothing, magnitude, chance, or both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from optimizer.methods.blocks import Blend, Deltas, Line, Tensors, Values, row_width
from optimizer.methods.facts import Cut, RankTable
from optimizer.methods.randomness import STEPS, random_mask, random_steps, rounded

# float32 as bits
INFINITY, SIGN, ONE = 0x7F800000, -(1 << 31), 0x3F800000

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
        deltas: two or more blocks of one shape, weighted.
        weights: divide by the weights of those that agree, where they do not sum to 0.
    """
    total = torch.add(deltas[0], deltas[1])
    for delta in deltas[2:]:
        total.add_(delta)
    up = _total([delta.clamp(min=0) for delta in deltas])
    # of what points up and what points down (their difference from the sum) the larger has the elected sign;
    # signs are moved as bits: masks are several times slower on a CPU
    sign = total.view(torch.int32) & SIGN
    merged = up.sub_(total.clamp_(max=0)).view(torch.int32).bitwise_or_(sign).view(torch.float32)
    if weights is None:
        return merged
    agree = shares_of_agreeing(deltas, sign, weights)
    divisor = _total(agree)
    if min(weights) > 0:
        return merged.div_(divisor.clamp_(min=torch.finfo(torch.float32).tiny))  # where none agree the sum is 0
    return merged.div_(divisor.masked_fill_(divisor == 0, 1.0))


def shares_of_agreeing(deltas: Sequence[Tensor], sign: Tensor, shares: Sequence[float]) -> list[Tensor]:
    """Give each delta's share where its sign is the given one (sign bits as int32, overwritten), else 0."""
    elected = sign.bitwise_or_(ONE).view(torch.float32)
    return [torch.sign(delta).mul_(elected).clamp_(min=0).mul_(s) for delta, s in zip(deltas, shares, strict=True)]


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
        delta.mul_(mask.view_as(delta))
        return delta.div_(divisor) if divisor != 1 else delta

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
        delta.mul_(mask)
        return delta.div_(divisor) if divisor != 1 else delta

    return prune


def rank_mask(delta: Tensor, lowest: float, span: float, *, seed: int, start: int) -> Tensor:
    """Keep an element with the chance lowest + span * rank / (n - 1), its rank in its row being from 0 to n - 1.

    Drawn the other way round: a number u from 0 to 1 asks for a rank above (u - lowest) / span * (n - 1), so an
    element is kept if it is at least as large as the element of the next rank. Among equal magnitudes, which have no
    order, a coin (the half of a rank in which u falls) decides whether they count as the highest of their ranks or
    the lowest.

    Returns:
        1.0 and 0.0, of the delta's shape.
    """
    (rows, width), device = delta.shape, delta.device
    steps = random_steps(delta.numel(), seed=seed, start=start * width, device=device)
    if width == 1:
        return (steps < (lowest + span / 2) * STEPS).float()[:, None]
    scale = 2 * (width - 1) / span
    halves = steps.view(rows, width).mul_(scale / STEPS).add_(scale * (0.5 / STEPS - lowest) + 2)
    halves = halves.clamp_(0, 2 * width + 1).int()  # ranks asked for, in halves, from -1 on
    coin = halves & 1
    ranked = torch.empty(rows, width + 2, dtype=torch.int32, device=device)  # float32 bits sort as the numbers do
    ranked[:, 0], ranked[:, -1] = -1, INFINITY
    magnitudes = delta.abs().view(torch.int32)
    ranked[:, 1:-1] = magnitudes
    _sort_rows_(ranked[:, 1:-1])
    places = (halves >> 1).sub_(coin).add_(torch.arange(1, rows * (width + 2), width + 2, device=device).int()[:, None])
    least = ranked.view(-1).index_select(0, places.view(-1)).view(rows, width).add_(coin)  # coin 1: more than it
    if device.type == "cpu":  # numpy compares several times faster
        return torch.from_numpy((magnitudes.numpy() >= least.numpy()).astype(np.float32))
    return (magnitudes >= least).float()


def _rank_weights(pair: Tensors) -> tuple[float, float]:
    """Sums over a delta of |x|, and of |x| * rank / (n - 1)."""
    plain = ranked = 0.0
    width = row_width(pair.base)
    places = torch.linspace(0, 1, width, dtype=torch.float64) if width > 1 else torch.full((1,), 0.5).double()
    for delta in _deltas(pair):
        columns = _sort_rows_(delta.abs_()).double().sum(0).cpu()
        plain += float(columns.sum())
        ranked += float(columns @ places)
    return plain, ranked


def _sort_rows_(block: Tensor) -> Tensor:
    if block.device.type == "cpu":  # numpy's sort has vector instructions
        block.numpy().sort(axis=1)
        return block
    return block.copy_(block.sort(dim=1).values)


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
