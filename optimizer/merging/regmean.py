"""RegMean along a line: how far each linear layer goes to the expert, direction by direction of its inputs.

W = W_base + delta (l G_e) (l G_e + (1 - l) G_b)^-1 minimises, for every linear layer, the squared change of its outputs
on both sides: on the expert's inputs against the expert, weighed l, on the base's against the base, weighed 1 - l.
Source: Jin et al., arXiv 2212.09849, with base and one expert as the models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

OFF_DIAGONAL = 0.9  # of the Gram matrices: the paper's alpha, against inputs that few tokens span
LEAST_DIAGONAL = 1e-6  # of its mean, for inputs that are never there


@dataclass(slots=True)
class Grams:
    """Sums of x x^T over the inputs x of one layer's linear modules; modules with one input share a sum.

    Args:
        sums: (in, in) float32 by module name.
        rows: how many inputs were added to each.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)

    def mean(self, name: str) -> Tensor:
        """Compute the mean of x x^T (in, in), off-diagonals shrunk."""
        gram = self.sums[name] / self.rows[name]
        diagonal = gram.diagonal().clone()
        gram *= OFF_DIAGONAL
        gram.diagonal().copy_(diagonal)
        return gram

    @contextmanager
    def adding(self, modules: Mapping[str, torch.nn.Module]) -> Iterator[None]:
        """Add up what goes through some linear modules meanwhile."""
        last: list[tuple[Tensor, str]] = []

        def add(name: str, given: Tensor) -> None:
            if last and last[0][0] is given:  # as of q, k and v
                shared = last[0][1]
                self.sums[name], self.rows[name] = self.sums[shared], self.rows[shared]
                return
            x = given.reshape(-1, given.shape[-1]).float()
            if name in self.sums:
                self.sums[name].addmm_(x.T, x)
            else:
                self.sums[name] = x.T @ x
            self.rows[name] = self.rows.get(name, 0) + len(x)
            last[:] = [(given, name)]

        hooks = [
            module.register_forward_pre_hook(lambda _, given, name=name: add(name, given[0]))
            for name, module in modules.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def regmean(base: Tensor, expert: Tensor, of_base: Tensor, of_expert: Tensor, share: float) -> Tensor:
    """Compute a linear layer between base and expert.

    Args:
        base, expert: weights (out, in).
        of_base, of_expert: mean x x^T (in, in) of the inputs in either model, float32.
        share: l, 0 is the base and 1 the expert.

    Returns:
        (out, in) in float32.
    """
    if share in (0.0, 1.0):
        return (expert if share else base).float()
    wanted = share * of_expert
    both = wanted + (1 - share) * of_base
    both.diagonal().add_(LEAST_DIAGONAL * both.diagonal().mean())
    delta = expert.float() - base.float()
    factor = torch.linalg.cholesky(both)
    return base.float() + torch.cholesky_solve(wanted @ delta.T, factor).T
