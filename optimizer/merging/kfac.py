"""K-FAC along a line: how far each row of a linear layer goes to the expert, direction by direction of its inputs.

The loss's curvature over a row's weights is taken as f G: f of the row's gradients, G the second moment of the layer's
inputs (Kronecker factors, that of the outputs diagonal). Then the row that costs both sides least is
w = w_base + delta (l f_e G_e) (l f_e G_e + f_b G_b)^-1: RegMean where all rows are alike, Fisher where all inputs are.
Source: Tam, Bansal & Raffel, arXiv 2312.04339, with base and one expert as the models, and solved exactly. They take
squared gradients for f; few items tell those badly, and their root, as in Adam, gave better merges (docs/log.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optimizer.merging.fisher import LEAST
from optimizer.merging.regmean import LEAST_DIAGONAL


@dataclass(frozen=True, slots=True, eq=False)
class Directions:
    """Directions of a layer's inputs in which neither side's second moment mixes with another, d of them.

    Args:
        into: (in, d), from weights to what they are in each direction.
        back: (d, in), its inverse.
        of_expert: (d,), the expert's part of both sides' second moments, 0 to 1.
    """

    into: Tensor
    back: Tensor
    of_expert: Tensor


def directions(of_base: Tensor, of_expert: Tensor) -> Directions:
    """Find the directions of a layer's inputs.

    Args:
        of_base, of_expert: mean x x^T (in, in) of the inputs in either model, float32. How large it is does not count:
            the rows' gradients hold that.
    """
    theirs = of_expert / of_expert.diagonal().mean()
    both = theirs + of_base / of_base.diagonal().mean()
    both.diagonal().add_(LEAST_DIAGONAL * both.diagonal().mean())
    root = torch.linalg.cholesky(both)
    half = torch.linalg.solve_triangular(root, theirs, upper=False)
    parts, axes = torch.linalg.eigh(torch.linalg.solve_triangular(root, half.T, upper=False))
    back = torch.linalg.solve_triangular(root, axes.T, upper=False, left=False)
    return Directions(root @ axes, back, parts.clamp_(0.0, 1.0))


def kfac_mean(
    base: Tensor, expert: Tensor, along: Directions, of_base: Tensor, of_expert: Tensor, odds: float
) -> Tensor:
    """Compute a linear layer between base and expert.

    Args:
        base, expert: weights (out, in).
        along: of its inputs.
        of_base, of_expert: the rows' root mean squared gradients (out,) in either model.
        odds: l, above 0: how much the expert's count beside the base's.

    Returns:
        (out, in) in float32.
    """
    theirs = odds * (of_expert + LEAST)[:, None] * along.of_expert
    ours = (of_base + LEAST)[:, None] * (1 - along.of_expert)
    moved = ((expert.float() - base.float()) @ along.into).mul_(theirs / (theirs + ours))
    return torch.addmm(base.float(), moved, along.back)
