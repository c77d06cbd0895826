"""Fisher-weighted averaging along a line, row by row: each row goes where the loss asks for it more.

theta = (l F_e theta_e + (1 - l) F_b theta_b) / (l F_e + (1 - l) F_b). F is the mean square of the gradients of a
model's own loss on its own items, smoothed over each row of a tensor, and in the unit of its mean over the model.
Source: Matena & Raffel, arXiv 2111.09832, equation 3, with base and one expert as the models.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evals.memory import where_float64_is

LEAST = 1e-6  # of the mean: rows that no item asks for go the same way as the line


class RowSquares:
    """Sums of squared gradients, a number for each row of each tensor; a vector is one row."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._sizes: dict[str, int] = {}

    def add(self, name: str, gradient: Tensor) -> None:
        """Add one gradient of a tensor."""
        rows = gradient.reshape(-1, gradient.shape[-1])
        squares = rows.float().square_().sum(dim=1)
        self._sums[name] = self._sums[name] + squares if name in self._sums else squares
        self._sizes[name] = gradient.shape[-1]

    def means(self) -> dict[str, Tensor]:
        """Compute the mean square of each row (rows,), in the unit of the mean over all elements."""
        total = sum(float(where_float64_is(rows).sum(dtype=torch.float64)) for rows in self._sums.values())
        count = sum(len(rows) * self._sizes[name] for name, rows in self._sums.items())
        unit = total / count or 1.0
        return {name: rows / self._sizes[name] / unit for name, rows in self._sums.items()}


def fisher_mean(base: Tensor, expert: Tensor, of_base: Tensor, of_expert: Tensor, share: float) -> Tensor:
    """Compute a tensor between base and expert.

    Args:
        base, expert: of any shape.
        of_base, of_expert: the rows' mean squared gradients (rows,) in either model.
        share: l, 0 is the base and 1 the expert.

    Returns:
        The same shape in float32.
    """
    if share in (0.0, 1.0):
        return (expert if share else base).float()
    theirs, ours = share * (of_expert + LEAST), (1 - share) * (of_base + LEAST)
    weight = (theirs / (theirs + ours)).reshape(-1, 1)  # (rows, 1)
    width = base.shape[-1] if base.dim() else 1
    return torch.lerp(base.float().reshape(-1, width), expert.float().reshape(-1, width), weight).reshape(base.shape)
