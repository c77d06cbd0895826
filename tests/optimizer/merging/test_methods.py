"""Merge methods against brute force and closed forms, on single tensors."""

from __future__ import annotations

import math
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optimizer.errors import MergeError
from optimizer.merging.methods import (
    BLOCK,
    METHODS,
    Blend,
    FactCache,
    Line,
    Tensors,
    Values,
    blend_in_one_pass,
    float_blocks,
)
from optimizer.merging.methods.blocks import Mixture
from optimizer.merging.methods.facts import SPARSE, RankTable
from optimizer.merging.methods.pruning import RankChance
from optimizer.merging.methods.randomness import STEPS, random_mask, random_steps
from optimizer.merging.methods.spherical import _sum_along
from search_spaces import METHODS as SPECS

SIZES = [1, 7, 1024, BLOCK + 3]


CPU = torch.device("cpu")


def values(
    method: str, weights: tuple[float, ...] = (1.0,), seed: int = 0, **numbers: float | tuple[float, ...]
) -> Values:
    """A method's numbers: the given ones (a tuple is one per expert), else its defaults."""
    own, shared = {}, {}
    for parameter in SPECS[method].parameters:
        number = numbers.get(parameter.name, parameter.default)
        if parameter.scope == "expert":
            own[parameter.name] = number if isinstance(number, tuple) else (number,) * len(weights)
        else:
            shared[parameter.name] = number
    return Values(weights, own, shared, tuple(range(seed, seed + len(weights))))  # type: ignore[arg-type]


def given_tensors(base: Tensor, experts: list[Tensor]) -> Tensors:
    return Tensors("w", base, [(chr(97 + i), x) for i, x in enumerate(experts)], FactCache())


def merged(method: str, base: Tensor, experts: list[Tensor], numbers: Values, *, apart: float = 1e-6) -> Tensor:
    """Merge by a walk and, where there is one, by one pass: they must agree."""
    given = given_tensors(base, experts)
    blend = METHODS[method](given, numbers)
    out = torch.empty_like(base)
    if not blend_in_one_pass(blend, given, out):
        return walked(blend, base, experts)
    torch.testing.assert_close(out, walked(blend, base, experts), rtol=1e-5, atol=apart)
    return out


def walked(blend: Blend, base: Tensor, experts: list[Tensor]) -> Tensor:
    step = blend.walk()
    return torch.cat([step(b, xs, row).reshape(-1).clone() for row, b, xs in float_blocks(base, experts)]).reshape(
        base.shape
    )


def tensors(count: int, *shape: int, seed: int = 0, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, generator=generator) for _ in range(count)]


def test_every_declared_method_has_its_arithmetic() -> None:
    assert METHODS.keys() == SPECS.keys()


@pytest.mark.parametrize("method", METHODS)
def test_a_method_leaves_its_inputs_alone(method: str) -> None:
    base, *experts = tensors(1 + (SPECS[method].max_experts != 1) + 1, 5, 9)
    before = [base.clone(), *(x.clone() for x in experts)]
    weights = (0.4, 0.7)[: len(experts)]
    merged(method, base, experts, values(method, weights, density=0.5, t=0.3, select_topk=0.5))
    assert all(torch.equal(now, then) for now, then in zip([base, *experts], before, strict=True))


@pytest.mark.parametrize("weight", [-0.5, 0.2, 0.5, 0.9, 2.0])
def test_task_arithmetic_is_its_formula(weight: float) -> None:
    base, one, other = tensors(3, 40)
    alone = merged("task_arithmetic", base, [one], values("task_arithmetic", (weight,), **{"lambda": 0.5}))
    torch.testing.assert_close(alone, base + 0.5 * weight * (one - base))
    both = merged("task_arithmetic", base, [one, other], values("task_arithmetic", (weight, 0.3), **{"lambda": 0.5}))
    torch.testing.assert_close(both, base + 0.5 * (weight * (one - base) + 0.3 * (other - base)))
    mean = merged("task_arithmetic", base, [one, other], values("task_arithmetic", (weight, 0.3), normalize=1.0))
    torch.testing.assert_close(mean, base + (weight * (one - base) + 0.3 * (other - base)) / (weight + 0.3))


