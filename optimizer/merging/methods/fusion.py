"""Element-wise selection among experts (SCE, RAM, NearSwap, Arcee Fusion), and passthrough."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from optimizer.merging.methods.blocks import Arrays, Blend, Line, Mixture, Tensors, Values, Walk
from optimizer.merging.methods.compiled import kernels
from optimizer.merging.methods.facts import Cut, RankTable, exact_sum
from optimizer.merging.methods.pruning import NOTHING, sorted_rows
from optimizer.merging.methods.task_vectors import agreeing, sum_of


def sce(tensors: Tensors, values: Values) -> Blend:
    """Select elements where the experts vary, weigh each expert by its energy there, erase minority signs, and add.

    Selection and energies are of the experts' own deltas; the weights scale what is elected and added. Of equal
    variances at the threshold the first in memory are selected.

    Source: arXiv 2408.07990 (FuseChat), section 3.3: select, calculate, erase.
    """
    topk = values.shared["select_topk"]
    if len(tensors.experts) == 1:  # nothing varies, and it has all the energy
        return Line(values.weights[0] if topk >= 1 else 0.0)
    cut = _selection(tensors, topk)
    if cut is not None and cut.equal == 0:
        return Line(0.0)
    energies = _energies(tensors, cut) if cut else tensors.get_or_compute("energies", lambda: _energies(tensors, None))
    total = sum(energies)
    shares = [energy / total for energy in energies] if total >= 1e-6 else [1 / len(energies)] * len(energies)
    return SelectedSum(cut, values.weights, shares)


def ram(tensors: Tensors, values: Values) -> Blend:
    """Add what only one expert changed, and the mean of what several changed, by more than epsilon.

    Source: arXiv 2601.13572.
    """
    return _shared_and_unique(values, [1.0] * len(tensors.experts))


def ramplus_tl(tensors: Tensors, values: Values) -> Blend:
    """Blend as RAM does, what only one expert changed amplified by 1 + r * min(alpha, shared / unique), both counted.

    Source: arXiv 2601.13572, the tensor-local variant.
    """
    epsilon, r, alpha = (values.shared[name] for name in ("epsilon", "r", "alpha"))
    counts = tensors.get_or_compute(f"overlap {epsilon}", lambda: _overlaps(tensors, epsilon))
    ratios = [shared / max(unique, epsilon) if shared else 0.0 for shared, unique in counts]
    return _shared_and_unique(values, [1 + r * min(max(ratio, 0.0), alpha) for ratio in ratios])


def nearswap(tensors: Tensors, values: Values) -> Blend:
    """Go towards the expert by min(1, t / |expert - base|): by t at most, and all the way where that is nearer.

    Source: alchemonaut, QuartetAnemoi-70B-t0.0001, on the Hugging Face hub.
    """
    return Step(values.shared["t"], values.weights[0])


def arcee_fusion(tensors: Tensors, values: Values) -> Blend:
    """Take the expert's numbers where |delta| * KL(its row, the base's row) is at least median + 1.5 quartile ranges.

    Rows go through softmax for the divergence. The quartiles are those of all importances (mergekit samples a million
    of larger tensors); the weight scales the delta taken.

    Source: Arcee Fusion as mergekit has it.
    """
    divergences, threshold = tensors.get_or_compute("importance", lambda: _importance(tensors))
    return Important(divergences, threshold, values.weights[0])


def passthrough(tensors: Tensors, values: Values) -> Blend:
    """Give the only model's tensor, times scale: the expert's, or the base's where there is no expert."""
    scale = values.shared["scale"]
    if tensors.experts:
        return Line(1.0) if scale == 1.0 else Mixture(0.0, [scale])
    return Line(0.0) if scale == 1.0 else Mixture(scale, [])


