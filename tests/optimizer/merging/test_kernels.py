"""Compiled passes against torch: the same numbers, rounded once, whatever the type and the size."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optimizer.merging.methods import (
    METHODS,
    Deltas,
    FactCache,
    Line,
    Mixture,
    Tensors,
    Values,
    blend_in_one_pass,
    kernels,
)
from optimizer.merging.methods.pruning import RankChance
from optimizer.merging.methods.randomness import STEPS, random_steps
from search_spaces import METHODS as SPECS

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SIZES = [1, 31, 33, kernels.CHUNK, kernels.CHUNK + 5]
BITS = st.integers(0, 2**32 - 1).map(lambda bits: np.uint32(bits).view(np.float32).item())


def noise(count: int, *shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


@settings(max_examples=300, deadline=None)
@given(numbers=st.lists(BITS, min_size=1, max_size=40), dtype=st.sampled_from(DTYPES))
def test_numbers_are_rounded_as_torch_rounds_them(numbers: list[float], dtype: torch.dtype) -> None:
    given_, out = torch.tensor([x for x in numbers if not math.isnan(x)]), torch.empty(0)
    out = torch.empty(given_.shape, dtype=dtype)
    largest = kernels.scaled(given_.numpy(), np.float32(1), kernels.bits_of(out))
    assert torch.equal(out, given_.to(dtype))
    assert (largest < kernels.OVERFLOW[dtype]) == bool(out.isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_finite_number_is_read_and_written_back(dtype: torch.dtype) -> None:
    every = torch.arange(1 << 16).to(torch.int32).to(torch.int16)
    numbers = every.view(dtype) if dtype != torch.float32 else every.float()
    numbers = numbers[numbers.isfinite()]
    out = torch.zeros_like(numbers)
    assert kernels.scaled(kernels.bits_of(numbers), np.float32(1), kernels.bits_of(out)) < kernels.OVERFLOW[dtype]
    assert torch.equal(out.view(torch.uint8), numbers.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_noticed(dtype: torch.dtype) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        for place in (0, 40, 2_500):
            (numbers,) = noise(1, 3_000, dtype=dtype)
            numbers[place] = bad
            tensors = Tensors("w", numbers, [("a", noise(1, 3_000, dtype=dtype)[0])], FactCache())
            assert not blend_in_one_pass(Line(0.3), tensors, torch.empty_like(numbers))
            assert not blend_in_one_pass(Deltas([0.3]), tensors, torch.empty_like(numbers))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", [-0.7, 0.3, 0.8])
def test_a_line_is_float32_arithmetic_rounded_once(size: int, dtype: torch.dtype, weight: float) -> None:
    base, expert = noise(2, size, dtype=dtype)
    out = torch.empty_like(base)
    assert blend_in_one_pass(Line(weight), Tensors("w", base, [("a", expert)], FactCache()), out)
    b, x, w = base.float(), expert.float(), np.float32(weight).item()
    exact = b + (x - b) * w if weight < 0.5 else x - (x - b) * np.float32(np.float32(1) - np.float32(w)).item()
    assert torch.equal(out, exact.to(dtype))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("size", SIZES)
def test_sums_of_several_experts(count: int, size: int) -> None:
    base, *experts = noise(1 + count, size, dtype=torch.bfloat16)
    tensors = Tensors("w", base, list(zip("abc", experts, strict=False)), FactCache())
    factors = [0.5, -0.25, 0.125][:count]
    wide = base.double() + sum(f * (x.double() - base.double()) for f, x in zip(factors, experts, strict=True))
    out = torch.empty_like(base)
    assert blend_in_one_pass(Deltas(factors), tensors, out)
    torch.testing.assert_close(out.double(), wide, rtol=2**-8, atol=1e-6)
    mixed = 0.75 * base.double() + sum(f * x.double() for f, x in zip(factors, experts, strict=True))
    assert blend_in_one_pass(Mixture(0.75, factors), tensors, out)
    torch.testing.assert_close(out.double(), mixed, rtol=2**-8, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtypes", [DTYPES, DTYPES[::-1], [torch.bfloat16, torch.float32, torch.float32]])
def test_types_may_be_mixed(method: str, dtypes: list[torch.dtype]) -> None:
    spec = SPECS[method]
    count = 1 if spec.max_experts == 1 else 2
    base, *experts = (x.to(dtype) for x, dtype in zip(noise(1 + count, 12, 40), dtypes, strict=False))
    numbers = {"density": 0.5, "t": 0.3, "select_topk": 0.5, "weight": 0.4}
    values = Values(
        (0.4, 0.3)[:count],
        {p.name: (numbers.get(p.name, p.default),) * count for p in spec.parameters if p.scope == "expert"},
        {p.name: numbers.get(p.name, p.default) for p in spec.parameters if p.scope != "expert"},
        (1, 2)[:count],
    )
    out, wide = torch.empty_like(base), torch.empty(base.shape)
    given_ = Tensors("w", base, list(zip("ab", experts, strict=False)), FactCache())
    assert blend_in_one_pass(METHODS[method](given_, values), given_, out)
    floats = Tensors("w", base.float(), [(name, x.float()) for name, x in given_.experts], FactCache())
    assert blend_in_one_pass(METHODS[method](floats, values), floats, wide)
    assert torch.equal(out, wide.to(base.dtype))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**63 - 1), start=st.integers(0, 2**40), size=st.integers(1, 70))
def test_passes_and_walks_draw_the_same_numbers(seed: int, start: int, size: int) -> None:
    steps = random_steps(size, seed=seed, start=start, device=torch.device("cpu"))
    prune = np.zeros(1, kernels.PRUNE)
    prune["kind"], prune["factor"], prune["seed"] = kernels.CHANCE, 1.0, seed
    base, out = np.zeros(size, np.float32), np.zeros(size, np.float32)
    for below in (1, STEPS // 3, STEPS // 2, STEPS):
        prune["below"] = below
        kernels.pruned_sum(base, (np.ones(size, np.float32),), prune, np.empty((1, 0), np.float32), start, out)
        assert torch.equal(torch.from_numpy(out), (steps < below).float())


@pytest.mark.parametrize(("rows", "width"), [(1, 2), (3, 7), (5, 1000), (4, 1)])
@pytest.mark.parametrize("levels", [2, 1000])
def test_passes_and_walks_drop_the_same_ranks(rows: int, width: int, levels: int) -> None:
    (delta,) = noise(1, rows, width)
    delta = (delta * levels).round()  # with 2 levels there are many equal magnitudes
    for lowest, span in ((0.1, 0.8), (0.0, 0.3), (0.6, 0.4)):
        chance = RankChance(lowest, span, 9, 1.0)
        mask, scratch = np.empty(rows * width, np.float32), (np.empty(9999, np.int32), np.empty(29999, np.int32))
        chance.fill_mask(mask, np.zeros(rows * width, np.float32), delta.reshape(-1).numpy(), width, 0, scratch)
        kept = chance.walk()(delta.clone(), 0)
        assert torch.equal(kept, delta * torch.from_numpy(mask).view(rows, width))
