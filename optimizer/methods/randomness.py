"""Random masks that follow from a seed and an element's place alone: the same on any device, in any order of blocks.

A counter-based generator: word i of a stream is a mix of seed + i * golden ratio, which is SplitMix64 entered at any
place (Steele, Lea, Flood, OOPSLA 2014); each word of 64 bits serves four elements with 16 bits.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

STEPS = 1 << 16  # a chance is a whole number of 65,536ths
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def random_steps(count: int, *, seed: int, start: int, device: torch.device) -> Tensor:
    """Give `count` independent whole numbers from 0 to 65,535 as int32, for the elements from `start` on.

    Args:
        seed: of the stream, 64 bits.
    """
    lead = start % 4
    words = -(-(count + lead) // 4)
    bits = (
        _words_numpy(words, seed, start // 4) if device.type == "cpu" else _words_torch(words, seed, start // 4, device)
    )
    return bits[lead : lead + count]


def random_mask(count: int, density: float, *, seed: int, start: int, device: torch.device) -> Tensor:
    """Give `count` numbers, each 1.0 with the chance `rounded(density)` and else 0.0."""
    below = round(density * STEPS)
    steps = random_steps(count, seed=seed, start=start, device=device)
    if device.type == "cpu":  # numpy compares several times faster
        return torch.from_numpy((steps.numpy() < max(1, below)).astype(np.float32))
    return (steps < max(1, below)).float()


def rounded(density: float) -> float:
    """The chance that a mask uses for a density: the nearest 65,536th, at least one."""
    return max(1, round(density * STEPS)) / STEPS


def _words_numpy(count: int, seed: int, start: int) -> Tensor:
    with np.errstate(over="ignore"):
        x = np.arange(start + 1, start + 1 + count, dtype=np.uint64)
        spare = np.empty_like(x)
        x *= np.uint64(_GOLDEN)
        x += np.uint64(seed)
        for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
            np.right_shift(x, np.uint64(shift), out=spare)
            x ^= spare
            x *= np.uint64(factor)
        np.right_shift(x, np.uint64(31), out=spare)
        x ^= spare
    return torch.from_numpy(x.view(np.uint16).astype(np.int32))


def _words_torch(count: int, seed: int, start: int, device: torch.device) -> Tensor:
    x = torch.arange(start + 1, start + 1 + count, dtype=torch.int64, device=device)
    x = x * _signed(_GOLDEN) + _signed(seed)
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        x = (x ^ _shifted(x, shift)) * _signed(factor)
    x = x ^ _shifted(x, 31)
    return torch.stack([(x >> lane) & 0xFFFF for lane in (0, 16, 32, 48)], dim=1).reshape(-1).int()


def _shifted(x: Tensor, shift: int) -> Tensor:
    return (x >> shift) & ((1 << (64 - shift)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word