@dataclass(frozen=True, slots=True)
class Step:
    """The blend base + weight * the delta cut to the length t, or, below a length of 1e-6, shrunk in proportion."""

    t: float
    weight: float

    def walk(self) -> Walk:
        if self.t >= 1e-6:
            return lambda b, xs, _: b.add_(xs[0].sub_(b).clamp_(-self.t, self.t), alpha=self.weight)

        def step(b: Tensor, xs: Sequence[Tensor], _: int) -> Tensor:
            delta = xs[0].sub_(b)
            return b.addcdiv_(delta, delta.abs().clamp_(min=1e-6), value=self.weight * self.t)

        return step

    def one_pass(self, arrays: Arrays) -> int | None:
        if self.t < 1e-6:
            return None
        t, weight = np.float32(self.t), np.float32(self.weight)
        return int(kernels.step(arrays.base, arrays.experts[0], t, weight, arrays.out))


@dataclass(frozen=True, slots=True)
class Important:
    """The blend base + weight * those deltas that are, times their row's divergence, at least a threshold long."""

    divergences: Tensor
    threshold: float
    weight: float

    def walk(self) -> Walk:
        def step(b: Tensor, xs: Sequence[Tensor], start: int) -> Tensor:
            delta = xs[0].sub_(b)
            rows = self.divergences[start : start + b.shape[0], None].to(b.device)
            return b.add_(delta.mul_(delta.abs().mul_(rows) >= self.threshold), alpha=self.weight)

        return step

    def one_pass(self, arrays: Arrays) -> int | None:
        threshold, weight, rows = np.float32(self.threshold), np.float32(self.weight), self.divergences.cpu().numpy()
        return int(kernels.important(arrays.base, arrays.experts[0], rows, threshold, weight, arrays.out))


# SCE


@dataclass(frozen=True, slots=True)
class SelectedSum:
    """The blend base + the mean, by shares, of those weighted deltas whose sign is that of their sum, where selected.

    Attributes:
        cut: of the variances that are selected; None for all.
        shares: the experts' parts in the mean.
    """

    cut: Cut | None
    weights: Sequence[float]
    shares: Sequence[float]

    def walk(self) -> Walk:
        select = _selecting(self.cut)

        def step(b: Tensor, xs: Sequence[Tensor], _: int) -> Tensor:
            deltas = [x.sub_(b) for x in xs]
            mask = select(deltas)
            for delta, weight in zip(deltas, self.weights, strict=True):
                delta.mul_(weight).mul_(mask)
            parts = [mask * share for mask, share in zip(agreeing(deltas), self.shares, strict=True)]
            merged = sum_of([delta * part for delta, part in zip(deltas, parts, strict=True)])
            return b.add_(merged / sum_of(parts).clamp_(min=1e-6))

        return step

    def one_pass(self, arrays: Arrays) -> int | None:
        weights, shares = np.array(self.weights, np.float32), np.array(self.shares, np.float32)
        cut = _cut_fields(self.cut)
        return int(kernels.selected_sum(arrays.base, arrays.experts, *cut, weights, shares, arrays.out))


def _selection(tensors: Tensors, topk: float) -> Cut | None:
    """Find the cut of variances for a share of those that are not 0; None for all, a cut of nothing where none is."""
    if topk >= 1:
        return None
    table = tensors.get_or_compute("variance table", lambda: RankTable.of(_variances(tensors), tensors.base.numel()))
    kept = int(np.float32(table.size - table.zeros) * np.float32(topk))
    return table.cut(kept, lambda: _variances(tensors)) if kept else NOTHING


def _selecting(cut: Cut | None) -> Callable[[Sequence[Tensor]], Tensor]:
    """Begin a walk from delta blocks to 1.0 where they are selected, else 0.0."""
    if cut is None:
        return lambda deltas: torch.ones_like(deltas[0])
    keep = cut.keeper()
    return lambda deltas: torch.sign(keep(_variance(deltas)))


def _cut_fields(cut: Cut | None) -> tuple[np.float32, int]:
    return (np.float32(-1), 0) if cut is None else (np.float32(cut.threshold), cut.equal_kept)


def _variances(tensors: Tensors) -> Iterator[Tensor]:
    return (_variance([x.sub_(b) for x in xs]) for _, b, xs in tensors.blocks())


