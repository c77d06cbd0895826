"""Methods that choose element by element which experts speak (SCE, RAM, NearSwap, Arcee Fusion), and passthrough."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from optimizer.methods.blocks import Blend, Line, Mixture, Tensors, Values
from optimizer.methods.facts import Cut, RankTable, exact_sum
from optimizer.methods.task_vectors import SIGN, shares_of_agreeing


def sce(tensors: Tensors, values: Values) -> Blend:
    """Select elements where the experts vary, weigh each expert by its energy there, erase minority signs, and add.

    Selection and energies are of the experts' own deltas; the weights scale what is elected and added.

    Source: arXiv 2408.07990 (FuseChat), section 3.3: select, calculate, erase.
    """
    topk = values.shared["select_topk"]
    if len(tensors.experts) == 1:  # nothing varies, and it has all the energy
        return Line(values.weights[0] if topk >= 1 else 0.0)
    keep, energies = _selection(tensors, topk)
    if keep is None:
        return Line(0.0)
    total = sum(energies)
    shares = [energy / total for energy in energies] if total >= 1e-6 else [1 / len(energies)] * len(energies)
    select = keep()

    def blend(b: Tensor, xs: Sequence[Tensor], _: int) -> Tensor:
        deltas = [x.sub_(b) for x in xs]
        mask = select(deltas)
        total = torch.zeros_like(b)
        for delta, weight in zip(deltas, values.weights, strict=True):
            total.add_(delta.mul_(weight) if mask is None else delta.mul_(weight).mul_(mask))
        agree = shares_of_agreeing(deltas, total.view(torch.int32) & SIGN, shares)
        merged, divisor = total.zero_(), torch.zeros_like(b)
        for delta, part in zip(deltas, agree, strict=True):
            merged.addcmul_(delta, part)
            divisor.add_(part)
        return b.add_(merged.div_(divisor.clamp_(min=1e-6)))

    return blend


def ram(tensors: Tensors, values: Values) -> Blend:
    """Add what only one expert changed, and the mean of what several changed, by more than epsilon.

    Source: arXiv 2601.13572.
    """
    return _shared_and_unique(values, [1.0] * len(tensors.experts))


def ramplus_tl(tensors: Tensors, values: Values) -> Blend:
    """RAM in which what only one expert changed is amplified by 1 + r * min(alpha, shared / unique), both counted.

    Source: arXiv 2601.13572, the tensor-local variant.
    """
    epsilon, r, alpha = (values.shared[name] for name in ("epsilon", "r", "alpha"))
    counts = tensors.once(f"overlap {epsilon}", lambda: _overlaps(tensors, epsilon))
    ratios = [shared / max(unique, epsilon) if shared else 0.0 for shared, unique in counts]
    return _shared_and_unique(values, [1 + r * min(max(ratio, 0.0), alpha) for ratio in ratios])


def nearswap(tensors: Tensors, values: Values) -> Blend:
    """Go towards the expert by min(1, t / |expert - base|): by t at most, and all the way where that is nearer.

    Source: alchemonaut, QuartetAnemoi-70B-t0.0001, on the Hugging Face hub.
    """
    t, (weight,) = values.shared["t"], values.weights
    if t >= 1e-6:  # the step is the delta, no longer than t
        return lambda b, xs, _: b.add_(xs[0].sub_(b).clamp_(-t, t), alpha=weight)

    def blend(b: Tensor, xs: Sequence[Tensor], _: int) -> Tensor:
        delta = xs[0].sub_(b)
        return b.addcdiv_(delta, delta.abs().clamp_(min=1e-6), value=weight * t)

    return blend


def arcee_fusion(tensors: Tensors, values: Values) -> Blend:
    """Take the expert's numbers where |delta| * KL(its row, the base's row) is at least median + 1.5 quartile ranges.

    Rows go through softmax for the divergence. The quartiles are those of all importances (mergekit samples a million
    of larger tensors); the weight scales the delta taken.

    Source: Arcee Fusion as mergekit has it.
    """
    (weight,) = values.weights
    divergences, threshold = tensors.once("importance", lambda: _importance(tensors))
    below = float(np.nextafter(np.float32(threshold), np.float32(-1)))

    def blend(b: Tensor, xs: Sequence[Tensor], start: int) -> Tensor:
        delta = xs[0].sub_(b)
        rows = divergences[start : start + b.shape[0], None].to(b.device)
        importance = delta.abs().mul_(rows)
        if threshold <= 0:
            return b.add_(delta.mul_(importance >= threshold), alpha=weight)
        taken = hardshrink(importance.clamp_(min=0), below).sign_()  # products with masks are several times slower
        return b.add_(delta.mul_(taken), alpha=weight)

    return blend


def passthrough(tensors: Tensors, values: Values) -> Blend:
    """Give the only model's tensor, times scale: the expert's, or the base's where there is no expert."""
    scale = values.shared["scale"]
    if tensors.experts:
        return Line(1.0) if scale == 1.0 else Mixture(0.0, [scale])
    return Line(0.0) if scale == 1.0 else Mixture(scale, [])


