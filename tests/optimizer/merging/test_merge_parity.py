"""Our merges against mergekit's own, method by method: the same document, read by both.

On pico models with gradients and filters, and on real tensors where the demo's models have been built. What is compared
is float32 before it is rounded to what is stored. The bounds are what holds, with the reason where they are wide:
- NEAR, of what mergekit computes in float32; where it measures lengths, which float32 sums get wrong by up to 1e-5, of
  what it computes in float64;
- of equal numbers at a threshold mergekit keeps what its sort, which is not stable, happens to put first; we keep the
  first in memory. With these two choices one formula in float64 gives both merges.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("mergekit", reason="mergekit is not installed")

import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from optimizer.merging.merge import Sources, merged_tensor
from search_spaces import METHODS, Recipe
from search_spaces.mergekit.reader import from_mergekit
from tests.pico import pico_expert, pico_llama

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]  # mergekit runs beside ours

DEMO = Path(__file__).parents[3] / "runs/demo-inputs"
NEAR = 3e-7  # as `apart` has it: some roundings of a float32
ROWS = 128  # tokens and feed-forward units of the model cut from the demo's
Document = dict[str, object]

HALVES = {"weight": 0.5}
ATTENTION = [{"filter": word, "value": [0.2, 0.6, 0.9]} for word in ("self_attn", "input_layernorm")]
FEED_FORWARD = [{"filter": word, "value": [0.01, 0.5, 0.3]} for word in ("mlp", "post_attention")]
HEAD = [{"filter": word, "value": 0.7} for word in ("lm_head", "model.norm")]
SHAPED = {"weight": [*ATTENTION, *HEAD, {"value": [0.1, 0.8]}]}
FEW = {"weight": 0.6, "density": 0.3}
DENSE = {"weight": SHAPED["weight"], "density": [0.2, 0.9]}
CRUMBS = FEW | {"gamma": 0.05}
# (method, whether base_model is named, parameters of the experts, shared parameters)
CASES: list[tuple[str, bool, list[Document], Document]] = [
    ("linear", False, [{"weight": 1.0}, HALVES, SHAPED], {}),
    ("linear", False, [{"weight": 0.5}, {"weight": 0.2}, {"weight": 0.3}], {"normalize": False}),
    ("slerp", True, [{}], {"t": [*FEED_FORWARD, {"value": 0.4}]}),
    ("slerp", True, [{}], {"t": 0.9}),
    ("nuslerp", False, [{"weight": 1.0}, SHAPED], {}),
    ("nuslerp", True, [HALVES, SHAPED], {}),
    ("nuslerp", True, [HALVES, SHAPED], {"nuslerp_flatten": False}),
    ("nuslerp", False, [HALVES, SHAPED], {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ("multislerp", False, [HALVES, SHAPED, {"weight": 0.3}], {}),
    ("multislerp", True, [HALVES, SHAPED], {}),
    ("multislerp", True, [HALVES, SHAPED], {"normalize_weights": False, "eps": 1e-6}),
    ("karcher", True, [{}, {}], {}),
    ("karcher", False, [{}, {}], {"max_iter": 3, "tol": 1e-9}),
    ("task_arithmetic", True, [SHAPED], {"lambda": 0.7}),
    ("task_arithmetic", True, [HALVES, SHAPED], {"normalize": True, "lambda": [0.5, 1.5]}),
    ("ties", True, [FEW], {}),
    ("ties", True, [FEW, DENSE], {}),
    ("ties", True, [FEW, DENSE], {"normalize": False, "rescale": True, "lambda": 0.8}),
    ("ties", True, [{"weight": -0.5, "density": 0.7}, DENSE], {"int8_mask": True}),
    ("breadcrumbs", True, [CRUMBS], {}),
    ("breadcrumbs", True, [CRUMBS, DENSE], {"rescale": True, "normalize": True}),
    ("breadcrumbs_ties", True, [CRUMBS, DENSE], {}),
    ("breadcrumbs_ties", True, [FEW | {"density": 0.8, "gamma": 0.4}, CRUMBS], {"normalize": True, "lambda": 2}),
    ("dare_linear", True, [{"weight": 0.5, "density": 1.0}, SHAPED], {}),
    ("dare_ties", True, [{"weight": 0.5, "density": 1.0}, SHAPED], {"normalize": True}),
    ("della", True, [{"weight": 0.5, "density": 1.0}, SHAPED], {}),
    ("della_linear", True, [{"weight": 0.5, "density": 1.0}, SHAPED], {"lambda": 0.5}),
    ("sce", True, [{}, {}], {}),
    ("sce", True, [{}, {}], {"select_topk": [0.3, 0.9]}),
    ("ram", True, [{}, {}], {}),
    ("ram", True, [{}, {}], {"epsilon": 1e-3}),
    ("ramplus_tl", True, [{}, {}], {"epsilon": 1e-3}),
    ("ramplus_tl", True, [{}, {}], {"epsilon": 3e-3, "r": 0.5, "alpha": 4.0}),
    ("model_stock", True, [{}, {}], {}),
    ("model_stock", True, [{}, {}], {"filter_wise": True}),
    ("nearswap", True, [{}], {"t": [*FEED_FORWARD, {"value": 1e-4}]}),
    ("arcee_fusion", True, [{}], {}),
    ("passthrough", False, [{"scale": [*ATTENTION, {"value": [1.0, 0.9]}]}], {}),
]  # fmt: skip


def document(models: list[Path], case: tuple[str, bool, list[Document], Document]) -> Document:
    """The case on (base, one expert, another expert)."""
    method, named, experts, shared = case
    listed = models[: len(experts)] if not named else models[1 : 1 + len(experts)]
    entries = [{"model": str(m), "parameters": p} for m, p in zip(listed, experts, strict=True)]
    base = {"base_model": str(models[0])} if named else {}
    return {"merge_method": method, **base, "models": entries, "parameters": shared, "dtype": "float32"}


def by_mergekit(document: Document, out: Path) -> dict[str, Tensor]:
    plain = json.loads(json.dumps(document))  # mergekit changes what it is given
    run_merge(MergeConfiguration.model_validate(plain), str(out), MergeOptions(quiet=True, copy_tokenizer=False))
    return {k: v for shard in sorted(out.glob("*.safetensors")) for k, v in load_file(shard).items()}


def opened(document: Document, models: list[Path], base: Path | None = None) -> tuple[Sources, Recipe]:
    """Our sources and recipe; `base` may be the same base in another dtype."""
    names = load_file(models[0] / "model.safetensors").keys()
    recipe = from_mergekit(document, names, base_dtype="float32", expert_names={str(m): m.name for m in models})
    return Sources.open(base or recipe.base, dict(recipe.experts)), recipe


def apart(ours: Tensor, theirs: Tensor) -> Tensor:
    """Differences as shares of the numbers, or of a typical number where that is larger."""
    scale = torch.maximum(theirs.abs(), theirs.abs().mean() + 1e-30)
    return (ours.double() - theirs.double()).abs() / scale


def ident(case: tuple[str, bool, list[Document], Document]) -> str:
    return "-".join([case[0], str(len(case[2])), *case[3]])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pico_models(folder: Path, dtype: str) -> list[Path]:
    base = pico_llama(folder / "base", layers=3, tied=False, dtype=dtype)
    return [base, *(pico_expert(base, folder / name, seed=i) for i, name in enumerate(("law", "code"), 1))]


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return pico_models(tmp_path_factory.mktemp("pico"), "float32")


@pytest.fixture(scope="module")
def pico_bf16(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return pico_models(tmp_path_factory.mktemp("pico-bf16"), "bfloat16")


# Which of equal numbers stay is a choice (below); lengths in float32 are off by up to 1e-5.
SELECTING = ("ties", "breadcrumbs", "breadcrumbs_ties", "sce")
TURNING = ("slerp", "nuslerp", "multislerp", "karcher", "model_stock")
FIRST = [case for i, case in enumerate(CASES) if case[0] not in [c[0] for c in CASES[:i]]]
REAL = [case for case in CASES if case in FIRST or case[3].get("select_topk")]


def in_full(case: tuple[str, bool, list[Document], Document]) -> Document:
    """In what mergekit computes a case, and hands it over."""
    return {"dtype": "float64", "out_dtype": "float64"} if case[0] in TURNING else {"dtype": "float32"}


@pytest.mark.parametrize("case", CASES, ids=ident)
def test_pico_models_merge_as_mergekit_merges_them(
    case: tuple[str, bool, list[Document], Document], pico: list[Path], tmp_path: Path
) -> None:
    wanted = by_mergekit(document(pico, case) | in_full(case), tmp_path / "theirs")
    sources, recipe = opened(document(pico, case), pico)
    assert set(wanted) == set(sources.base.names)
    for name, theirs in wanted.items():
        assert apart(merged_tensor(name, sources, recipe), theirs).max() <= NEAR, name


@pytest.mark.parametrize("case", [case for case in FIRST if case[0] not in SELECTING], ids=ident)
def test_bfloat16_files_merge_as_mergekit_merges_them(
    case: tuple[str, bool, list[Document], Document], pico_bf16: list[Path], tmp_path: Path
) -> None:
    wanted = by_mergekit(document(pico_bf16, case) | in_full(case), tmp_path / "theirs")
    sources, recipe = opened(document(pico_bf16, case), pico_bf16)
    exact = replace(recipe, dtype="float32")
    for name, theirs in wanted.items():
        assert apart(merged_tensor(name, sources, exact), theirs).max() <= NEAR, name
        steps = bits(merged_tensor(name, sources, recipe)) - bits(theirs.bfloat16())
        assert steps.abs().max() <= 1, name


def bits(tensor: Tensor) -> Tensor:
    """Numbers of bfloat16 as whole numbers: neighbours are one apart."""
    return tensor.view(torch.int16).int()


# A float64 formula of the methods that select, for either choice among equal numbers.

Choice = Callable[[Tensor, int, int], Tensor]  # numbers, how many of the largest not, how many then -> their places


def first_in_memory(numbers: Tensor, skipped: int, kept: int) -> Tensor:
    return numbers.argsort(descending=True, stable=True)[skipped : skipped + kept]


def as_torch_sorts(numbers: Tensor, skipped: int, kept: int) -> Tensor:
    return numbers.argsort(descending=True)[skipped : skipped + kept]


def as_torch_sorts_upwards(numbers: Tensor, skipped: int, kept: int) -> Tensor:
    return numbers.argsort().flip(0)[skipped : skipped + kept]


def as_torch_finds_the_largest(numbers: Tensor, skipped: int, kept: int) -> Tensor:
    return numbers.topk(kept).indices


def by_formula(method: str, base: Tensor, experts: list[Tensor], numbers: list[Document], choice: Choice) -> Tensor:
    """What the papers say, in float64; signs are elected and thresholds drawn among float32 numbers.

    Args:
        numbers: of each expert: weight, density and gamma; for sce also select_topk.
    """
    b = base.double().flatten()
    deltas = torch.stack([x.double().flatten() - b for x in experts])
    if method == "sce":
        variance = deltas.float().var(dim=0, unbiased=False)
        kept = int(torch.count_nonzero(variance) * numbers[0]["select_topk"])  # type: ignore[operator]
        deltas *= torch.zeros_like(b).index_fill(0, choice(variance, 0, kept), 1.0)
        weights = deltas.square().mean(1) / deltas.square().mean(1).sum()
        agree = elected(deltas.float())
        parts = agree * weights[:, None]
        return (b + (deltas * parts).sum(0) / parts.sum(0).clamp(min=1e-6)).view_as(base)
    for delta, own in zip(deltas, numbers, strict=True):
        kept = int(float(own["density"]) * len(b))  # type: ignore[arg-type]
        outliers = min(int(float(own.get("gamma", 0.0)) * len(b)), len(b) - kept)  # type: ignore[arg-type]
        places = choice(delta.abs().float(), outliers, max(kept, method == "ties"))
        delta *= torch.zeros_like(b).index_fill(0, places, 1.0)
    weights = torch.tensor([own["weight"] for own in numbers], dtype=torch.float64)[:, None]
    if method == "breadcrumbs":
        return (b + (weights * deltas).sum(0)).view_as(base)
    agree = elected(weights.float() * deltas.float())
    total = (weights * deltas * agree).sum(0)
    if method == "ties":  # divides by the weights of those that agree
        divisor = (weights * agree).sum(0)
        total = total / torch.where(divisor == 0, 1.0, divisor)
    return (b + total).view_as(base)


def elected(deltas: Tensor) -> Tensor:
    """Where each delta has the sign of the sum of all; a sum of 0 counts as +."""
    return deltas.sign() == torch.where(deltas.sum(0) >= 0, 1.0, -1.0)


CHOICES: list[tuple[str, list[Document], Document, Choice]] = [
    ("ties", [FEW, {"weight": 0.4, "density": 0.7}], {}, as_torch_sorts),
    ("breadcrumbs", [CRUMBS, CRUMBS | {"density": 0.5}], {}, as_torch_sorts_upwards),
    ("breadcrumbs_ties", [CRUMBS, CRUMBS | {"density": 0.5}], {}, as_torch_sorts_upwards),
    ("sce", [{}, {}], {"select_topk": 0.3}, as_torch_finds_the_largest),
]


@pytest.mark.parametrize(("method", "numbers", "shared", "theirs"), CHOICES, ids=[row[0] for row in CHOICES])
def test_of_equal_numbers_the_choice_alone_differs(
    method: str,
    numbers: list[Document],
    shared: Document,
    theirs: Choice,
    pico_bf16: list[Path],
    tmp_path: Path,
) -> None:
    asked = document(pico_bf16, (method, True, numbers, shared))
    found = by_mergekit(asked, tmp_path / "theirs")
    sources, recipe = opened(asked, pico_bf16)
    tensors = [load_file(folder / "model.safetensors") for folder in pico_bf16]
    apart_before, own = 0, [shared | one for one in numbers]
    for name, theirs_merged in found.items():
        base, *experts = (model[name] for model in tensors)
        ours = merged_tensor(name, sources, replace(recipe, dtype="float32"))
        assert apart(by_formula(method, base, experts, own, first_in_memory), ours).max() <= NEAR, name
        assert apart(by_formula(method, base, experts, own, theirs), theirs_merged).max() <= NEAR, name
        apart_before += int((apart(ours, theirs_merged) > NEAR).sum())
    assert apart_before > 0  # or else nothing was chosen


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One layer and some rows of the demo's base and expert as float32, and a second expert: the first's delta turned.

    Experts are moved a little, so that few magnitudes are equal: which of them mergekit keeps is not defined.
    """
    if not all((DEMO / name / "model.safetensors").is_file() for name in ("base", "expert")):
        pytest.skip("the demo's models are not built")
    folder = tmp_path_factory.mktemp("real")
    config = json.loads((DEMO / "base/config.json").read_text())
    config |= {"num_hidden_layers": 1, "vocab_size": ROWS, "intermediate_size": ROWS, "dtype": "float32"}
    base, expert = (_cut(DEMO / name / "model.safetensors") for name in ("base", "expert"))
    generator = torch.Generator().manual_seed(0)
    moved = {k: x * (1 + 1e-4 * torch.randn(x.shape, generator=generator)) for k, x in expert.items()}
    turned = {k: base[k] + (moved[k] - base[k]).roll(7, -1) for k in base}
    for name, tensors in (("base", base), ("law", moved), ("code", turned)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
    return [folder / name for name in ("base", "law", "code")]


def _cut(file: Path) -> dict[str, Tensor]:
    rows, columns = ("embed", "gate_proj", "up_proj"), ("down_proj",)
    with safe_open(file, "pt") as tensors:
        names = [name for name in tensors.keys() if ".layers." not in name or ".layers.0." in name]  # noqa: SIM118
        found = {name: tensors.get_tensor(name).float() for name in names}
    found |= {name: x[:ROWS] for name, x in found.items() if any(word in name for word in rows)}
    found |= {name: x[:, :ROWS] for name, x in found.items() if any(word in name for word in columns)}
    return {name: x.contiguous() for name, x in found.items()}


@pytest.mark.parametrize("case", REAL, ids=ident)
def test_real_tensors_merge_as_mergekit_merges_them(
    case: tuple[str, bool, list[Document], Document], real: list[Path], tmp_path: Path
) -> None:
    wanted = by_mergekit(document(real, case) | in_full(case), tmp_path / "theirs")
    sources, recipe = opened(document(real, case), real)
    for name, theirs in wanted.items():
        ours = merged_tensor(name, sources, recipe)
        far = int((apart(ours, theirs) > 1e-6).sum())
        assert far <= (16 if case[0] in SELECTING else 0), name


@pytest.mark.parametrize("case", [case for case in REAL if case[0] not in SELECTING], ids=ident)
def test_bfloat16_is_at_most_one_rounding_apart(
    case: tuple[str, bool, list[Document], Document], real: list[Path], tmp_path: Path
) -> None:
    wanted = by_mergekit(document(real, case) | {"out_dtype": "bfloat16"}, tmp_path / "theirs")
    rounded = tmp_path / "base"
    shutil.copytree(real[0], rounded)
    tensors = {name: x.bfloat16() for name, x in load_file(rounded / "model.safetensors").items()}  # exact: they were
    save_file(tensors, rounded / "model.safetensors", metadata={"format": "pt"})
    recipe = opened(document(real, case) | {"out_dtype": "bfloat16"}, real)[1]
    sources = Sources.open(rounded, dict(recipe.experts))
    for name, theirs in wanted.items():
        ours = merged_tensor(name, sources, recipe)
        steps = (bits(ours) - bits(theirs)).abs()
        near_zero = apart(ours, theirs) <= 1e-6  # numbers that all but cancel have steps smaller than float32's errors
        assert ((steps <= 1) | near_zero).all(), name
        assert (steps != 0).double().mean() < 2e-3, name


def test_every_method_is_compared() -> None:
    assert {case[0] for case in CASES} == METHODS.keys()
