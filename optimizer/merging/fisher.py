"""Fisher-weighted averaging along a line, row by row: each row goes where the loss asks for it more.

theta = (l F_e theta_e + F_b theta_b) / (l F_e + F_b). F is the mean square of the gradients of a model's own loss on
its own items, smoothed over each row of a tensor, and in the unit of its mean over the model.
Source: Matena & Raffel, arXiv 2111.09832, equation 3, with base and one expert as the models.

A few items say well which rows the losses ask for, and badly how large the gradients of base and expert are beside each
other. So l is found from the share of the way that the whole model is to go.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from evals.memory import where_float64_is

LEAST = 1e-6  # of the mean: rows that no item asks for go as far as one another
WIDEST = 40.0  # of the logarithm of l, where it is looked for
HALVINGS = 60
AT_ONCE = 1024  # rows that are in float32 together: an embedding as a whole is four times its bf16 size


class RowSquares:
    """Sums of squared gradients, a number for each row of each tensor; a vector is one row."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._sizes: dict[str, int] = {}

    def add(self, name: str, gradient: Tensor) -> None:
        """Add one gradient of a tensor."""
        rows = gradient.reshape(-1, gradient.shape[-1])
        squares = torch.cat([part.float().square().sum(dim=1) for part in rows.split(AT_ONCE)])
        self._sums[name] = self._sums[name] + squares if name in self._sums else squares
        self._sizes[name] = gradient.shape[-1]

    def means(self) -> dict[str, Tensor]:
        """Compute the mean square of each row (rows,), in the unit of the mean over all elements."""
        total = sum(float(where_float64_is(rows).sum(dtype=torch.float64)) for rows in self._sums.values())
        count = sum(len(rows) * self._sizes[name] for name, rows in self._sums.items())
        unit = total / count or 1.0
        return {name: rows / self._sizes[name] / unit for name, rows in self._sums.items()}


def row_distances(base: Tensor, expert: Tensor) -> Tensor:
    """Compute the squared distance of each row (rows,) of a tensor; a vector is one row."""
    width = base.shape[-1] if base.dim() else 1
    parts = zip(*(model.reshape(-1, width).split(AT_ONCE) for model in (base, expert)), strict=True)
    return torch.cat([(theirs.float() - ours.float()).square_().sum(dim=1) for ours, theirs in parts])


def odds_for(
    share: float, of_base: Mapping[str, Tensor], of_expert: Mapping[str, Tensor], distances: Mapping[str, Tensor]
) -> float:
    """Find the l by which the rows go so far to the expert on average, each counted by its squared distance.

    Args:
        share: of the way, above 0 and below 1.
        of_base, of_expert: by tensor, the rows' mean squared gradients (rows,).
        distances: by tensor, `row_distances`.
    """
    ours, theirs, apart = (
        torch.cat([rows[name].cpu().double() for name in distances]) for rows in (of_base, of_expert, distances)
    )
    low, high = -WIDEST, WIDEST
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        gone = float((apart * _weights(ours, theirs, math.exp(middle))).sum())
        low, high = (middle, high) if gone < share * float(apart.sum()) else (low, middle)
    return math.exp((low + high) / 2)


def fisher_mean(base: Tensor, expert: Tensor, of_base: Tensor, of_expert: Tensor, odds: float) -> Tensor:
    """Compute a tensor between base and expert.

    Args:
        base, expert: of any shape.
        of_base, of_expert: the rows' mean squared gradients (rows,) in either model.
        odds: l, above 0: how much the expert's count beside the base's.

    Returns:
        The same shape in the base's dtype, rounded once.
    """
    weight = _weights(of_base, of_expert, odds).reshape(-1, 1)  # (rows, 1)
    width = base.shape[-1] if base.dim() else 1
    mean = torch.empty_like(base, memory_format=torch.contiguous_format)
    rows = (
        tensor.reshape(-1, tensor_width).split(AT_ONCE)
        for tensor, tensor_width in ((mean, width), (base, width), (expert, width), (weight, 1))
    )
    for out, ours, theirs, far in zip(*rows, strict=True):
        out.copy_(torch.lerp(ours.float(), theirs.float(), far))
    return mean


def _weights(of_base: Tensor, of_expert: Tensor, odds: float) -> Tensor:
    theirs = odds * (of_expert + LEAST)
    return theirs / (theirs + of_base + LEAST)