def test_a_line_is_exact_at_both_ends_and_at_equal_values() -> None:
    base, expert = tensors(2, 1000)
    for weight, end, equal in ((0.0, expert, base), (1.0, expert, expert), (0.3, base, base)):
        out = torch.empty_like(base)
        assert blend_in_one_pass(Line(weight), given_tensors(base, [end]), out)
        assert torch.equal(out, equal)
        assert torch.equal(walked(Line(weight), base, [end]), equal)


def test_two_experts_leave_what_they_did_not_change_alone() -> None:
    (base,) = tensors(1, 1000)
    same = merged("task_arithmetic", base, [base, base], values("task_arithmetic", (0.3, 0.37)))
    assert torch.equal(same, base)


# spheres


@pytest.mark.parametrize("size", [7, 1024, BLOCK + 3])
@pytest.mark.parametrize("method", ["slerp", "nuslerp", "multislerp", "karcher"])
@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_spheres_keep_the_length_of_unit_vectors_and_divide_the_angle(method: str, size: int, t: float) -> None:
    base, expert = (x / x.norm() for x in tensors(2, size, seed=size))
    out = merged(method, base, [expert], values(method, (t,), t=t))
    assert out.norm().item() == pytest.approx(1, abs=1e-4)
    angle = math.acos((base.double() @ expert.double()).item())
    near = 0.1 if method == "multislerp" else 1e-3  # its tangent plane touches at the mean, not at the base
    assert math.acos((base.double() @ out.double()).item()) == pytest.approx(t * angle, abs=near)


def test_slerp_of_nearly_parallel_opposite_or_zero_tensors() -> None:
    base, noise = tensors(2, 3, 100)
    near = base + 0.001 * noise
    assert METHODS["slerp"](given_tensors(base, [near]), values("slerp", t=0.3)) == Line(0.3)
    assert METHODS["slerp"](given_tensors(base, [-base]), values("slerp", t=0.3)) == Line(0.3)
    out = merged("slerp", torch.zeros(4), [torch.ones(4)], values("slerp", t=0.5))
    torch.testing.assert_close(out, torch.full((4,), math.sin(math.pi / 4)))


def test_a_karcher_mean_has_no_tangent() -> None:
    base, *experts = (x / x.norm() for x in tensors(4, 50))
    shares = (0.2, 0.3, 0.1)
    mean = merged("karcher", base, experts, values("karcher", shares, max_iter=50.0, tol=1e-9)).double()
    pull = torch.zeros(50).double()
    for share, x in zip((0.4, *shares), [base, *experts], strict=True):
        cosine = mean @ x.double()
        pull += share * torch.acos(cosine) / torch.sqrt(1 - cosine**2) * (x.double() - cosine * mean)
    assert pull.norm() < 1e-6


def test_opposite_experts_have_no_mean_direction() -> None:
    base, one = torch.zeros(8), torch.ones(8)
    halves = merged("multislerp", base, [one, -one], values("multislerp", (0.5, 0.5), deltas=1.0))
    assert torch.equal(halves, base)
    with pytest.raises(MergeError, match="no mean direction where weighted directions cancel out: w of a, b, c"):
        merged("multislerp", base, [one, -2 * one, one], values("multislerp", (0.25, 0.5, 0.25), deltas=1.0))
    with pytest.raises(MergeError, match="weights sum to 0"):
        merged("multislerp", base, [one, -one], values("multislerp", (0.5, -0.5), deltas=1.0))


@pytest.mark.parametrize("size", [1, 1023, 1025, BLOCK])
def test_sums_do_not_depend_on_threads(size: int) -> None:
    (block,) = tensors(1, size)
    total = _sum_along(block, "whole")
    assert total[0] == pytest.approx(block.double().sum().item(), abs=1e-6 * size)
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if threads == 1 else 1)
    try:
        assert total == _sum_along(block, "whole")
    finally:
        torch.set_num_threads(threads)


# ties


def ties_by_hand(base: list[float], experts: list[list[float]], numbers: Values) -> list[float]:
    """TIES element by element in Python floats."""
    deltas = [[x - b for x, b in zip(expert, base, strict=True)] for expert in experts]
    for delta, density in zip(deltas, numbers.own["density"], strict=True):
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
        total = sum(d for d, _ in agreeing) / (divisor if numbers.on("normalize") else 1.0)
        out.append(b + numbers.shared["lambda"] * total)
    return out


