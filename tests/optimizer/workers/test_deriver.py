"""Derived experts: what the closed forms promise, read layer by layer, made once."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from evals.tokens import Pair
from optimizer.checkpoints.checkpoint import Checkpoint
from optimizer.checkpoints.opening import open_checkpoint
from optimizer.merging import fisher
from optimizer.merging.fisher import RowSquares, fisher_mean, odds_for, row_distances
from optimizer.merging.kfac import directions, kfac_mean
from optimizer.merging.merge import Sources, merged_tensor
from optimizer.merging.regmean import Grams, regmean
from optimizer.study.study_file import Study
from optimizer.workers import deriver, orders
from optimizer.workers.deriver import MANIFEST, Deriver
from optimizer.workers.orders import Derivation
from optimizer.workers.worker import Worker
from search_spaces import Recipe, Setting


def gram(seed: int, width: int = 6, rows: int = 40) -> Tensor:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return x.T @ x / rows


def weights(seed: int) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))


def test_with_one_kind_of_inputs_regmean_is_the_straight_line() -> None:
    base, expert, same = weights(0), weights(1), gram(2)
    assert torch.allclose(regmean(base, expert, [same], [same], 0.3), torch.lerp(base, expert, 0.3), atol=1e-5)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_regmean_changes_both_sides_outputs_least(share: float) -> None:
    base, expert, of_base, of_expert = weights(0), weights(1), gram(2), gram(3)

    def change(w: Tensor) -> float:
        def squared(delta: Tensor, gram: Tensor) -> float:
            return float(torch.einsum("oi,ij,oj->", delta, gram, delta))

        return share * squared(w - expert, of_expert) + (1 - share) * squared(w - base, of_base)

    best = regmean(base, expert, [of_base], [of_expert], share)
    least = change(best)
    for seed in range(5):
        assert change(best + 0.05 * weights(10 + seed)) > least
    assert least < change(torch.lerp(base, expert, share))


def test_the_ends_of_regmeans_path_are_the_models() -> None:
    base, expert = weights(0), weights(1)
    for share, end in ((0.0, base), (1.0, expert)):
        assert torch.equal(regmean(base, expert, [gram(2)], [gram(3)], share), end)


def test_a_row_goes_where_the_gradients_are() -> None:
    base, expert = weights(0), weights(1)
    of_base, of_expert = torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    found = fisher_mean(base, expert, of_base, of_expert, 1 / 3)
    line = torch.lerp(base, expert, 0.25)
    assert torch.allclose(found[0], line[0])
    assert torch.allclose(found[1], expert[1], atol=1e-4)
    assert torch.allclose(found[2], base[2], atol=1e-4)
    assert torch.allclose(found[3], line[3])  # nothing is known of it


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e3])
@pytest.mark.parametrize("share", [0.2, 0.6, 0.99])
def test_a_share_is_how_far_the_whole_goes_however_large_the_gradients_are(share: float, scale: float) -> None:
    models = {name: (weights(seed), weights(seed + 1)) for name, seed in (("a", 0), ("b", 2))}
    draw = torch.Generator().manual_seed(0)
    of_base, of_expert = ({name: torch.rand(4, generator=draw) ** 3 for name in models} for _ in range(2))
    of_base = {name: scale * rows for name, rows in of_base.items()}
    odds = odds_for(share, of_base, of_expert, {name: row_distances(*both) for name, both in models.items()})
    gone = apart = 0.0
    for name, (base, expert) in models.items():
        moved = fisher_mean(base, expert, of_base[name], of_expert[name], odds) - base
        gone += float((moved * (expert - base)).sum())
        apart += float((expert - base).square().sum())
    assert gone / apart == pytest.approx(share, abs=1e-5)


def test_rows_in_blocks_are_as_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    base, expert = weights(0), weights(1)
    of_base, of_expert = torch.tensor([1.0, 0.0, 1.0, 0.5]), torch.tensor([1.0, 1.0, 0.0, 2.0])

    def made() -> list[Tensor]:
        squares = RowSquares()
        squares.add("a", base)
        mean = fisher_mean(base, expert, of_base, of_expert, 0.5)
        return [mean, row_distances(base, expert), squares.means()["a"]]

    whole = made()
    monkeypatch.setattr(fisher, "AT_ONCE", 3)  # of four rows
    assert all(map(torch.allclose, made(), whole))


def unit_gram(seed: int) -> Tensor:
    found = gram(seed)
    return found / found.diagonal().mean()


ROWS = torch.tensor([1.0, 0.2, 3.0, 0.5]), torch.tensor([0.3, 2.0, 1.0, 0.7])


@pytest.mark.parametrize("odds", [0.1, 1.0, 5.0])
def test_k_fac_is_regmean_where_all_rows_are_alike(odds: float) -> None:
    base, expert, alike = weights(0), weights(1), torch.ones(4)
    found = kfac_mean(base, expert, directions([unit_gram(2)], [unit_gram(3)]), alike, alike, odds)
    wanted = regmean(base, expert, [unit_gram(2)], [unit_gram(3)], odds / (1 + odds))
    assert torch.allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("odds", [0.1, 1.0, 5.0])
def test_k_fac_is_fisher_where_all_inputs_are_alike(odds: float) -> None:
    base, expert = weights(0), weights(1)
    found = kfac_mean(base, expert, directions([gram(2)], [7 * gram(2)]), *ROWS, odds)
    assert torch.allclose(found, fisher_mean(base, expert, *ROWS, odds), atol=1e-4)


def test_k_fac_costs_both_sides_least() -> None:
    base, expert, of_base, of_expert = weights(0), weights(1), unit_gram(2), unit_gram(3)
    odds = 0.7

    def cost(w: Tensor) -> float:
        def of_side(delta: Tensor, rows: Tensor, gram: Tensor) -> float:
            return float(torch.einsum("o,oi,ij,oj->", rows, delta, gram, delta))

        return odds * of_side(w - expert, ROWS[1], of_expert) + of_side(w - base, ROWS[0], of_base)

    best = kfac_mean(base, expert, directions([of_base], [of_expert]), *ROWS, odds)
    least = cost(best)
    for seed in range(5):
        assert cost(best + 0.05 * weights(10 + seed)) > least
    assert least < cost(fisher_mean(base, expert, *ROWS, odds))
    assert least < cost(regmean(base, expert, [of_base], [of_expert], odds / (1 + odds)))


def test_k_fac_passes_over_directions_that_no_input_has() -> None:
    of_base, of_expert = unit_gram(2), unit_gram(3)
    for side in (of_base, of_expert):
        side[-1] = 0
        side[:, -1] = 0
    found = kfac_mean(weights(0), weights(1), directions([of_base], [of_expert]), *ROWS, 1.0)
    assert found.isfinite().all()


def divided(whole: Tensor) -> list[Tensor]:
    return [whole[:2, :2], whole[2:, 2:]]


def test_blocks_of_inputs_are_a_whole_without_what_lies_between_them() -> None:
    base, expert, sides = weights(0), weights(1), [unit_gram(2), unit_gram(3)]
    wholes = [torch.block_diag(*divided(gram)) for gram in sides]
    blocks = [divided(gram) for gram in sides]
    by_regmean = [regmean(base, expert, *grams, 0.3) for grams in ([[w] for w in wholes], blocks)]
    by_kfac = [kfac_mean(base, expert, directions(*grams), *ROWS, 0.7) for grams in ([[w] for w in wholes], blocks)]
    assert torch.allclose(*by_regmean, atol=1e-5)
    assert torch.allclose(*by_kfac, atol=1e-5)
    assert not torch.allclose(by_kfac[0], kfac_mean(base, expert, directions(*([s] for s in sides)), *ROWS, 0.7))


def test_a_block_that_no_input_reaches_stays_finite() -> None:
    base, expert = weights(0), weights(1)
    blocks = [[torch.zeros(2, 2), unit_gram(seed)[2:, 2:]] for seed in (2, 3)]
    assert regmean(base, expert, *blocks, 0.3).isfinite().all()
    assert kfac_mean(base, expert, directions(*blocks), *ROWS, 0.7).isfinite().all()


def test_a_mean_is_rounded_once_to_the_bases_dtype() -> None:
    base, expert, rows = weights(0), weights(1), torch.tensor([1.0, 0.5, 1.0, 0.0])
    found = fisher_mean(base.bfloat16(), expert.bfloat16(), rows, rows.flip(0), 0.5)
    exact = fisher_mean(base.bfloat16().float(), expert.bfloat16().float(), rows, rows.flip(0), 0.5)
    assert torch.equal(found, exact.bfloat16())


def test_squares_are_in_the_unit_of_their_mean() -> None:
    squares = RowSquares()
    squares.add("a", torch.tensor([[1.0, 1.0], [3.0, 1.0]]))
    squares.add("b", torch.tensor([2.0, 2.0]))
    means = squares.means()  # rows of mean 1, 5 and 4: over all elements 10 / 3
    assert torch.allclose(means["a"], torch.tensor([0.3, 1.5]))
    assert torch.allclose(means["b"], torch.tensor([1.2]))


def test_layer_by_layer_sums_are_those_of_plain_passes(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optimizer.merging.regmean.WIDEST", 0)  # so that a pico model's MLP has blocks
    tokens = [(5, 9, 11, 3, 7), (5, 9, 4, 8), (40, 2, 3)]
    pairs = [Pair(line[:-1], line[-1:]) for line in tokens]
    model = worker.engine.model
    modules = [{"q": layer.self_attn.q_proj, "k": layer.self_attn.k_proj, "down": layer.mlp.down_proj}
               for layer in model.model.layers]  # fmt: skip
    found = [Grams(model.config.hidden_size) for _ in modules]
    with worker.engine.layer_by_layer({"texts": pairs}) as reading:
        reading.advance("texts")
        for named, grams in zip(modules, found, strict=True):
            with grams.adding(named):
                reading.advance("texts")
    assert len(found[0].sums["q"]) == 1 < len(found[0].sums["down"])
    for named, grams in zip(modules, found, strict=True):
        plain: dict[str, Tensor] = {}
        hooks = [m.register_forward_pre_hook(partial(_remember, plain, n)) for n, m in named.items()]
        rows: dict[str, list[Tensor]] = {n: [] for n in named}
        with torch.inference_mode():
            seen: set[tuple[int, ...]] = set()
            for line in tokens:
                model(input_ids=torch.tensor([line[:-1]]), use_cache=False)
                for i in range(1, len(line)):
                    if line[:i] not in seen:  # a shared beginning counts once
                        seen.add(line[:i])
                        for n in named:
                            rows[n].append(plain[n][0, i - 1])
        for hook in hooks:
            hook.remove()
        for n in named:
            x = torch.stack(rows[n]).float()
            assert grams.rows[n] == len(x)
            blocks = x.tensor_split(len(grams.sums[n]), dim=1)
            assert len(blocks) == math.ceil(x.shape[1] / model.config.hidden_size)
            for total, block in zip(grams.sums[n], blocks, strict=True):
                assert torch.allclose(total, block.T @ block, rtol=1e-3, atol=1e-3)


def _remember(found: dict[str, Tensor], name: str, _: object, given: tuple[Tensor]) -> None:
    found[name] = given[0]


@pytest.mark.parametrize("form", ["kfac", "regmean", "fisher"])
def test_a_path_is_made_once_and_each_point_is_a_checkpoint(
    form: str, study: Study, worker: Worker, tmp_path: Path
) -> None:
    path = Derivation(form, "clinical", (0.25, 0.75), tmp_path)
    near, far = worker.derive(path)
    stamps = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}
    assert worker.derive(path) == [near, far]
    assert stamps == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}
    base, expert = open_checkpoint(study.models.base), open_checkpoint(study.models.experts["clinical"])
    made = [open_checkpoint(folder, base=base) for folder in (near, far)]

    def distance(one: Checkpoint, other: Checkpoint) -> float:
        return sum(float((one.tensor(n).float() - other.tensor(n).float()).square().sum()) for n in base.names)

    assert all(point.names == base.names and point.kind(n) == base.kind(n) for point in made for n in base.names)
    assert distance(made[0], base) < distance(made[1], base)
    assert distance(made[1], expert) < distance(made[0], expert)
    weights = (Setting("weight", "clinical", "", 1.0),)  # a derived expert stands in a recipe like any other
    recipe = Recipe("task_arithmetic", study.models.base, (("clinical", str(near)),), weights)
    merged = merged_tensor(base.names[0], Sources.open(base.folder, dict(recipe.experts)), recipe)
    assert torch.equal(merged, made[0].tensor(base.names[0]))
    assert (near / MANIFEST).is_file()


def test_a_derived_expert_is_made_of_a_few_items_of_each_task(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orders, "CALIBRATION", (3, 2))
    read: Counter[str] = Counter()

    def derive(self: Deriver, path: Derivation) -> list[Path]:
        read.update(example.task for example in (*self.general, *self.domain))
        return []

    monkeypatch.setattr(Deriver, "derive", derive)
    worker.derive(Derivation("fisher", "clinical", (0.5,), tmp_path))
    assert read == {example.task: 3 if example.right else 2 for example in worker.examples()}


def test_a_tensor_that_one_side_never_reads_goes_where_the_other_asks(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an expert of a mixture does that no general item is sent to."""
    base, expert = worker._sources.base, worker._sources.experts["clinical"]
    name = next(n for n in base.names if n.endswith("up_proj.weight"))

    class OfBase(RowSquares):
        def add(self, tensor: str, gradient: Tensor) -> None:
            if tensor != name:
                super().add(tensor, gradient)

    made = iter((OfBase, RowSquares))
    monkeypatch.setattr(deriver, "RowSquares", lambda: next(made)())
    point = open_checkpoint(worker.derive(Derivation("fisher", "clinical", (0.3,), tmp_path))[0], base=base)
    assert torch.allclose(point.tensor(name).float(), expert.tensor(name).float(), atol=1e-2)
    others = [n for n in worker.tensors if n != name]
    assert not all(torch.allclose(point.tensor(n).float(), expert.tensor(n).float(), atol=1e-2) for n in others)


def test_what_it_was_made_of_is_in_its_name(worker: Worker, tmp_path: Path) -> None:
    first = worker.derive(Derivation("regmean", "clinical", (0.5,), tmp_path))[0]
    other = worker.derive(Derivation("fisher", "clinical", (0.5,), tmp_path))[0]
    assert first.name.startswith("clinical-regmean-0.5-")
    assert other.name.startswith("clinical-fisher-0.5-")
    assert first.name[-12:] != other.name[-12:]
