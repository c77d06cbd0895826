"""Random masks that follow from a seed and an element's place alone: the same on any device, in any order of blocks.

A counter-based generator: word i of a stream is a mix of seed + i * golden ratio, which is SplitMix64 entered at any
place (Steele, Lea, Flood, OOPSLA 2014); each word of 64 bits serves four elements with 16 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 1 << 16  # a chance is a whole number of 65,536ths
GOLDEN, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def random_steps(count: int, *, seed: int, start: int, device: torch.device) -> Tensor:
    """Give `count` independent whole numbers from 0 to 65,535 as float32, for the elements from `start` on.

    Args:
        seed: of the stream, 64 bits.
    """
    lead = start % 4
    return _words(-(-(count + lead) // 4), seed, start // 4, device)[lead : lead + count].float()


def random_mask(count: int, density: float, *, seed: int, start: int, device: torch.device) -> Tensor:
    """Give `count` numbers, each 1.0 with the chance `rounded(density)` and else 0.0."""
    return (random_steps(count, seed=seed, start=start, device=device) < steps_of(density)).float()


def steps_of(density: float) -> int:
    """Return how many of 65,536 steps keep an element: at least one."""
    return max(1, round(density * STEPS))


def rounded(density: float) -> float:
    """Return the chance that a mask uses for a density: the nearest 65,536th, at least one."""
    return steps_of(density) / STEPS


def _words(count: int, seed: int, start: int, device: torch.device) -> Tensor:
    x = torch.arange(start + 1, start + 1 + count, dtype=torch.int64, device=device)
    x = x * _signed(GOLDEN) + _signed(seed)
    for shift, factor in ((30, MIX_1), (27, MIX_2)):
        x = (x ^ _shifted(x, shift)) * _signed(factor)
    x = x ^ _shifted(x, 31)
    return torch.stack([(x >> lane) & 0xFFFF for lane in (0, 16, 32, 48)], dim=1).reshape(-1).int()


def _shifted(x: Tensor, shift: int) -> Tensor:
    return (x >> shift) & ((1 << (64 - shift)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word