def _variance(deltas: Sequence[Tensor]) -> Tensor:
    """Compute the mean square distance to the mean: as `kernels` has it, bit for bit, since thresholds are compared."""
    if len(deltas) == 2:
        return (deltas[0] - deltas[1]).mul_(0.5).square_()
    mean = sum_of(deltas).div_(len(deltas))
    return sum_of([(delta - mean).square_() for delta in deltas]).div_(len(deltas))


def _energies(tensors: Tensors, cut: Cut | None) -> list[float]:
    """Compute the experts' mean squares where they are selected."""
    size = max(1, tensors.base.numel())
    if (arrays := tensors.arrays()) is not None:
        return (kernels.energies(arrays.base, arrays.experts, *_cut_fields(cut)) / size).tolist()
    select, sums = _selecting(cut), [0.0] * len(tensors.experts)
    for _, b, xs in tensors.blocks():
        deltas = [x.sub_(b) for x in xs]
        mask = select(deltas)
        for i, delta in enumerate(deltas):
            sums[i] += exact_sum(delta.mul_(mask).square_())
    return [total / size for total in sums]


# RAM's counts


def _shared_and_unique(values: Values, amplified: Sequence[float]) -> Blend:
    return SharedAndUnique(values.shared["epsilon"], values.weights, amplified)


@dataclass(frozen=True, slots=True)
class SharedAndUnique:
    """The blend base + what one expert alone changed, amplified, and the mean of what several changed."""

    epsilon: float
    weights: Sequence[float]
    amplified: Sequence[float]

    def walk(self) -> Walk:
        def step(b: Tensor, xs: Sequence[Tensor], _: int) -> Tensor:
            changes = [hardshrink(x.sub_(b), self.epsilon) for x in xs]  # zeroes |x| <= epsilon
            count = _count(changes)
            for change, weight, factor in zip(changes, self.weights, self.amplified, strict=True):
                b.addcmul_(change, torch.where(count <= 1, factor, 1 / count), value=weight)
            return b

        return step

    def one_pass(self, arrays: Arrays) -> int | None:
        epsilon = np.float32(self.epsilon)
        weights, amplified = np.array(self.weights, np.float32), np.array(self.amplified, np.float32)
        return int(kernels.shared_and_unique(arrays.base, arrays.experts, epsilon, weights, amplified, arrays.out))


def _count(changes: Sequence[Tensor]) -> Tensor:
    """Count how many experts changed each element."""
    count = torch.zeros_like(changes[0])
    for change in changes:
        count.add_(torch.sign(change).abs_())
    return count


def _overlaps(tensors: Tensors, epsilon: float) -> list[tuple[int, int]]:
    """Count for each expert how many of the elements it changed others changed too, and how many no other did."""
    totals = np.zeros((len(tensors.experts), 2), np.int64)
    for _, b, xs in tensors.blocks():
        changes = [hardshrink(x.sub_(b), epsilon) for x in xs]
        count = _count(changes)
        for i, change in enumerate(changes):
            own = count[change != 0]
            totals[i] += int((own > 1).sum()), int((own == 1).sum())
    return [(int(shared), int(unique)) for shared, unique in totals]


# Arcee Fusion's importance


def _importance(tensors: Tensors) -> tuple[Tensor, float]:
    """Return each row's divergence and the threshold of importance."""
    divergences, scores = [], []
    for _, b, (x,) in tensors.blocks():
        p, q = torch.softmax(x, dim=1).add_(1e-8), torch.softmax(b, dim=1).add_(1e-8)
        divergence = (p * torch.log(p / q)).sum(1)
        divergences.append(divergence)
        scores.append(((x - b).abs_() * divergence[:, None]).reshape(-1))
    if not scores:
        return torch.zeros(0), 0.0
    ranked = sorted_rows(torch.cat(scores)[None])[0]
    low, median, high = (float(ranked[int(np.float32(q) * np.float32(len(ranked) - 1))]) for q in (0.25, 0.5, 0.75))
    return torch.cat(divergences), float(np.float32(median) + np.float32(1.5) * np.float32(high - low))
