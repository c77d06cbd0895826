"""mergekit, where it is installed, makes of our documents what the formulas say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("mergekit", reason="mergekit is not installed")

import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file

from search_spaces import Recipe, Setting, group_of, group_tensors
from search_spaces.mergekit.writer import to_mergekit
from search_spaces.space import Space
from tests.pico import pico_expert, pico_llama

Tensors = dict[str, torch.Tensor]
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

LAYERS = 3


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    base = pico_llama(folder / "base", layers=LAYERS, tied=request.param, dtype="float32")
    scales = {"law": 0.1, "code": 0.1, "near": 0.001}  # near is all but parallel to the base: slerp becomes lerp
    experts = {name: pico_expert(base, folder / name, seed=i, scale=scales[name]) for i, name in enumerate(scales)}
    return {"base": base, **experts}


def merged(models: dict[str, Path], out: Path, recipe: Recipe) -> tuple[Tensors, dict[str, Tensors]]:
    """Merge with mergekit; give its tensors and those of base and experts."""
    given = {name: load_file(folder / "model.safetensors") for name, folder in models.items()}
    document = to_mergekit(recipe, given["base"], out_dtype="float32")
    run_merge(MergeConfiguration.model_validate(document), str(out), MergeOptions(quiet=True, copy_tokenizer=False))
    found: Tensors = {}
    for shard in sorted(out.glob("*.safetensors")):
        found |= load_file(shard)
    assert set(found) == set(given["base"])
    return found, given


def recipe_of(method: str, models: dict[str, Path], names: list[str], **extra: float) -> Recipe:
    """Give every expert and group a weight of its own, so that a misplaced filter shows."""
    groups = list(group_tensors(load_file(models["base"] / "model.safetensors")))
    scale, owners = ("t", [""]) if method == "slerp" else ("weight", names)
    settings = [
        Setting(scale, owner, group, (1 + i + 0.5 * j) / 10)
        for i, group in enumerate(groups)
        for j, owner in enumerate(owners)
    ]
    others = [Setting(name, "", "", value) for name, value in extra.items()]
    experts = tuple((name, str(models[name])) for name in names)
    return Recipe(method, str(models["base"]), experts, (*settings, *others))


def by_hand(
    method: Callable[[Recipe, str, Tensors], torch.Tensor], recipe: Recipe, given: dict[str, Tensors]
) -> Tensors:
    return {name: method(recipe, name, {m: tensors[name] for m, tensors in given.items()}) for name in given["base"]}


def weights(recipe: Recipe, name: str) -> dict[str, float]:
    return {expert: recipe.value("weight", expert=expert, group=group_of(name)) for expert, _ in recipe.experts}


def linear(recipe: Recipe, name: str, x: Tensors) -> torch.Tensor:
    w = weights(recipe, name)
    return (1 - sum(w.values())) * x["base"] + sum(w[e] * x[e] for e in w)


def task_arithmetic(recipe: Recipe, name: str, x: Tensors) -> torch.Tensor:
    w = weights(recipe, name)
    return x["base"] + recipe.value("lambda") * sum(w[e] * (x[e] - x["base"]) for e in w)


def slerp(recipe: Recipe, name: str, x: Tensors) -> torch.Tensor:
    t = recipe.value("t", group=group_of(name))
    a, b = x["base"].double(), x[recipe.experts[0][0]].double()
    dot = (a * b).sum() / (a.norm() * b.norm())
    if dot.abs() > 0.9995:
        return ((1 - t) * a + t * b).float()
    angle = torch.acos(dot)
    return ((torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)).float()


def ties(recipe: Recipe, name: str, x: Tensors) -> torch.Tensor:
    w, deltas = weights(recipe, name), {}
    for expert in w:
        delta = x[expert] - x["base"]
        k = max(1, int(recipe.value("density", expert=expert, group=group_of(name)) * delta.numel()))
        kept = delta.abs().flatten().topk(k).indices
        deltas[expert] = w[expert] * torch.zeros(delta.numel()).index_copy(0, kept, delta.flatten()[kept])
    elected = torch.where(sum(deltas.values()) >= 0, 1.0, -1.0)
    agree = {expert: (delta.sign() == elected).float() for expert, delta in deltas.items()}
    total = sum(deltas[e] * agree[e] for e in w)
    if recipe.value("normalize"):
        divisor = sum(w[e] * agree[e] for e in w)
        total = total / torch.where(divisor == 0, 1.0, divisor)
    return x["base"] + recipe.value("lambda") * total.reshape(x["base"].shape)


@pytest.mark.parametrize(
    ("method", "names", "extra"),
    [
        (linear, ["law"], {}),
        (linear, ["code", "law"], {}),
        (task_arithmetic, ["law"], {}),
        (task_arithmetic, ["code", "law"], {"lambda": 0.7}),
        (slerp, ["law"], {}),
        (slerp, ["near"], {}),
        (ties, ["law"], {"density": 0.3, "normalize": 0.0}),
        (ties, ["code", "law"], {"density": 0.3, "normalize": 0.0, "lambda": 0.7}),
        (ties, ["code", "law"], {"density": 0.3}),
        (ties, ["code", "law"], {"density": 1.0, "normalize": 0.0}),
    ],
)
def test_mergekit_agrees_with_arithmetic_by_hand(
    models: dict[str, Path],
    tmp_path: Path,
    method: Callable[[Recipe, str, Tensors], torch.Tensor],
    names: list[str],
    extra: dict[str, float],
) -> None:
    recipe = recipe_of(method.__name__, models, names, **extra)
    found, given = merged(models, tmp_path / "out", recipe)
    for name, expected in by_hand(method, recipe, given).items():
        torch.testing.assert_close(found[name], expected, atol=2e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_mergekit_reads_kinds_as_we_do(models: dict[str, Path], tmp_path: Path) -> None:
    tensors = tuple(load_file(models["base"] / "model.safetensors"))
    space = Space.build(
        "task_arithmetic", str(models["base"]), experts={"law": str(models["law"])}, tensors=tensors, shape="layers",
        modules=("qk", "norms", "attn", "mlp"), ranges={}, patterns={"qk": ("q_proj", "k_proj"), "norms": ("norm",)},
    )  # fmt: skip
    recipe = space.recipe({name: (1 + i) / 20 for i, name in enumerate(space.distributions())})
    found, given = merged(models, tmp_path / "out", recipe)
    for name in tensors:
        weight = recipe.value("weight", expert="law", group=name)
        expected = given["base"][name] + weight * (given["law"][name] - given["base"][name])
        torch.testing.assert_close(found[name], expected, atol=2e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_mergekit_adds_linear_weights_of_another_sum_as_we_do(models: dict[str, Path], tmp_path: Path) -> None:
    recipe = recipe_of("linear", models, ["law"], sum=1.25)
    found, given = merged(models, tmp_path / "out", recipe)
    for name in given["base"]:
        weight = weights(recipe, name)["law"]
        expected = (1.25 - weight) * given["base"][name] + weight * given["law"][name]
        torch.testing.assert_close(found[name], expected, atol=2e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
