"""What a merge method is given and what it gives: whole tensors and numbers in, a blend of small float32 blocks out.

A method looks at whole tensors (through facts that are computed once) and returns a blend; the blend maps blocks of
base and experts to merged blocks, first row to last, so that scratch memory stays small and a tensor is read once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from optimizer.methods.facts import Facts

BLOCK = 1 << 16  # elements on a CPU: a handful of float32 blocks stay in a core's cache
DEVICE_BLOCK = 1 << 26  # elements on other devices, where a kernel's start is what costs

T = TypeVar("T")
Factor = float | Tensor

# (base block (rows, n), expert blocks each (rows, n), index of the first row) -> merged block (rows, n), all float32.
# Called in the order of the rows, once for each; the given blocks may be written to.
Blend = Callable[[Tensor, Sequence[Tensor], int], Tensor]


@dataclass(frozen=True, slots=True)
class Tensors:
    """The same tensor of the base and of the experts that change it, in their stored dtypes, any shape, one device.

    Attributes:
        name: the tensor's name in the checkpoint.
        experts: (name, tensor) of each, sorted by name.
        facts: what was computed earlier from the same checkpoints.
    """

    name: str
    base: Tensor
    experts: Sequence[tuple[str, Tensor]]
    facts: Facts

    @property
    def others(self) -> list[Tensor]:
        return [tensor for _, tensor in self.experts]

    def only(self, expert: str) -> Tensors:
        """The base and one of the experts."""
        return Tensors(self.name, self.base, [pair for pair in self.experts if pair[0] == expert], self.facts)

    def once(self, what: str, compute: Callable[[], T]) -> T:
        """Compute a fact of base and experts, or take it from an earlier candidate."""
        return self.facts.once((self.name, *(name for name, _ in self.experts), what), compute)

    def blocks(self, width: int | None = None) -> Iterator[tuple[int, Tensor, list[Tensor]]]:
        """Walk over base and experts as `float_blocks` does."""
        return float_blocks(self.base, self.others, width)


@dataclass(frozen=True, slots=True)
class Values:
    """The numbers of a recipe at one tensor.

    Attributes:
        weights: one per expert, not 0.
        own: the other numbers with a value per expert, such as density.
        shared: the numbers with one value for all experts, such as lambda; switches are 0 or 1.
        seeds: one per expert, of 64 bits; the same seed gives the same mask.
    """

    weights: tuple[float, ...]
    own: Mapping[str, tuple[float, ...]]
    shared: Mapping[str, float]
    seeds: tuple[int, ...] = ()

    def on(self, switch: str) -> bool:
        return self.shared.get(switch) == 1.0


@dataclass(frozen=True, slots=True)
class Line:
    """The blend base + weight (expert - base), of the first expert.

    Below one half it starts from the base, above from the expert, so that both ends are exact (torch.lerp).
    """

    weight: float

    def __call__(self, b: Tensor, xs: Sequence[Tensor], _: int) -> Tensor:
        return torch.lerp(b, xs[0], self.weight)


@dataclass(frozen=True, slots=True)
class Mixture:
    """The blend ours * base + sum of theirs * expert; a factor is a number, or a tensor (rows, 1) or (1, n)."""

    ours: Factor
    theirs: Sequence[Factor]

    def __call__(self, b: Tensor, xs: Sequence[Tensor], start: int) -> Tensor:
        out = b.mul_(_at(self.ours, b, start))
        for x, factor in zip(xs, self.theirs, strict=True):
            _add(out, x, _at(factor, b, start))
        return out


@dataclass(frozen=True, slots=True)
class Deltas:
    """The blend base + sum of factor * (expert - base), exact where an expert has the base's number."""

    factors: Sequence[Factor]

    def __call__(self, b: Tensor, xs: Sequence[Tensor], start: int) -> Tensor:
        total = xs[0].sub_(b).mul_(_at(self.factors[0], b, start))
        for x, factor in zip(xs[1:], self.factors[1:], strict=True):
            _add(total, x.sub_(b), _at(factor, b, start))
        return b.add_(total)


def _at(factor: Factor, block: Tensor, start: int) -> Factor:
    """The factor of a block: a number, the rows' own, or the columns' own."""
    if isinstance(factor, float):
        return factor
    rows = factor if factor.shape[0] == 1 else factor[start : start + block.shape[0]]
    return rows.to(block.device)


def _add(total: Tensor, block: Tensor, factor: Factor) -> None:
    if isinstance(factor, float):
        total.add_(block, alpha=factor)
    else:
        total.add_(block.mul_(factor))


def row_width(tensor: Tensor) -> int:
    """Length of a row: the last dimension; a vector is one row."""
    return tensor.shape[-1] if tensor.dim() else 1


def float_blocks(
    base: Tensor, experts: Sequence[Tensor], width: int | None = None
) -> Iterator[tuple[int, Tensor, list[Tensor]]]:
    """Yield (first row, base block, expert blocks): float32 copies of whole rows, about BLOCK elements each.

    The copies lie in the same memory, hot in a core's cache, for every block: use them up before the next.

    Args:
        width: elements in a row; the last dimension by default.
    """
    split = [row_blocks(tensor, row_width(base) if width is None else width) for tensor in (base, *experts)]
    buffers = [torch.empty_like(blocks[0], dtype=torch.float32) for blocks in split if blocks]
    start = 0
    for blocks in zip(*split, strict=True):
        rows = blocks[0].shape[0]
        b, *xs = (buffer[:rows].copy_(block) for buffer, block in zip(buffers, blocks, strict=True))
        yield start, b, xs
        start += rows


def row_blocks(tensor: Tensor, width: int) -> Sequence[Tensor]:
    """Split a contiguous tensor into views of whole rows, about BLOCK elements each."""
    if tensor.numel() == 0:
        return ()
    step = max(1, (BLOCK if tensor.device.type == "cpu" else DEVICE_BLOCK) // width)
    return tensor.reshape(-1, width).split(step)
