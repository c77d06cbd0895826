"""Our merges against mergekit's own, method by method: the same document, read by both.

On pico models with gradients and filters, and on real tensors where the demo's models have been built.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
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

from optimizer.merge import Sources, merged_tensor
from search_spaces import METHODS, Recipe
from search_spaces.mergekit import from_mergekit
from tests.pico import pico_expert, pico_llama

pytestmark = pytest.mark.filterwarnings("ignore")

DEMO = Path(__file__).parents[2] / "runs/demo-inputs"
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


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pico")
    base = pico_llama(folder / "base", layers=3, tied=False, dtype="float32")
    return [base, *(pico_expert(base, folder / name, seed=i) for i, name in enumerate(("law", "code"), 1))]


@pytest.mark.parametrize("case", CASES, ids=ident)
def test_pico_models_merge_as_mergekit_merges_them(
    case: tuple[str, bool, list[Document], Document], pico: list[Path], tmp_path: Path
) -> None:
    wanted = by_mergekit(document(pico, case), tmp_path / "theirs")
    sources, recipe = opened(document(pico, case), pico)
    assert set(wanted) == set(sources.base.names)
    for name, theirs in wanted.items():
        assert apart(merged_tensor(name, sources, recipe), theirs).max() <= 1e-6, name


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


# Of equal numbers at a threshold mergekit keeps any, we the first: a few elements of a tensor may change places.
SELECTING = ("ties", "breadcrumbs", "breadcrumbs_ties", "sce")
TURNING = ("slerp", "nuslerp", "multislerp", "karcher", "model_stock")  # lengths in float32 are off by 1e-5 there
REAL = [case for i, case in enumerate(CASES) if case[0] not in [c[0] for c in CASES[:i]] or case[3].get("select_topk")]


@pytest.mark.parametrize("case", REAL, ids=ident)
def test_real_tensors_merge_as_mergekit_merges_them(
    case: tuple[str, bool, list[Document], Document], real: list[Path], tmp_path: Path
) -> None:
    exact = {"dtype": "float64", "out_dtype": "float64"} if case[0] in TURNING else {}
    wanted = by_mergekit(document(real, case) | exact, tmp_path / "theirs")
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
        steps = (ours.view(torch.int16).int() - theirs.view(torch.int16).int()).abs()
        near_zero = apart(ours, theirs) <= 1e-6  # numbers that all but cancel have steps smaller than float32's errors
        assert ((steps <= 1) | near_zero).all(), name
        assert (steps != 0).double().mean() < 2e-3, name


def test_every_method_is_compared() -> None:
    assert {case[0] for case in CASES} == METHODS.keys()
