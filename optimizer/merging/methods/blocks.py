"""What a merge method is given and what it gives: whole tensors and numbers in, a blend out.

A method looks at whole tensors (through facts that are computed once) and returns a blend, which knows two ways to the
same numbers: on a CPU one compiled pass over base and experts; elsewhere, and for rarer numbers, a walk over float32
blocks in torch, first row to last, so that scratch memory stays small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from optimizer.merging.methods.compiled import Array, kernels
from optimizer.merging.methods.facts import FactCache

BLOCK = 1 << 16  # elements on a CPU: a handful of float32 blocks stay in a core's cache
DEVICE_BLOCK = 1 << 26  # elements on other devices, where a kernel's start is what costs

T = TypeVar("T")
Factor = float | Tensor

# (base block (rows, n), expert blocks each (rows, n), index of the first row) -> merged block (rows, n), all float32.
# Called in the order of the rows, once for each; the given blocks may be written to.
Walk = Callable[[Tensor, Sequence[Tensor], int], Tensor]


@dataclass(frozen=True, slots=True)
class Arrays:
    """Flat numbers of base, experts and the merge, as `kernels` takes them; rows of `width` elements."""

    base: Array
    experts: tuple[Array, ...]
    out: Array
    width: int


class Blend(Protocol):
    """How a tensor's merged numbers follow from base and experts."""

    def walk(self) -> Walk:
        """Begin a walk over the blocks of a tensor."""
        ...

    def one_pass(self, arrays: Arrays) -> int | None:
        """Write the merge; return the largest magnitude's float32 bits, or None where there is no such way."""
        ...


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
    facts: FactCache

    @property
    def others(self) -> list[Tensor]:
        return [tensor for _, tensor in self.experts]

    def only(self, expert: str) -> Tensors:
        """Return the base and one of the experts."""
        return Tensors(self.name, self.base, [pair for pair in self.experts if pair[0] == expert], self.facts)

    def get_or_compute(self, what: str, compute: Callable[[], T]) -> T:
        """Compute a fact of base and experts, or take it from an earlier candidate."""
        return self.facts.get_or_compute((self.name, *(name for name, _ in self.experts), what), compute)

    def arrays(self, out: Tensor | None = None) -> Arrays | None:
        """Return the numbers as compiled passes take them; None where they are not on a CPU, or numba is missing.

        Args:
            out: where the merge goes; without it the base stands there, for passes that only read.
        """
        if self.base.device.type != "cpu" or kernels is None:
            return None
        experts = self.others
        if len({expert.dtype for expert in experts}) > 1:  # a pass is compiled for one type of experts
            experts = [expert.float() for expert in experts]
        out = self.base if out is None else out
        base, *others = map(kernels.bits_of, (self.base, *experts))
        return Arrays(base, tuple(others), kernels.bits_of(out), row_width(out))

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

    def walk(self) -> Walk:
        return lambda b, xs, _: torch.lerp(b, xs[0], self.weight)

    def one_pass(self, arrays: Arrays) -> int | None:
        return int(kernels.line(arrays.base, arrays.experts[0], np.float32(self.weight), arrays.out))


@dataclass(frozen=True, slots=True)
class Mixture:
    """The blend ours * base + sum of theirs * expert; a factor is a number, or a tensor (rows, 1) or (1, n)."""

    ours: Factor
    theirs: Sequence[Factor]

    def walk(self) -> Walk:
        return self._step

    def one_pass(self, arrays: Arrays) -> int | None:
        theirs = _numbers(self.theirs)
        if theirs is None or not isinstance(self.ours, float):
            return None
        if not self.theirs:
            return int(kernels.scaled(arrays.base, np.float32(self.ours), arrays.out))
        if self.ours == 0 and len(theirs) == 1:
            return int(kernels.scaled(arrays.experts[0], theirs[0], arrays.out))
        return int(kernels.mixture(arrays.base, arrays.experts, np.float32(self.ours), theirs, arrays.out))

    def _step(self, b: Tensor, xs: Sequence[Tensor], start: int) -> Tensor:
        out = b.mul_(_at(self.ours, b, start))
        for x, factor in zip(xs, self.theirs, strict=True):
            _add(out, x, _at(factor, b, start))
        return out


@dataclass(frozen=True, slots=True)
class Deltas:
    """The blend base + sum of factor * (expert - base), exact where an expert has the base's number."""

    factors: Sequence[Factor]

    def walk(self) -> Walk:
        return self._step

    def one_pass(self, arrays: Arrays) -> int | None:
        factors = _numbers(self.factors)
        if factors is None:
            return None
        return int(kernels.deltas_sum(arrays.base, arrays.experts, factors, arrays.out))

    def _step(self, b: Tensor, xs: Sequence[Tensor], start: int) -> Tensor:
        total = xs[0].sub_(b).mul_(_at(self.factors[0], b, start))
        for x, factor in zip(xs[1:], self.factors[1:], strict=True):
            _add(total, x.sub_(b), _at(factor, b, start))
        return b.add_(total)


def blend_in_one_pass(blend: Blend, tensors: Tensors, out: Tensor) -> bool:
    """Write the blend into contiguous memory; return whether that could be done and all of it is finite."""
    arrays = tensors.arrays(out)
    largest = None if arrays is None else blend.one_pass(arrays)
    return largest is not None and largest < kernels.OVERFLOW[out.dtype]


def _numbers(factors: Sequence[Factor]) -> Array | None:
    """Return factors as an array; None where one is not a single number."""
    return np.array(factors, np.float32) if all(isinstance(factor, float) for factor in factors) else None


def _at(factor: Factor, block: Tensor, start: int) -> Factor:
    """Return the factor of a block: a number, the rows' own, or the columns' own."""
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
    """Return the length of a row: the last dimension; a vector is one row."""
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
