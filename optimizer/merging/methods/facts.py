"""What does not depend on a candidate, computed once and kept by whoever merges many: lengths, angles, rank tables.

A fact follows from the checkpoints alone, so a merge gives the same bytes with facts kept or made anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import hardshrink

SPARSE = 64  # a rank table has at most one entry for so many numbers, or
SMALL = 1024  # this many entries

T = TypeVar("T")


class FactCache:
    """Facts by a key that says what they are about. Not shared between threads."""

    def __init__(self) -> None:
        self._facts: dict[Hashable, Any] = {}

    def get_or_compute(self, key: Hashable, compute: Callable[[], T]) -> T:
        """Give the fact with this key, computing it the first time."""
        if key not in self._facts:
            self._facts[key] = compute()
        found: T = self._facts[key]
        return found

    @property
    def bytes(self) -> int:
        """Memory of all that is kept, small numbers aside."""
        facts = [part for fact in self._facts.values() for part in (fact if isinstance(fact, tuple) else (fact,))]
        return sum(getattr(part, "nbytes", 0) for part in facts)


@dataclass(frozen=True, slots=True)
class RankTable:
    """Which value has a given rank among n numbers that are not negative.

    Holds the distinct values where there are few (deltas of bfloat16 checkpoints), else every SPARSE-th of the sorted
    numbers; between two of these a rank is settled by looking at the numbers once more.

    Attributes:
        values: ascending, float32, on the CPU.
        first: how many numbers are smaller than each value.
        size: n.
        zeros: how many of the numbers are 0.
        whole: whether every distinct value is in the table.
    """

    values: np.ndarray[Any, np.dtype[np.float32]]
    first: np.ndarray[Any, np.dtype[np.int64]]
    size: int
    zeros: int
    whole: bool

    @classmethod
    def of(cls, numbers: Iterable[Tensor], size: int) -> RankTable:
        """Build the table, on the device of the numbers.

        Args:
            numbers: float32 blocks of any shape, `size` numbers in all, none negative.
        """
        blocks = iter(numbers)
        head = next(blocks, None)
        if head is not None and head.device.type != "cpu":
            return cls._of_distinct(chain([head], blocks), size)
        numbers = chain([head], blocks) if head is not None else ()
        ascending = np.empty(size, np.float32)
        start = 0
        for block in numbers:
            stop = start + block.numel()
            ascending[start:stop] = block.reshape(-1).cpu().numpy()
            start = stop
        ascending.sort()
        zeros = int(np.searchsorted(ascending, np.float32(0), "right"))  # a float64 zero would have all copied as such
        changes = ascending[1:] != ascending[:-1]
        distinct = min(size, 1 + int(np.count_nonzero(changes)))
        if distinct <= max(size // SPARSE, SMALL):
            first = np.concatenate([np.zeros(min(size, 1), np.int64), np.flatnonzero(changes) + 1])
            return cls(ascending[first], first, size, zeros, True)
        values = np.unique(np.append(ascending[::SPARSE], ascending[-1]))
        return cls(values, np.searchsorted(ascending, values, "left"), size, zeros, len(values) == distinct)

    @classmethod
    def _of_distinct(cls, numbers: Iterable[Tensor], size: int) -> RankTable:
        """Build the same table where sorting is for a device to do, which also counts the distinct numbers."""
        distinct, counts = torch.unique(torch.cat([block.reshape(-1) for block in numbers]), return_counts=True)
        first = counts.cumsum(0) - counts
        zeros = int(counts[0]) if float(distinct[0]) == 0 else 0
        whole = len(distinct) <= max(size // SPARSE, SMALL)
        if not whole:  # every so many-th of the sorted numbers, and the largest
            ranks = torch.arange(0, size, SPARSE, device=first.device)
            chosen = torch.unique(torch.searchsorted(first, ranks, right=True) - 1)
            chosen = torch.unique(torch.cat([chosen, chosen.new_tensor([len(distinct) - 1])]))
            whole, distinct, first = len(chosen) == len(distinct), distinct[chosen], first[chosen]
        return cls(distinct.cpu().numpy(), first.cpu().numpy(), size, zeros, whole)

    @property
    def nbytes(self) -> int:
        return int(self.values.nbytes + self.first.nbytes)

    def cut(self, kept: int, numbers: Callable[[], Iterable[Tensor]]) -> Cut:
        """Find what separates the `kept` largest numbers from the others.

        Args:
            kept: from 1 to n.
            numbers: gives the blocks the table was built from.
        """
        rank = self.size - kept  # of the smallest number kept, from 0
        at = int(np.searchsorted(self.first, rank, "right")) - 1
        low, below = self.values[at], int(self.first[at])
        if self.whole:
            after = int(self.first[at + 1]) if at + 1 < len(self.first) else self.size
            return Cut(float(low), kept - (self.size - after), after - below)
        high = self.values[min(at + 1, len(self.values) - 1)]
        inside = np.sort(np.concatenate([_between(block, low, high) for block in numbers()]))
        threshold = inside[rank - below]
        left, right = np.searchsorted(inside, threshold, "left"), np.searchsorted(inside, threshold, "right")
        return Cut(float(threshold), kept - (self.size - below - int(right)), int(right - left))


@dataclass(frozen=True, slots=True)
class Cut:
    """The k largest numbers: those above the threshold, and of those at it the first `equal_kept` of `equal`."""

    threshold: float
    equal_kept: int
    equal: int

    def keeper(self) -> Callable[[Tensor], Tensor]:
        """Give a function that zeroes the other numbers, whatever their signs, of blocks given in order, each once."""
        strict, loose = self.threshold, float(np.nextafter(np.float32(self.threshold), np.float32(0)))
        left = self.equal_kept

        def keep(block: Tensor) -> Tensor:
            nonlocal left
            if left == 0:
                return hardshrink(block, strict)  # zeroes |x| <= strict
            kept = hardshrink(block, loose)
            if self.equal_kept < self.equal and strict > 0:
                equal = (block.abs() == strict).reshape(-1).nonzero()[:, 0]
                kept.view(-1)[equal[left:]] = 0.0
                left = max(left - len(equal), 0)
            return kept

        return keep


def _between(block: Tensor, low: np.float32, high: np.float32) -> np.ndarray[Any, np.dtype[np.float32]]:
    flat = block.reshape(-1)
    if flat.device.type != "cpu":  # few are between: only these need travel
        return flat[(flat >= float(low)) & (flat <= float(high))].cpu().numpy()
    numbers = flat.numpy()
    return numbers[(numbers >= low) & (numbers <= high)]


def exact_sum(block: Tensor) -> float:
    """Sum a float32 block: short float32 sums first, which no number of threads can change, then without rounding."""
    flat = block.reshape(-1)
    short = torch.nn.functional.pad(flat, (0, -flat.numel() % 1024)).view(-1, 1024).sum(1)
    return math.fsum(short.tolist())
