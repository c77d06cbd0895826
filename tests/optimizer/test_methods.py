"""Merge methods against brute force and closed forms, on single tensors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optimizer.methods import BLOCK, METHODS, Line, Values, _row_sums, float_blocks, random_mask
from search_spaces import METHODS as SPECS

SIZES = [1, 7, 1024, BLOCK + 3]


def values(weights: tuple[float, ...], density: float = 1.0, **others: float) -> Values:
    return Values(weights, (density,) * len(weights), tuple(range(len(weights))), **others)  # type: ignore[arg-type]


def merged(method: str, base: Tensor, experts: list[Tensor], numbers: Values) -> Tensor:
    blend = METHODS[method](base, experts, numbers)
    return torch.cat([blend(b, xs, start) for start, b, xs in float_blocks(base, experts)]).reshape(base.shape)


def tensors(count: int, *shape: int, seed: int = 0, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, generator=generator) for _ in range(count)]


def test_every_declared_method_has_its_arithmetic() -> None:
    assert METHODS.keys() == SPECS.keys()


@pytest.mark.parametrize("method", METHODS)
def test_a_method_leaves_its_inputs_alone(method: str) -> None:
    base, expert = tensors(2, 5, 9)
    before = base.clone(), expert.clone()
    merged(method, base, [expert], values((0.4,), 0.5, t=0.3, normalize=True))
    assert torch.equal(base, before[0])
    assert torch.equal(expert, before[1])


@pytest.mark.parametrize("weight", [-0.5, 0.2, 0.5, 0.9, 2.0])
def test_task_arithmetic_is_its_formula(weight: float) -> None:
    base, one, other = tensors(3, 40)
    alone = merged("task_arithmetic", base, [one], values((weight,), scale=0.5))
    torch.testing.assert_close(alone, base + 0.5 * weight * (one - base))
    both = merged("task_arithmetic", base, [one, other], values((weight, 0.3), scale=0.5))
    torch.testing.assert_close(both, base + 0.5 * (weight * (one - base) + 0.3 * (other - base)))


def test_a_line_is_exact_at_both_ends_and_at_equal_values() -> None:
    base, expert = tensors(2, 1000)
    assert torch.equal(Line(0.0)(base, [expert], 0), base)
    assert torch.equal(Line(1.0)(base, [expert], 0), expert)
    assert torch.equal(Line(0.3)(base, [base], 0), base)


# slerp


@pytest.mark.parametrize("size", SIZES[1:])
@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_slerp_of_unit_vectors_stays_on_the_sphere_and_divides_the_angle(size: int, t: float) -> None:
    base, expert = (x / x.norm() for x in tensors(2, size, seed=size))
    out = merged("slerp", base, [expert], values((1.0,), t=t))
    assert out.norm().item() == pytest.approx(1, abs=1e-4)
    angle = math.acos((base.double() @ expert.double()).item())
    assert math.acos((base.double() @ out.double()).item()) == pytest.approx(t * angle, abs=1e-3)


def test_slerp_of_nearly_parallel_opposite_or_zero_tensors() -> None:
    base, noise = tensors(2, 3, 100)
    near = base + 0.001 * noise
    assert METHODS["slerp"](base, [near], values((1.0,), t=0.3)) == Line(0.3)
    assert METHODS["slerp"](base, [-base], values((1.0,), t=0.3)) == Line(0.3)
    out = merged("slerp", torch.zeros(4), [torch.ones(4)], values((1.0,), t=0.5))
    torch.testing.assert_close(out, torch.full((4,), math.sin(math.pi / 4)))


@pytest.mark.parametrize("size", [1, 1023, 1025, BLOCK])
def test_row_sums_add_up_and_do_not_depend_on_threads(size: int) -> None:
    (block,) = tensors(1, size)
    sums = _row_sums(block)
    assert math.fsum(sums.tolist()) == pytest.approx(block.double().sum().item(), abs=1e-6 * size)
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if threads == 1 else 1)
    try:
        assert torch.equal(_row_sums(block), sums)
    finally:
        torch.set_num_threads(threads)


# ties


def ties_by_hand(base: list[float], experts: list[list[float]], numbers: Values) -> list[float]:
    """TIES element by element in Python floats."""
    deltas = [[x - b for x, b in zip(expert, base, strict=True)] for expert in experts]
    for delta, density in zip(deltas, numbers.densities, strict=True):
        kept = max(1, int(density * len(delta)))
        largest = sorted(range(len(delta)), key=lambda i, d=delta: (-abs(d[i]), i))[:kept]
        for i in set(range(len(delta))) - set(largest):
            delta[i] = 0.0
    out = []
    for i, b in enumerate(base):
        weighted = [(w * delta[i], w) for delta, w in zip(deltas, numbers.weights, strict=True)]
        sign = 1 if sum(d for d, _ in weighted) >= 0 else -1
        agreeing = [(d, w) for d, w in weighted if d * sign > 0]
        divisor = sum(w for _, w in agreeing) or 1.0
        total = sum(d for d, _ in agreeing) / (divisor if numbers.normalize else 1.0)
        out.append(b + numbers.scale * total)
    return out


EIGHTHS = st.integers(-24, 24).map(lambda n: n / 8)  # exact in float32, with many equal magnitudes
WEIGHTS = st.sampled_from([-0.5, 0.25, 0.5, 1.0, 2.0])


@settings(max_examples=150, deadline=None)
@given(data=st.data(), size=st.integers(1, 30), count=st.integers(1, 3), normalize=st.booleans())
def test_ties_is_its_definition(data: st.DataObject, size: int, count: int, normalize: bool) -> None:
    rows = st.lists(EIGHTHS, min_size=size, max_size=size)
    base, experts = data.draw(rows), [data.draw(rows) for _ in range(count)]
    numbers = Values(
        weights=tuple(data.draw(WEIGHTS) for _ in range(count)),
        densities=tuple(data.draw(st.sampled_from([0.01, 0.2, 0.5, 0.77, 1.0])) for _ in range(count)),
        seeds=(0,) * count,
        scale=data.draw(st.sampled_from([0.5, 1.0])),
        normalize=normalize,
    )
    out = merged("ties", torch.tensor(base), [torch.tensor(expert) for expert in experts], numbers)
    torch.testing.assert_close(out, torch.tensor(ties_by_hand(base, experts, numbers)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("density", [0.1, 0.5, 0.999])
def test_ties_keeps_exactly_its_share_even_among_equal_magnitudes(size: int, density: float) -> None:
    base = torch.zeros(size)
    (noise,) = tensors(1, size)
    for expert in (noise.clamp(1e-3), torch.ones(size), noise.sign()):
        out = merged("ties", base, [expert], values((1.0,), density))
        kept = out != 0
        assert int(kept.sum()) == max(1, int(density * size))
        if kept.sum() < size:
            assert out[kept].abs().min() >= expert[~kept].abs().max()
    assert bool((torch.ones(size)[: max(1, int(density * size))] == kept[: max(1, int(density * size))]).all())


def test_ties_elects_the_sign_of_the_weighted_sum() -> None:
    base = torch.zeros(3)
    experts = [torch.tensor([3.0, 1.0, -1.0]), torch.tensor([-1.0, -2.0, -3.0])]
    assert merged("ties", base, experts, values((1.0, 1.0))).tolist() == [3.0, -2.0, -4.0]
    assert merged("ties", base, experts, values((1.0, 1.0), normalize=True)).tolist() == [3.0, -2.0, -2.0]


# dare


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_dare_keeps_its_rate_and_its_mean(density: float) -> None:
    size = 4 * BLOCK + 11
    base, expert = torch.zeros(size), torch.ones(size)
    out = merged("dare_ties", base, [expert], values((1.0,), density))
    kept = (out != 0).double().mean().item()
    assert kept == pytest.approx(density, abs=5 * math.sqrt(density * (1 - density) / size))
    assert sorted(set(out.tolist())) == [0.0, pytest.approx(1 / density)]
    bare = merged("dare_ties", base, [expert], values((1.0,), density, rescale=False))
    assert torch.equal(bare != 0, out != 0)
    assert sorted(set(bare.tolist())) == [0.0, 1.0]


def test_dare_has_the_expectation_of_the_whole_delta() -> None:
    base, expert = tensors(2, 64)
    runs = [merged("dare_ties", base, [expert], Values((0.7,), (0.5,), (seed,))) for seed in range(2000)]
    mean = torch.stack(runs).double().mean(0)
    error = 0.7 * (expert - base).abs().double() / math.sqrt(2000)  # one standard deviation at density 1/2
    assert ((mean - (base + 0.7 * (expert - base))).abs() <= 5 * error + 1e-6).all()


def test_masks_follow_from_seed_and_place_alone() -> None:
    one = random_mask(1001, 0.5, seed=7, start=0)
    assert torch.equal(one, random_mask(1001, 0.5, seed=7, start=0))
    assert torch.equal(one[:500], random_mask(500, 0.5, seed=7, start=0))
    for seed, start in [(8, 0), (7, BLOCK)]:
        other = random_mask(1001, 0.5, seed=seed, start=start)
        assert 400 < int((one == other).sum()) < 600
    assert random_mask(999, 1 - 1e-12, seed=7, start=0).all()