# SCE's selection

Select = Callable[[Sequence[Tensor]], Tensor | None]  # delta blocks in order -> mask of 1.0 and 0.0, None for all


def _selection(tensors: Tensors, topk: float) -> tuple[Callable[[], Select] | None, list[float]]:
    """Return what starts a walk that selects elements, None where none is, and the experts' mean squares there."""
    size = max(1, tensors.base.numel())
    if topk >= 1:
        energies = tensors.once("energies", lambda: _energies(tensors, lambda deltas: None, size))
        return lambda: lambda deltas: None, energies
    table = tensors.once("variance table", lambda: RankTable.of(_variances(tensors), tensors.base.numel()))
    kept = int(np.float32(table.size - table.zeros) * np.float32(topk))
    if kept == 0:
        return None, []
    cut = table.cut(kept, lambda: _variances(tensors))
    return lambda: _select_by(cut), _energies(tensors, _select_by(cut), size)


def _select_by(cut: Cut) -> Select:
    keep = cut.keeper()
    return lambda deltas: torch.sign(keep(_variance(deltas)))


def _variances(tensors: Tensors) -> Iterator[Tensor]:
    return (_variance([x.sub_(b) for x in xs]) for _, b, xs in tensors.blocks())


def _variance(deltas: Sequence[Tensor]) -> Tensor:
    if len(deltas) == 2:
        return (deltas[0] - deltas[1]).mul_(0.5).square_()
    return torch.var(torch.stack(list(deltas)), dim=0, unbiased=False)


def _energies(tensors: Tensors, select: Select, size: int) -> list[float]:
    sums = [0.0] * len(tensors.experts)
    for _, b, xs in tensors.blocks():
        deltas = [x.sub_(b) for x in xs]
        mask = select(deltas)
        for i, delta in enumerate(deltas):
            sums[i] += exact_sum((delta if mask is None else delta.mul_(mask)).square_())
    return [total / size for total in sums]


# RAM's counts


def _shared_and_unique(values: Values, amplified: Sequence[float]) -> Blend:
    epsilon = values.shared["epsilon"]

    def blend(b: Tensor, xs: Sequence[Tensor], _: int) -> Tensor:
        changes = [hardshrink(x.sub_(b), epsilon) for x in xs]  # zeroes |x| <= epsilon
        if len(changes) == 1:
            return b.add_(changes[0], alpha=values.weights[0] * amplified[0])
        count = _count(changes)
        share, alone = count.clamp(min=1).reciprocal_(), (2 - count).clamp_(min=0)
        for change, weight, factor in zip(changes, values.weights, amplified, strict=True):
            part = share if factor == 1.0 else torch.add(share, alone, alpha=factor - 1)
            b.addcmul_(change, part, value=weight)
        return b

    return blend


def _count(changes: Sequence[Tensor]) -> Tensor:
    """How many experts changed each element."""
    count = torch.zeros_like(changes[0])
    for change in changes:
        count.add_(torch.sign(change).abs_())
    return count


def _overlaps(tensors: Tensors, epsilon: float) -> list[tuple[int, int]]:
    """For each expert, how many of the elements it changed others changed too, and how many no other did."""
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
    ranked = np.sort(torch.cat(scores).cpu().numpy())
    low, median, high = (float(ranked[int(np.float32(q) * np.float32(len(ranked) - 1))]) for q in (0.25, 0.5, 0.75))
    return torch.cat(divergences), float(np.float32(median) + np.float32(1.5) * np.float32(high - low))
