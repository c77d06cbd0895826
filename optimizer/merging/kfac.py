"""K-FAC along a line: how far each row of a linear layer goes to the expert, direction by direction of its inputs.

The loss's curvature over a row's weights is taken as f G: f of the row's gradients, G the second moment of the layer's
inputs (Kronecker factors, that of the outputs diagonal). Then the row that costs both sides least is
w = w_base + delta (l f_e G_e) (l f_e G_e + f_b G_b)^-1: RegMean where all rows are alike, Fisher where all inputs are.
Source: Tam, Bansal & Raffel, arXiv 2312.04339, with base and one expert as the models, and solved exactly. They take
squared gradients for f; few items tell those badly, and their root, as in Adam, gave better merges (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optimizer.merging.fisher import AT_ONCE, LEAST
from optimizer.merging.regmean import LEAST_DIAGONAL


@dataclass(frozen=True, slots=True, eq=False)
class Directions:
    """Directions of a block of a layer's inputs in which neither side's second moment mixes with another, d of them.

    Args:
        into: (in, d), from weights to what they are in each direction.
        back: (d, in), its inverse.
        of_expert: (d,), the expert's part of both sides' second moments, 0 to 1.
    """

    into: Tensor
    back: Tensor
    of_expert: Tensor


def directions(of_base: Sequence[Tensor], of_expert: Sequence[Tensor]) -> list[Directions]:
    """Find the directions of a layer's inputs, block by block.

    Args:
        of_base, of_expert: mean x x^T of the inputs in either model, (width, width) for each block of them, float32.
            How large the whole is does not count: the rows' gradients hold that.
    """
    ours, theirs = (torch.cat([gram.diagonal() for gram in side]).mean() for side in (of_base, of_expert))
    return [_of_block(base / ours, expert / theirs) for base, expert in zip(of_base, of_expert, strict=True)]


def _of_block(ours: Tensor, theirs: Tensor) -> Directions:
    both = ours + theirs
    both.diagonal().add_(2 * LEAST_DIAGONAL)  # the mean diagonal of either side is 1
    root = torch.linalg.cholesky(both)
    half = torch.linalg.solve_triangular(root, theirs, upper=False)
    parts, axes = torch.linalg.eigh(torch.linalg.solve_triangular(root, half.T, upper=False))
    back = torch.linalg.solve_triangular(root, axes.T, upper=False, left=False)
    return Directions(root @ axes, back, parts.clamp_(0.0, 1.0))


def kfac_mean(
    base: Tensor, expert: Tensor, along: Sequence[Directions], of_base: Tensor, of_expert: Tensor, odds: float
) -> Tensor:
    """Compute a linear layer between base and expert.

    Args:
        base, expert: weights (out, in).
        along: of its inputs, block by block.
        of_base, of_expert: the rows' root mean squared gradients (out,) in either model.
        odds: l, above 0: how much the expert's count beside the base's.

    Returns:
        (out, in) in the base's dtype, rounded once.
    """
    mean = torch.empty_like(base, memory_format=torch.contiguous_format)
    odds_of_rows = (odds * (of_expert + LEAST) / (of_base + LEAST))[:, None]
    for out, ours, theirs, far in zip(*(t.split(AT_ONCE) for t in (mean, base, expert, odds_of_rows)), strict=True):
        parts = (theirs.float() - ours.float()).split([len(block.into) for block in along], dim=1)
        moved = [_moved(part, block, far) for part, block in zip(parts, along, strict=True)]
        out.copy_(torch.cat(moved, dim=1).add_(ours))
    return mean


def _moved(delta: Tensor, along: Directions, odds: Tensor) -> Tensor:
    theirs = odds * along.of_expert
    return (delta @ along.into).mul_(theirs.div_(theirs + (1 - along.of_expert))) @ along.back
