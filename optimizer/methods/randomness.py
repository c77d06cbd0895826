"""Random masks that follow from a seed and an element's place alone: the same on any device, in any order of blocks.

A counter-based generator: word i of a stream is a mix of seed + i * golden ratio, which is SplitMix64 entered at any
place (Steele, Lea, Flood, OOPSLA 2014); each word of 64 bits serves four elements with 16 bits.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

STEPS = 1 << 16  # a chance is a whole number of 65,536ths
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def random_steps(count: int, *, seed: int, start: int, device: torch.device) -> Tensor:
    """Give `count` independent whole numbers from 0 to 65,535 as float32, for the elements from `start` on.

    Args:
        seed: of the stream, 64 bits.
    """
    if device.type == "cpu":  # numpy is several times faster there
        return torch.from_numpy(_cpu_steps(count, seed=seed, start=start).astype(np.float32))
    lead = start % 4
    return _words_torch(-(-(count + lead) // 4), seed, start // 4, device)[lead : lead + count].float()


def _cpu_steps(count: int, *, seed: int, start: int) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """The numbers of `random_steps`, as numpy's."""
    lead = start % 4
    return _words_numpy(-(-(count + lead) // 4), seed, start // 4).view(np.uint16)[lead : lead + count]


def random_mask(count: int, density: float, *, seed: int, start: int, device: torch.device) -> Tensor:
    """Give `count` numbers, each 1.0 with the chance `rounded(density)` and else 0.0."""
    below = round(rounded(density) * STEPS)
    if device.type != "cpu":
        return (random_steps(count, seed=seed, start=start, device=device) < below).float()
    kept = _cpu_steps(count, seed=seed, start=start) <= np.uint16(below - 1)
    return torch.from_numpy(kept.astype(np.float32))


def rounded(density: float) -> float:
    """The chance that a mask uses for a density: the nearest 65,536th, at least one."""
    return max(1, round(density * STEPS)) / STEPS


def _words_numpy(count: int, seed: int, start: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    offset = np.uint64(((start + 1) * _GOLDEN + seed) % (1 << 64))
    x = _weyl(1 << max(14, (count - 1).bit_length()))[:count] + offset
    spare = np.empty_like(x)
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        np.right_shift(x, np.uint64(shift), out=spare)
        np.bitwise_xor(x, spare, out=x)
        np.multiply(x, np.uint64(factor), out=x)
    np.right_shift(x, np.uint64(31), out=spare)
    return np.bitwise_xor(x, spare, out=x)


@lru_cache(maxsize=2)
def _weyl(count: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Multiples of the golden ratio; modulo 2^64, as all of this."""
    return np.arange(count, dtype=np.uint64) * np.uint64(_GOLDEN)


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