EIGHTHS = st.integers(-24, 24).map(lambda n: n / 8)  # exact in float32, with many equal magnitudes
WEIGHTS = st.sampled_from([-0.5, 0.25, 0.5, 1.0, 2.0])


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(data=st.data(), size=st.integers(1, 30), count=st.integers(1, 3), normalize=st.sampled_from([0.0, 1.0]))
def test_ties_is_its_definition(data: st.DataObject, size: int, count: int, normalize: float) -> None:
    rows = st.lists(EIGHTHS, min_size=size, max_size=size)
    base, experts = data.draw(rows), [data.draw(rows) for _ in range(count)]
    numbers = values(
        "ties",
        tuple(data.draw(WEIGHTS) for _ in range(count)),
        density=tuple(data.draw(st.sampled_from([0.01, 0.2, 0.5, 0.77, 1.0])) for _ in range(count)),
        normalize=normalize,
        **{"lambda": data.draw(st.sampled_from([0.5, 1.0]))},
    )
    out = merged("ties", torch.tensor(base), [torch.tensor(expert) for expert in experts], numbers)
    torch.testing.assert_close(out, torch.tensor(ties_by_hand(base, experts, numbers)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("density", [0.1, 0.5, 0.999])
def test_ties_keeps_exactly_its_share_even_among_equal_magnitudes(size: int, density: float) -> None:
    base = torch.zeros(size)
    (noise,) = tensors(1, size)
    for expert in (noise.clamp(1e-3), torch.ones(size), noise.sign()):
        out = merged("ties", base, [expert], values("ties", density=density))
        kept = out != 0
        assert int(kept.sum()) == max(1, int(density * size))
        if kept.sum() < size:
            assert out[kept].abs().min() >= expert[~kept].abs().max()
    assert bool((torch.ones(size)[: max(1, int(density * size))] == kept[: max(1, int(density * size))]).all())


@pytest.mark.parametrize("density", [0.1, 0.7])
def test_ties_keeps_the_first_of_equal_magnitudes_over_all_blocks(density: float) -> None:
    expert = torch.ones(3 * BLOCK // 512 + 5, 512)  # several blocks
    kept = merged("ties", torch.zeros_like(expert), [expert], values("ties", density=density)).reshape(-1) != 0
    wanted = int(density * expert.numel())
    assert kept[:wanted].all()
    assert not kept[wanted:].any()


def test_ties_elects_the_sign_of_the_weighted_sum() -> None:
    base = torch.zeros(3)
    experts = [torch.tensor([3.0, 1.0, -1.0]), torch.tensor([-1.0, -2.0, -3.0])]
    plain = values("ties", (1.0, 1.0), normalize=0.0)
    assert merged("ties", base, experts, plain).tolist() == [3.0, -2.0, -4.0]
    assert merged("ties", base, experts, values("ties", (1.0, 1.0))).tolist() == [3.0, -2.0, -2.0]


@settings(max_examples=100, deadline=None)
@given(
    numbers=st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]) | st.floats(0, 10, width=32), min_size=1, max_size=60),
    repeats=st.sampled_from([1, 1, 40]),
    share=st.floats(0.0, 1.0),
)
def test_a_rank_table_finds_any_rank(numbers: list[float], repeats: int, share: float) -> None:
    block = torch.tensor(numbers).repeat(repeats)
    block = torch.cat([block, torch.rand(1000 * (repeats - 1), generator=torch.Generator().manual_seed(1))])
    kept = max(1, round(share * block.numel()))
    table = RankTable.of([block], block.numel())
    cut = table.cut(kept, lambda: iter([block]))
    ordered = block.sort(descending=True).values
    assert cut.threshold == ordered[kept - 1]
    assert cut.equal == int((block == cut.threshold).sum())
    assert cut.equal_kept == kept - int((block > cut.threshold).sum())
    assert table.zeros == int((block == 0).sum())
    assert table.whole == (repeats == 1)
    assert len(table.values) <= max(1024, block.numel() // SPARSE + 1)


@pytest.mark.parametrize("levels", [100, 1 << 24])
def test_a_rank_table_takes_little_more_than_its_numbers(levels: int) -> None:
    numbers = (torch.rand(1 << 20, generator=torch.Generator().manual_seed(0)) * levels).floor()
    tracemalloc.start()
    RankTable.of([numbers], numbers.numel())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * numbers.nbytes


# breadcrumbs


def test_breadcrumbs_keep_the_middle() -> None:
    base, expert = torch.zeros(20), torch.arange(1.0, 21.0)
    out = merged("breadcrumbs", base, [expert], values("breadcrumbs", density=0.5, gamma=0.1))
    assert out.nonzero().flatten().tolist() == list(range(8, 18))
    few = merged("breadcrumbs", base, [expert], values("breadcrumbs", density=0.95, gamma=0.5))
    assert few.nonzero().flatten().tolist() == list(range(19))
    scaled = merged("breadcrumbs", base, [expert], values("breadcrumbs", density=0.5, gamma=0.1, rescale=1.0))
    assert scaled.sum().item() == pytest.approx(210)
    assert merged("breadcrumbs", base, [expert], values("breadcrumbs", density=0.01)).count_nonzero() == 0


# chance


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_dare_keeps_its_rate_and_its_mean(density: float) -> None:
    size = 4 * BLOCK + 11
    base, expert = torch.zeros(size), torch.ones(size)
    out = merged("dare_ties", base, [expert], values("dare_ties", density=density))
    kept = (out != 0).double().mean().item()
    assert kept == pytest.approx(density, abs=5 * math.sqrt(density * (1 - density) / size))
    assert sorted(set(out.tolist())) == [0.0, pytest.approx(1 / density, rel=1e-4)]
    bare = merged("dare_ties", base, [expert], values("dare_ties", density=density, rescale=0.0))
    assert torch.equal(bare != 0, out != 0)
    assert sorted(set(bare.tolist())) == [0.0, 1.0]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della_linear", "della"])
def test_dropping_keeps_the_expectation_of_the_deltas_sum(method: str) -> None:
    base, expert = tensors(2, 64)
    expert = base + (expert - base).abs()
    runs = [
        merged(method, base, [expert], values(method, (0.7,), seed, density=0.5, normalize=0.0)) for seed in range(2000)
    ]
    mean = torch.stack(runs).double().mean(0) - base
    whole = 0.7 * (expert - base).double()
    assert mean.sum().item() == pytest.approx(whole.sum().item(), rel=0.01)
    if method.startswith("dare"):
        assert ((mean - whole).abs() <= 5 * whole / math.sqrt(2000) + 1e-6).all()  # one deviation at density 1/2


@pytest.mark.parametrize("width", [2, 17, 1000])
def test_della_keeps_by_rank(width: int) -> None:
    rows = 200_000 // width
    row = torch.randperm(width, generator=torch.Generator().manual_seed(3)) + 1.0
    kept = RankChance(0.3, 0.4, 5, 1.0).walk()(row.repeat(rows, 1), 0).sign().double()
    rank = (row - 1).double() / (width - 1)
    wanted = 0.3 + 0.4 * rank
    assert ((kept.mean(0) - wanted).abs() <= 5 * (wanted * (1 - wanted) / rows).sqrt() + 1e-3).all()
    equal = RankChance(0.3, 0.4, 6, 1.0).walk()(torch.ones(rows, width), 0)
    assert equal.mean().item() == pytest.approx(0.5, abs=0.02)


def test_masks_follow_from_seed_and_place_alone() -> None:
    one = random_mask(1001, 0.5, seed=7, start=0, device=CPU)
    assert torch.equal(one, random_mask(1001, 0.5, seed=7, start=0, device=CPU))
    for start in range(1, 9):
        assert torch.equal(one[start:500], random_mask(500 - start, 0.5, seed=7, start=start, device=CPU))
    for seed, start in [(8, 0), (7, BLOCK)]:
        other = random_mask(1001, 0.5, seed=seed, start=start, device=CPU)
        assert 400 < int((one == other).sum()) < 600
    assert random_mask(999, 1 - 1e-12, seed=7, start=0, device=CPU).all()


def test_random_steps_are_uniform_and_independent() -> None:
    steps = random_steps(1 << 20, seed=1, start=0, device=CPU).double()
    assert (steps.min(), steps.max()) == (0, STEPS - 1)
    cells = torch.histc(steps, 256, 0, STEPS)
    assert ((cells - 4096) ** 2 / 4096).sum() == pytest.approx(255, abs=5 * math.sqrt(2 * 255))
    others = [random_steps(1 << 20, seed=2, start=0, device=CPU).double(), *(steps.roll(k) for k in (1, 2, 3, 4, 8))]
    for other in others:
        assert abs(torch.corrcoef(torch.stack([steps, other]))[0, 1]) < 5 / math.sqrt(1 << 20)


# the others


def test_sce_selects_weighs_and_erases() -> None:
    base = torch.zeros(4)
    one, other = torch.tensor([2.0, 0.0, -1.0, 1.0]), torch.tensor([1.0, 0.0, 3.0, 1.0])
    energies = [6 / 4, 11 / 4]
    both = (energies[0] * 2 + energies[1]) / sum(energies)
    out = merged("sce", base, [one, other], values("sce", (1.0, 1.0)))
    torch.testing.assert_close(out, torch.tensor([both, 0.0, 3.0, 1.0]))
    topk = merged("sce", base, [one, other], values("sce", (1.0, 1.0), select_topk=0.5))
    torch.testing.assert_close(topk, torch.tensor([0.0, 0.0, 3.0, 0.0]))
    assert torch.equal(merged("sce", base, [one], values("sce", select_topk=0.5)), base)  # one expert does not vary


def test_ram_shares_what_several_changed_and_amplifies_what_one_did() -> None:
    base = torch.zeros(4)
    one, other = torch.tensor([2.0, 1.0, 0.0, 1e-6]), torch.tensor([4.0, 0.0, 3.0, 0.0])
    assert merged("ram", base, [one, other], values("ram", (1.0, 1.0))).tolist() == [3.0, 1.0, 3.0, 0.0]
    plus = merged("ramplus_tl", base, [one, other], values("ramplus_tl", (1.0, 1.0), r=0.5, alpha=0.8))
    torch.testing.assert_close(plus, torch.tensor([3.0, 1.4, 4.2, 0.0]))


def test_model_stock_of_equal_and_of_opposite_experts() -> None:
    base, one = tensors(2, 6, 5)
    equal = merged("model_stock", base, [one, one], values("model_stock", (1.0, 1.0)))
    torch.testing.assert_close(equal, one)
    opposite = merged("model_stock", base, [one, 2 * base - one], values("model_stock", (1.0, 1.0)))
    torch.testing.assert_close(opposite, base)  # 1 + cos is 0 there: no ratio, the base stays


def test_nearswap_takes_near_numbers_and_a_step_towards_far_ones() -> None:
    base, expert = torch.zeros(4), torch.tensor([1e-4, -1e-4, 1.0, -2.0])
    out = merged("nearswap", base, [expert], values("nearswap", t=0.001))
    torch.testing.assert_close(out, torch.tensor([1e-4, -1e-4, 0.001, -0.001]))
    tiny = merged("nearswap", base, [expert], values("nearswap", t=1e-8))
    torch.testing.assert_close(tiny, torch.tensor([1e-8, -1e-8, 1e-8, -1e-8]))


def test_arcee_fusion_takes_what_stands_out() -> None:
    base, noise = tensors(2, 8, 64)
    expert = base + 0.01 * noise
    expert[3, 5] += 4.0
    out = merged("arcee_fusion", base, [expert], values("arcee_fusion"))
    taken = out != base
    assert taken[3, 5]
    assert 0 < taken.float().mean() < 0.25
    torch.testing.assert_close(out[taken], expert[taken])


def test_passthrough_scales_the_only_model() -> None:
    base, expert = tensors(2, 5)
    assert torch.equal(merged("passthrough", base, [expert], values("passthrough", scale=0.5)), 0.5 * expert)
    assert METHODS["passthrough"](given_tensors(base, []), values("passthrough", (), scale=0.5)) == Mixture(0.5, [])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 1), (2, 3, 4)])
def test_odd_shapes_merge(method: str, shape: tuple[int, ...]) -> None:
    base, *experts = tensors(1 + (SPECS[method].max_experts != 1) + 1, *shape)
    numbers = values(method, (0.4, 0.5)[: len(experts)], density=0.5, select_topk=0.5, t=0.3)
    if shape == (0,):
        METHODS[method](given_tensors(base, experts), numbers)
    else:
        out = merged(method, base, experts, numbers, apart=1e-3)  # on a sphere of one dimension all cancels out
        assert out.shape == shape
        assert out.isfinite().all()
