"""RegMean along a line: how far each linear layer goes to the expert, direction by direction of its inputs.

W = W_base + delta (l G_e) (l G_e + (1 - l) G_b)^-1 minimises, for every linear layer, the squared change of its outputs
on both sides: on the expert's inputs against the expert, weighed l, on the base's against the base, weighed 1 - l.
Source: Jin et al., arXiv 2212.09849, with base and one expert as the models.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from optimizer.merging.fisher import AT_ONCE

OFF_DIAGONAL = 0.9  # of the Gram matrices: the paper's alpha, against inputs that few tokens span
WIDEST = 2048  # inputs that are taken together where hidden states are narrower
LEAST_DIAGONAL = 1e-6  # of its mean, for inputs that are never there


@dataclass(slots=True)
class Grams:
    """Sums of x x^T over the inputs x of one layer's linear modules; modules with one input share a sum.

    Wide inputs, as those of a large MLP's second half, are taken in blocks, as Shampoo takes wide layers: inputs of two
    blocks count as uncorrelated. Merges were about as good, and eigenvectors cost the cube of the width (docs/log.md).

    Args:
        hidden: width of the model's hidden states; a block has at most so many inputs, or `WIDEST` if that is more.
        sums: float32 by module name, (width, width) for each block.
        rows: how many inputs were added to each.
    """

    hidden: int
    sums: dict[str, list[Tensor]] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)

    def mean(self, name: str) -> list[Tensor]:
        """Compute the mean of x x^T, (width, width) for each block, off-diagonals shrunk."""
        means = []
        for total in self.sums[name]:
            gram = total * (OFF_DIAGONAL / self.rows[name])
            gram.diagonal().div_(OFF_DIAGONAL)
            means.append(gram)
        return means

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
            blocks = x.tensor_split(math.ceil(x.shape[-1] / max(self.hidden, WIDEST)), dim=-1)
            if name not in self.sums:
                self.sums[name] = [x.new_zeros(block.shape[-1], block.shape[-1]) for block in blocks]
            for total, block in zip(self.sums[name], blocks, strict=True):
                total.addmm_(block.T, block)
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


def regmean(
    base: Tensor, expert: Tensor, of_base: Sequence[Tensor], of_expert: Sequence[Tensor], share: float
) -> Tensor:
    """Compute a linear layer between base and expert.

    Args:
        base, expert: weights (out, in).
        of_base, of_expert: mean x x^T of the inputs in either model, (width, width) for each block of them, float32.
        share: l, 0 is the base and 1 the expert.

    Returns:
        (out, in) in the base's dtype, rounded once.
    """
    if share in (0.0, 1.0):
        return expert.to(base.dtype) if share else base
    mean = torch.empty_like(base, memory_format=torch.contiguous_format)
    near_mean, far_mean = (torch.cat([gram.diagonal() for gram in side]).mean() for side in (of_base, of_expert))
    least = LEAST_DIAGONAL * (share * far_mean + (1 - share) * near_mean)
    columns = (tensor.split([len(gram) for gram in of_base], dim=1) for tensor in (mean, base, expert))
    for out, ours, theirs, gram_of_base, gram_of_expert in zip(*columns, of_base, of_expert, strict=True):
        wanted = share * gram_of_expert
        both = wanted + (1 - share) * gram_of_base
        both.diagonal().add_(least)
        factor = torch.linalg.cholesky(both)
        for rows, near, far in zip(*(tensor.split(AT_ONCE) for tensor in (out, ours, theirs)), strict=True):
            delta = far.float() - near.float()
            rows.copy_(torch.cholesky_solve(wanted @ delta.T, factor).T.add_(near))
    return mean
