"""The gradient by merge weights is the derivative of the loss, on labels and against teachers: finite differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from evals.engine import Engine
from evals.teachers import Beliefs
from evals.tokens import Pair
from optimizer.checkpoints.resident import resident_model, tensor_places
from optimizer.errors import MergeError
from optimizer.merging.gradients import LEARNABLE, weight_gradients
from optimizer.merging.merge import MergeCache, Merger, Sources
from search_spaces import METHODS, Recipe, Setting, group_of
from tests.pico import pico_expert, pico_llama

STEP = 1e-4
PAIRS = [
    Pair((5, 9, 11, 3), (7, 2)), Pair((5, 9, 11, 3), (8,)), Pair((5, 9, 4), (1, 6, 30)), Pair((40, 2), (3, 9, 9, 12)),
]  # fmt: skip


class Bench:
    """A pico model in float64 whose weights are base + sum of weight * direction, exactly differentiable."""

    def __init__(self, folder: Path, recipe: Recipe, sources: Sources) -> None:
        from transformers import AutoTokenizer

        self.recipe, self.sources, self.cache = recipe, sources, MergeCache()
        self.model = resident_model(sources.base, dtype="float32", device="cpu").double()
        for module in self.model.modules():
            if isinstance(module, LlamaRMSNorm):  # transformers' own computes in float32
                module.forward = partial(_norm, module)
        self.places = tensor_places(self.model, sources.base)
        self.engine = Engine(self.model, AutoTokenizer.from_pretrained(folder), token_budget=64)

    def loss(self, weights: Mapping[tuple[str, str], float], beliefs: Sequence[Beliefs] | None = None) -> float:
        self.fill(weights)
        with torch.inference_mode():
            if beliefs is None:
                return float(loss_of(torch.stack([self.loglikelihood(pair) for pair in PAIRS])))
            parts = [held.divergences(self.logits(pair)).sum() for pair, held in zip(PAIRS, beliefs, strict=True)]
            return float(loss_of(-torch.stack(parts)))

    def loglikelihood(self, pair: Pair) -> Tensor:
        return self.logits(pair).log_softmax(-1).gather(-1, torch.tensor(pair.continuation)[:, None]).sum()

    def logits(self, pair: Pair) -> Tensor:
        """What predicts each token of the continuation, plainly read: (T, V)."""
        tokens = torch.tensor([pair.context + pair.continuation])
        logits: Tensor = self.model(input_ids=tokens[:, :-1], use_cache=False).logits[0]
        return logits[len(pair.context) - 1 :]

    def fill(self, weights: Mapping[tuple[str, str], float]) -> None:
        merger = Merger(self.sources, self.recipe, self.cache)
        for name, place in self.places.items():
            tensors, walk = merger.directions(name, place.device)
            moved = tensors.base.double().clone()
            base, *experts = (x.float().reshape(-1, x.shape[-1]) for x in (tensors.base, *tensors.others))
            ways = walk(base, experts, 0)
            for (expert, _), way in zip(tensors.experts, ways, strict=True):
                moved += weights[expert, name] * way.double().reshape(place.shape)
            place.copy_(moved)


def _norm(module: LlamaRMSNorm, states: Tensor) -> Tensor:
    return module.weight * states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)


def loss_of(loglikelihoods: Tensor) -> Tensor:
    return -(loglikelihoods * torch.tensor([1.0, 0.5, 2.0, 0.25], dtype=torch.float64)).sum()


@pytest.mark.parametrize("method", LEARNABLE)
@pytest.mark.parametrize("experts", [1, 2])
def test_gradient_is_the_derivative_of_the_loss_by_every_weight(method: str, experts: int, tmp_path: Path) -> None:
    _require_derivative(method, experts, tmp_path, teachers=False)


@pytest.mark.parametrize("method", ["task_arithmetic", "dare_ties"])
def test_gradient_is_the_derivative_of_the_divergence_from_teachers(method: str, tmp_path: Path) -> None:
    _require_derivative(method, 2, tmp_path, teachers=True)


def _require_derivative(method: str, experts: int, tmp_path: Path, *, teachers: bool) -> None:
    base = pico_llama(tmp_path / "base", seed=0)
    names = ("law", "code")[:experts]
    sources = {n: str(pico_expert(base, tmp_path / n, seed=i + 1)) for i, n in enumerate(names)}
    density = METHODS[method].parameter("density")
    settings = [Setting("weight", n, "", 0.4 + 0.3 * i) for i, n in enumerate(names)]
    settings += [Setting("density", n, "", 0.6) for n in names if density]
    settings += [Setting("normalize", "", "", 0.0)] if METHODS[method].parameter("normalize") else []
    recipe = Recipe(method, str(base), tuple(sources.items()), tuple(settings))
    bench = Bench(base, recipe, Sources.open(base, sources))
    weights = {(n, t): 0.4 + 0.3 * i for i, n in enumerate(names) for t in bench.places}
    held = None
    if teachers:  # the first expert's, then the base's
        sides = [{w: side * (w[0] == names[0]) for w in weights} for side in (1.0, 0.0)]
        parts = []
        for side, pairs in zip(sides, (PAIRS[:2], PAIRS[2:]), strict=True):
            bench.fill(side)
            parts += bench.engine.beliefs(pairs)
        held = parts
    bench.fill(weights)
    with weight_gradients(bench.model, bench.places, bench.sources, recipe, bench.cache) as found:
        bench.engine.backward(PAIRS[:2], lambda x: loss_of(torch.cat([x, x.new_zeros(2)])), held and held[:2])
        bench.engine.backward(PAIRS[2:], lambda x: loss_of(torch.cat([x.new_zeros(2), x])), held and held[2:])
    largest = max(map(abs, found.values()))
    assert largest > 0
    groups: dict[str, list[tuple[str, str]]] = {}
    for expert, tensor in found:
        groups.setdefault(f"{expert} {group_of(tensor)}", []).append((expert, tensor))
    for group, members in groups.items():
        ends = [bench.loss(weights | {m: weights[m] + step for m in members}, held) for step in (STEP, -STEP)]
        measured = (ends[0] - ends[1]) / (2 * STEP)
        told = sum(found[m] for m in members)
        assert told == pytest.approx(measured, rel=1e-4, abs=1e-7 * largest), group


def test_gradient_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    base = pico_llama(tmp_path / "base", seed=0)
    sources = Sources.open(base, {"law": str(pico_expert(base, tmp_path / "law", seed=1))})
    recipe = Recipe(
        "task_arithmetic", str(base), (("law", str(tmp_path / "law")),), (Setting("weight", "law", "", 0.5),)
    )
    bench = Bench(base, recipe, sources)
    before = {name: place.clone() for name, place in bench.places.items()}
    with weight_gradients(bench.model, bench.places, sources, recipe, bench.cache):
        bench.engine.backward(PAIRS, loss_of)
    assert all(torch.equal(before[name], place) for name, place in bench.places.items())
    assert not any(p.requires_grad or p.grad is not None for p in bench.model.parameters())


def test_normalised_or_nonlinear_weights_are_refused(tmp_path: Path) -> None:
    base = pico_llama(tmp_path / "base", seed=0)
    expert = str(pico_expert(base, tmp_path / "law", seed=1))
    sources = Sources.open(base, {"law": expert})
    model = resident_model(sources.base, dtype="float32", device="cpu")
    places = tensor_places(model, sources.base)
    for recipe in (
        Recipe("slerp", str(base), (("law", expert),), (Setting("t", "", "", 0.5),)),
        Recipe("ties", str(base), (("law", expert),), (Setting("weight", "law", "", 0.5),)),
        Recipe(
            "linear", str(base), (("law", expert),), (Setting("weight", "law", "", 0.5), Setting("sum", "", "", 2.0))
        ),
    ):
        entered = weight_gradients(model, places, sources, recipe, MergeCache())
        with pytest.raises(MergeError, match=r"weights are learned (for|where)"), entered:
            pass
