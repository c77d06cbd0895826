"""Matrix products on a CPU: which are fast, and float32's by oneDNN where they are float32 too.

torch has MKL compute float32 products, whose kernels for AMD's CPUs are of half the width. oneDNN computes them where
it may round the factors to bfloat16, which it does where the CPU gains by that (AMX): so one product is tried.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

SIZE = 512  # rows and columns of the product that is tried
WORSE = 10  # times the error of MKL's product that is still float32's: both sum in an order of their own
EXACT, ALLOWED = "ieee", "bf16"


def multiplies_bf16() -> bool:
    """Tell whether the CPU has instructions for products of bfloat16: they take half of float32's time, or less."""
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def prefer_onednn() -> bool:
    """Have this process compute float32 products with oneDNN where it does not round their factors; tell whether."""
    settings = _settings()
    if settings is None:
        return False
    settings.fp32_precision = EXACT
    of_mkl = _error()
    settings.fp32_precision = ALLOWED
    if _error() > WORSE * of_mkl:
        settings.fp32_precision = EXACT
        return False
    return True


@contextmanager
def many_small() -> Iterator[None]:
    """Leave products to MKL for a while: a small one takes oneDNN longer to begin than to compute."""
    settings = _settings()
    before = None if settings is None else settings.fp32_precision
    if settings is None or before == EXACT:
        yield
        return
    settings.fp32_precision = EXACT
    try:
        yield
    finally:
        settings.fp32_precision = before


def _settings() -> Any:
    """Return torch's settings of oneDNN's products; None before torch 2.9, which has none."""
    return getattr(torch.backends.mkldnn, "matmul", None)


def _error() -> float:
    """Return the largest error of a float32 product, in units of its typical number."""
    draw = torch.Generator().manual_seed(0)
    one, other = (torch.randn(SIZE, SIZE, generator=draw) for _ in range(2))
    exact = one.double() @ other.double()
    return float(((one @ other) - exact).abs().max() / exact.std())
