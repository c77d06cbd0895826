"""What a task-vector method keeps of an expert's delta: all of it, or what magnitude, chance or both select.

Source of each: the docstrings of the methods in `task_vectors`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from evals.memory import where_float64_is
from optimizer.merging.methods.blocks import Tensors, Values, row_width
from optimizer.merging.methods.compiled import Array, kernels
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
        """Return what `kernels.PRUNE` says of it."""
        ...


# (base and one expert, its number in the recipe, values) -> a way to prune its delta, None to keep it whole
Pruning = Callable[[Tensors, int, Values], Prune | None]


def keep_whole(pair: Tensors, i: int, values: Values) -> None:
    """Keep all of a delta."""


def keep_largest(pair: Tensors, i: int, values: Values) -> Prune | None:
    """Keep the density * size elements of largest magnitude, at least one."""
    density, size = values.own["density"][i], pair.base.numel()
    if density >= 1 or size == 0:
        return None
    return _rescaled(pair, values, Band(_delta_cut(pair, max(1, int(density * size)))))


def keep_middle(pair: Tensors, i: int, values: Values) -> Prune | None:
    """Keep density * size elements below the gamma * size largest; fewer are outliers where there are not enough."""
    density, gamma, size = values.own["density"][i], values.own["gamma"][i], pair.base.numel()
    if density >= 1 or size == 0:
        return None
    kept = int(density * size)
    outliers = min(int(gamma * size), size - kept)
    lower = _delta_cut(pair, kept + outliers) if kept else NOTHING
    return _rescaled(pair, values, Band(lower, _delta_cut(pair, outliers) if outliers else NOTHING))


def drop(pair: Tensors, i: int, values: Values) -> Prune | None:
    """Keep each element with the chance density."""
    density = values.own["density"][i]
    if density >= 1:
        return None
    return Chance(density, values.seeds[i], 1 / rounded(density) if values.on("rescale") else 1.0)


def drop_by_rank(pair: Tensors, i: int, values: Values) -> Prune | None:
    """Drop by rank (MAGPRUNE): the chance runs along a row's ranks, density - epsilon (smallest) to density + epsilon.

    Epsilon is at most what keeps chances between 0 and 1, so that density 1 drops nothing.
    """
    density, seed = values.own["density"][i], values.seeds[i]
    epsilon = min(values.own["epsilon"][i], density, 1 - density)
    if density >= 1:
        return None
    if epsilon == 0:
        return drop(pair, i, values)
    scale = 1.0
    if values.on("rescale"):
        plain, ranked = pair.get_or_compute("rank weights", lambda: _rank_weights(pair))
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
        mask: Array,
        base: Array,
        expert: Array,
        width: int,
        start: int,
        scratch: tuple[Array, Array],
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
        """Return scale and shift of a number of 65,536ths to the rank asked for, in halves, from -1 on."""
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
        ends = magnitudes.new_tensor([-1, int(np.float32(np.inf).view(np.int32))]).expand(rows, 2)
        ranked = torch.cat([ends[:, :1], magnitudes.sort(dim=1).values, ends[:, 1:]], dim=1)
        return (magnitudes >= ranked.gather(1, ((halves >> 1) - coin + 1).long()) + coin).float()


def _rank_weights(pair: Tensors) -> tuple[float, float]:
    """Sum |x| over a delta, and |x| * rank / (n - 1)."""
    plain = ranked = 0.0
    width = row_width(pair.base)
    places = torch.linspace(0, 1, width, dtype=torch.float64) if width > 1 else torch.full((1,), 0.5).double()
    for delta in _deltas(pair):
        columns = where_float64_is(sorted_rows(delta.abs_())).double().sum(0).cpu()
        plain += float(columns.sum())
        ranked += float(columns @ places)
    return plain, ranked


def sorted_rows(block: Tensor) -> Tensor:
    """Sort each row of a block (rows, n), smallest first."""
    if block.device.type == "cpu":  # numpy's sort has vector instructions
        return torch.from_numpy(np.sort(block.numpy(), axis=1))
    return block.sort(dim=1).values


def _delta_cut(pair: Tensors, kept: int) -> Cut:
    def magnitudes() -> Iterator[Tensor]:
        return (delta.abs_() for delta in _deltas(pair))

    table = pair.get_or_compute("rank table", lambda: RankTable.of(magnitudes(), pair.base.numel()))
    return table.cut(kept, magnitudes)


def _rescaled(pair: Tensors, values: Values, prune: Band) -> Band:
    """Scale what is kept to the L1 norm of the whole delta, where the recipe asks for it."""
    if not values.on("rescale"):
        return prune
    keep = prune.walk()
    whole = kept = 0.0
    for delta in _deltas(pair):
        whole += float(where_float64_is(delta.abs()).sum(dtype=torch.float64))
        kept += float(where_float64_is(keep(delta, 0).abs()).sum(dtype=torch.float64))
    return replace(prune, scale=whole / kept) if whole >= 1e-7 and kept >= 1e-7 else prune


def _deltas(pair: Tensors) -> Iterator[Tensor]:
    return (x.sub_(b) for _, b, (x,) in pair.blocks())
