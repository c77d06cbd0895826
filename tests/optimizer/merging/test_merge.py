"""Laws of the merge: where it starts, where it ends, and that it remembers nothing."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from evals import memory
from optimizer.checkpoints.checkpoint import Checkpoint
from optimizer.checkpoints.opening import open_checkpoint
from optimizer.checkpoints.tensor_file import INDEX_FILE
from optimizer.errors import CheckpointError, MergeError
from optimizer.merging import merge
from optimizer.merging.merge import (
    DEVICE_ROOM,
    MergeCache,
    Sources,
    fits,
    free_bytes,
    merge_into,
    merge_to_folder,
    merged_tensor,
)
from search_spaces import METHODS, Recipe, Setting
from tests.pico import pico_expert, pico_llama

SEARCHED = [method for method, spec in METHODS.items() if not spec.unsearchable]
REACHING = [method for method in SEARCHED if not method.startswith("ram")]  # the RAMs drop the smallest changes
MANY = [method for method, spec in METHODS.items() if spec.max_experts != 1]
CONSENSUS = ["ties", "dare_ties", "della", "breadcrumbs_ties"]
PRUNING = [method for method, spec in METHODS.items() if spec.parameter("density")]
VARIANTS = [(tied, dtype) for tied in (True, False) for dtype in ("bfloat16", "float32")]
NAMES = ("law", "clinic")


@pytest.fixture(scope="module", params=VARIANTS, ids=[f"{'tied' if t else 'untied'}-{d}" for t, d in VARIANTS])
def sources(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sources:
    folder = tmp_path_factory.mktemp("models")
    tied, dtype = request.param
    base = pico_llama(folder / "base", tied=tied, dtype=dtype)
    experts = {name: str(pico_expert(base, folder / name, seed=i)) for i, name in enumerate(NAMES, 1)}
    return Sources.open(base, experts)


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    folder = tmp_path_factory.mktemp("pico")
    base = pico_llama(folder / "base")
    return Sources.open(base, {name: str(pico_expert(base, folder / name, seed=i)) for i, name in enumerate(NAMES, 1)})


def recipe(method: str, *values: tuple[str, str, float], experts: tuple[str, ...] = NAMES[:1]) -> Recipe:
    settings = tuple(Setting(parameter, expert, "", value) for parameter, expert, value in values)
    return Recipe(method, "base", tuple((name, name) for name in experts), settings)


def resident(checkpoint: Checkpoint) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype="auto")
    return model, dict(model.named_parameters())


def all_merged(sources: Sources, recipe: Recipe) -> dict[str, Tensor]:
    return {name: merged_tensor(name, sources, recipe) for name in sources.base.names}


def same_bits(one: Tensor, other: Tensor) -> bool:
    width = {2: torch.int16, 4: torch.int32}[one.element_size()]
    return one.dtype == other.dtype and torch.equal(one.contiguous().view(width), other.contiguous().view(width))


def assert_same(tensors: dict[str, Tensor], checkpoint: Checkpoint | dict[str, Tensor]) -> None:
    wanted = {n: checkpoint.tensor(n) for n in checkpoint.names} if isinstance(checkpoint, Checkpoint) else checkpoint
    assert tensors.keys() == wanted.keys()
    assert [name for name in wanted if not same_bits(tensors[name], wanted[name])] == []


def few(method: str) -> tuple[str, ...]:
    """As few experts as the method takes."""
    return NAMES[: max(1, METHODS[method].min_experts)]


@pytest.mark.parametrize("method", SEARCHED)
def test_weight_zero_is_the_base_bit_for_bit(method: str, sources: Sources) -> None:
    zero = recipe(method, (METHODS[method].scale, "", 0.0), experts=few(method))
    assert_same(all_merged(sources, zero), sources.base)


@pytest.mark.parametrize("method", [method for method in REACHING if METHODS[method].min_experts == 1])
def test_weight_one_of_a_whole_delta_is_the_expert_bit_for_bit(method: str, sources: Sources) -> None:
    assert_same(all_merged(sources, recipe(method)), sources.experts[NAMES[0]])


@pytest.mark.parametrize("method", ["ram", "ramplus_tl"])
def test_weight_one_of_a_ram_is_the_expert_up_to_epsilon(method: str, sources: Sources) -> None:
    for name, tensor in all_merged(sources, recipe(method, ("epsilon", "", 1e-3))).items():
        change = tensor.float() - sources.experts[NAMES[0]].tensor(name).float()
        assert change.abs().max() <= 1.01e-3


@pytest.mark.parametrize("method", [method for method in REACHING if method in MANY])
def test_a_weight_of_zero_leaves_an_expert_out(method: str, sources: Sources) -> None:
    weights = (("weight", NAMES[0], 1.0), ("weight", NAMES[1], 0.0))
    assert_same(all_merged(sources, recipe(method, *weights, experts=NAMES)), sources.experts[NAMES[0]])


@pytest.mark.slow
@pytest.mark.parametrize("method", MANY)
def test_experts_may_be_permuted(method: str, sources: Sources) -> None:
    weights = [("weight", NAMES[0], 0.3), ("weight", NAMES[1], 0.6)]
    if METHODS[method].parameter("density"):
        weights += [("density", NAMES[0], 0.5), ("density", NAMES[1], 0.8)]
    one, other = (recipe(method, *weights, experts=names) for names in (NAMES, NAMES[::-1]))
    turned = Sources(sources.base, dict(reversed(sources.experts.items())))
    assert_same(all_merged(sources, one), all_merged(turned, other))


@pytest.mark.parametrize("method", PRUNING)
def test_density_one_prunes_nothing(method: str, sources: Sources) -> None:
    plain = recipe(method, ("weight", "", 0.4), ("normalize", "", 0.0))
    assert_same(all_merged(sources, plain), all_merged(sources, recipe("task_arithmetic", ("weight", "", 0.4))))
    pruned = all_merged(sources, recipe(method, ("weight", "", 0.4), ("density", "", 0.5), ("normalize", "", 0.0)))
    assert any(not same_bits(pruned[name], merged_tensor(name, sources, plain)) for name in pruned)


def test_linear_is_task_arithmetic_with_the_base_taking_the_rest(sources: Sources) -> None:
    weights = (("weight", NAMES[0], 0.2), ("weight", NAMES[1], 0.5))
    one, other = (recipe(method, *weights, experts=NAMES) for method in ("linear", "task_arithmetic"))
    assert_same(all_merged(sources, one), all_merged(sources, other))
    name = "model.layers.0.mlp.up_proj.weight"
    law, clinic = (sources.experts[n].tensor(name).double() for n in NAMES)
    wanted = 0.3 * sources.base.tensor(name).double() + 0.2 * law + 0.5 * clinic
    step = 2**-8 if sources.base.dtype(name) == torch.bfloat16 else 2**-22
    assert torch.allclose(merged_tensor(name, sources, one).double(), wanted, rtol=step, atol=1e-7)


@pytest.mark.parametrize(
    ("of_base", "of_expert"), [("bfloat16", "float32"), ("float32", "float16"), ("float16", "bfloat16")]
)
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "slerp", "dare_ties"])
def test_an_expert_may_be_stored_in_another_type(of_base: str, of_expert: str, method: str, tmp_path: Path) -> None:
    base = pico_llama(tmp_path / "base", dtype=of_base)
    expert = pico_expert(base, tmp_path / "law", scale=0.1)
    tensors = load_file(expert / "model.safetensors")
    stored = {name: tensor.to(getattr(torch, of_expert)) for name, tensor in tensors.items()}
    save_file(stored, expert / "model.safetensors", metadata={"format": "pt"})
    mixed = Sources.open(base, {"law": str(expert)})
    chosen = recipe(method, (METHODS[method].scale, "", 0.37), experts=("law",))
    same = pico_llama(tmp_path / "same", dtype=of_base)
    wide = {name: tensor.to(torch.float32) for name, tensor in stored.items()}
    save_file(wide, expert / "model.safetensors", metadata={"format": "pt"})
    as_float32 = Sources.open(same, {"law": str(expert)})
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        merged = merged_tensor(name, mixed, chosen)
        assert merged.dtype == getattr(torch, of_base)
        assert same_bits(merged, merged_tensor(name, as_float32, chosen))


@pytest.mark.parametrize("weights", [(0.2, 0.5), (0.4, 0.0), (0.0, 0.0)])
def test_shares_of_a_linear_merge_may_add_up_to_another_sum(weights: tuple[float, float], sources: Sources) -> None:
    given = [("weight", name, weight) for name, weight in zip(NAMES, weights, strict=True)]
    scaled = recipe("linear", *given, ("sum", "", 1.25), experts=NAMES)
    for name in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        experts = [w * sources.experts[n].tensor(name).double() for n, w in zip(NAMES, weights, strict=True)]
        wanted = (1.25 - sum(weights)) * sources.base.tensor(name).double() + sum(experts)
        step = 2**-8 if sources.base.dtype(name) == torch.bfloat16 else 2**-22
        assert torch.allclose(merged_tensor(name, sources, scaled).double(), wanted, rtol=step, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_in_place_equals_out_of_place_and_keeps_the_tie(method: str, sources: Sources) -> None:
    model, parameters = resident(sources.base)
    places = {name: parameter.data_ptr() for name, parameter in parameters.items()}
    changed = recipe(method, (METHODS[method].scale, "", 0.37), experts=few(method))
    merge_into(parameters, sources, changed)
    assert_same({n: p.detach() for n, p in parameters.items()}, all_merged(sources, changed))
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == places


def test_a_tied_head_may_be_listed_beside_its_embeddings(pico: Sources) -> None:
    model, parameters = resident(pico.base)
    merge_into(model.state_dict(), pico, recipe("linear"))
    assert_same({n: p.detach() for n, p in parameters.items()}, pico.experts[NAMES[0]])


def test_a_parameter_that_blocks_cannot_be_written_to_is_copied_into(pico: Sources) -> None:
    turned = {
        n: torch.zeros(pico.base.shape(n)[::-1]).to(pico.base.dtype(n)).mT for n in pico.base.names if "proj" in n
    }
    plain = {n: torch.zeros(pico.base.shape(n), dtype=pico.base.dtype(n)) for n in pico.base.names}
    mixed = recipe("ties", ("weight", "", 0.4), ("density", "", 0.5))
    merge_into({**plain, **turned}, pico, mixed)
    assert_same({**plain, **turned}, all_merged(pico, mixed))


@pytest.mark.slow
def test_after_a_thousand_merges_a_model_has_no_memory_of_them(pico: Sources) -> None:
    _, parameters = resident(pico.base)
    peaks, cache = [], MergeCache()
    for i in range(1000):
        method = list(METHODS)[i % len(METHODS)]
        merge_into(parameters, pico, recipe(method, (METHODS[method].scale, "", i / 999), experts=few(method)), cache)
        if i in (200, 999):
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    last = recipe("dare_ties", ("weight", "", 0.7), ("density", "", 0.5))
    merge_into(parameters, pico, last, cache)
    fresh = Sources.open(pico.base.folder, {name: pico.experts[name].source for name in NAMES})
    assert_same({n: p.detach() for n, p in parameters.items()}, all_merged(fresh, last))
    assert peaks[1] - peaks[0] <= 1024  # KiB


def test_a_torn_merge_is_forgotten(pico: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    _, parameters = resident(pico.base)
    read, calls = Checkpoint.tensor, []

    def torn(self: Checkpoint, name: str) -> Tensor:
        calls.append(name)
        if len(calls) == 15:
            raise MemoryError
        return read(self, name)

    monkeypatch.setattr(Checkpoint, "tensor", torn)
    with pytest.raises(MemoryError):
        merge_into(parameters, pico, recipe("linear"))
    monkeypatch.undo()
    merge_into(parameters, pico, recipe("linear", ("weight", "", 0.0)))
    assert_same({n: p.detach() for n, p in parameters.items()}, pico.base)


def pruned(method: str, number: float = 0.5) -> Recipe:
    """A recipe in which every number of the method does something."""
    spec = METHODS[method]
    numbers = {spec.scale: number, "density": 0.3 + number / 10, "gamma": 0.02, "select_topk": 0.5, "t": number}
    values = [(name, "", value) for name, value in numbers.items() if spec.parameter(name)]
    return recipe(method, *values, experts=NAMES[: 1 if spec.max_experts == 1 else 2])


@pytest.mark.parametrize("method", METHODS)
def test_facts_and_the_order_of_candidates_change_nothing(method: str, sources: Sources) -> None:
    cache = MergeCache()
    _, parameters = resident(sources.base)
    for number in (0.5, 0.2, 0.5):
        merge_into(parameters, sources, pruned(method, number), cache)
        assert_same({n: p.detach() for n, p in parameters.items()}, all_merged(sources, pruned(method, number)))


@pytest.mark.parametrize("method", METHODS)
def test_the_same_recipe_gives_the_same_bytes(method: str, pico: Sources) -> None:
    one = all_merged(pico, pruned(method))
    torch.manual_seed(1)
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if threads == 1 else 1)
    try:
        assert_same(all_merged(pico, pruned(method)), one)
    finally:
        torch.set_num_threads(threads)


def test_random_masks_differ_between_recipes_tensors_and_experts() -> None:
    seeds = {merge._seed(d, t, e) for d in ("a", "b") for t in ("x", "y") for e in NAMES}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_group_may_have_a_number_of_its_own(pico: Sources) -> None:
    own = Recipe(
        "linear",
        "base",
        ((NAMES[0], ""),),
        (Setting("weight", "", "", 0.0), Setting("weight", NAMES[0], "layer.01.mlp", 1.0)),
    )
    merged = all_merged(pico, own)
    for name, tensor in merged.items():
        source = pico.experts[NAMES[0]] if name.startswith("model.layers.1.") and "attn" not in name else pico.base
        if "layernorm" not in name:
            assert same_bits(tensor, source.tensor(name)), name


@pytest.fixture(scope="module")
def distant(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """Experts so far from the base that a huge weight overflows."""
    folder = tmp_path_factory.mktemp("distant")
    base = pico_llama(folder / "base")
    experts = {name: str(pico_expert(base, folder / name, seed=i, scale=9.0)) for i, name in enumerate(NAMES, 1)}
    return Sources.open(base, experts)


@pytest.mark.parametrize("experts", [NAMES[:1], NAMES])
def test_a_merge_that_overflows_names_the_tensor(experts: tuple[str, ...], distant: Sources) -> None:
    _, parameters = resident(distant.base)
    with pytest.raises(
        MergeError, match=r"must be finite: recipe \w+ gives \d+ NaN or infinite values in model\.embed"
    ):
        merge_into(parameters, distant, recipe("task_arithmetic", ("weight", "", 3e38), experts=experts))


def test_a_weight_beyond_float32_is_refused(pico: Sources) -> None:
    with pytest.raises(MergeError, match=r"weight 1e\+39 in layer\.00\.mlp"):
        merged_tensor("model.layers.0.mlp.up_proj.weight", pico, recipe("linear", ("weight", "", 1e39)))


@pytest.mark.parametrize(("spoilt", "weights"), [("law", (0.5, 1.0)), ("base", (0.5, 0.0))])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_source_that_is_not_finite_does_not_pass_the_merge_at_any_weight(
    pico: Sources, tmp_path: Path, spoilt: str, weights: tuple[float, ...], value: float
) -> None:
    folders = {name: pico_expert(pico.base.folder, tmp_path / name, scale=0.1) for name in ("base", "law")}
    tensors = load_file(folders[spoilt] / "model.safetensors")
    tensors["model.norm.weight"][3] = value
    save_file(tensors, folders[spoilt] / "model.safetensors", metadata={"format": "pt"})
    sources, cache = Sources.open(folders["base"], {"law": str(folders["law"])}), MergeCache()
    _, parameters = resident(pico.base)
    for weight in (*weights, *weights):  # again, with what the first merges left
        with pytest.raises(MergeError, match=r"1 NaN or infinite values in model\.norm\.weight"):
            merge_into(parameters, sources, recipe("linear", ("weight", "", weight)), cache)
    other = 1.0 - weights[1]
    merge_into(parameters, sources, recipe("linear", ("weight", "", other)), cache)  # takes nothing of the spoilt one


def test_a_large_finite_sum_is_not_taken_for_an_infinity() -> None:
    assert merge.count_nonfinite(torch.full((4,), 3e38)) == 0
    assert merge.count_nonfinite(torch.full((4,), 6e4, dtype=torch.float16)) == 0
    assert merge.count_nonfinite(torch.tensor([float("inf"), float("-inf"), 1.0])) == 2


def test_a_model_that_does_not_fit_is_refused_before_anything_is_written(pico: Sources) -> None:
    _, parameters = resident(pico.base)
    name = "model.norm.weight"
    for broken, words in [
        ({n: p for n, p in parameters.items() if n != name}, f"lacks 1, first {name}"),
        ({**parameters, "model.extra": torch.zeros(3)}, "model.extra is in the model but not in"),
        ({**parameters, name: torch.zeros(3)}, r"\(3,\)"),
        ({**parameters, name: parameters[name].float()}, "float32"),
    ]:
        with pytest.raises(MergeError, match=words):
            merge_into(broken, pico, recipe("linear"))
    assert_same({n: p.detach() for n, p in parameters.items()}, pico.base)


def test_an_expert_the_recipe_needs_must_be_given(pico: Sources) -> None:
    with pytest.raises(MergeError, match="needs expert 'tax'"):
        merged_tensor("model.norm.weight", pico, recipe("linear", experts=("tax",)))


def test_an_expert_whose_folder_is_gone_is_named_with_it(pico: Sources, tmp_path: Path) -> None:
    lost = Recipe("linear", "base", (("tax", str(tmp_path / "gone")),), ())
    with pytest.raises(MergeError, match=r"needs expert 'tax'.*no folder .*gone: restore it, or .*derive"):
        merged_tensor("model.norm.weight", pico, lost)


def test_experts_are_checked_against_the_base_when_sources_are_opened(pico: Sources, tmp_path: Path) -> None:
    deeper = pico_llama(tmp_path / "deeper", layers=3)
    with pytest.raises(CheckpointError, match="num_hidden_layers is 2 in the base and 3 in the expert"):
        Sources.open(pico.base.folder, {"deeper": str(deeper)})


def test_dtypes_may_differ_and_the_base_decides(pico: Sources, tmp_path: Path) -> None:
    wide = pico_expert(pico_llama(tmp_path / "base", dtype="float32"), tmp_path / "wide")
    sources = Sources.open(pico.base.folder, {NAMES[0]: str(wide)})
    merged = all_merged(sources, recipe("linear"))
    assert_same(merged, {name: sources.experts[NAMES[0]].tensor(name).bfloat16() for name in merged})


# Folders


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 30_000, 1])
def test_a_written_folder_holds_the_merge(shard_bytes: int, sources: Sources, tmp_path: Path) -> None:
    mixed = recipe("ties", ("weight", "", 0.6), ("density", "", 0.5), experts=NAMES)
    merge_to_folder(sources, mixed, tmp_path / "out", shard_bytes=shard_bytes)
    (tmp_path / "out/config.json").write_bytes((sources.base.folder / "config.json").read_bytes())
    assert (tmp_path / "out" / INDEX_FILE).exists() == (shard_bytes < 5_000_000_000)
    written = open_checkpoint(tmp_path / "out")
    assert_same(all_merged(sources, mixed), written)
    _, parameters = resident(written)
    assert_same({n: p.detach() for n, p in parameters.items()}, written)


def test_shards_stay_below_their_limit_unless_one_tensor_does_not(pico: Sources, tmp_path: Path) -> None:
    merge_to_folder(pico, recipe("linear"), tmp_path / "out", shard_bytes=9000)
    weight_map = json.loads((tmp_path / "out" / INDEX_FILE).read_text())["weight_map"]
    for shard in set(weight_map.values()):
        inside = [name for name in weight_map if weight_map[name] == shard]
        assert sum(pico.base.size(name) for name in inside) <= 9000 or len(inside) == 1


def test_a_failed_export_leaves_nothing(distant: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(MergeError, match="must be finite"):
        merge_to_folder(distant, recipe("linear", ("weight", "", 3e38)), tmp_path / "out")
    monkeypatch.setattr(merge, "write_sharded", full)
    with pytest.raises(MergeError, match="No space left on device"):
        merge_to_folder(distant, recipe("linear"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_never_overwritten(pico: Sources, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(MergeError, match="exists"):
        merge_to_folder(pico, recipe("linear"), tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []


# Devices


def test_a_device_keeps_what_leaves_it_room() -> None:
    assert fits(1, DEVICE_ROOM + 1)
    assert not fits(2, DEVICE_ROOM + 1)
    assert free_bytes(torch.device("cpu")) == 0


@pytest.mark.parametrize("free", [0, 1 << 50])
def test_sources_stay_on_a_device_where_they_fit(free: int, pico: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "free_bytes", lambda device: free)
    cache, device = MergeCache(), torch.device("meta")
    for expert in ("", NAMES[0]):
        for name in pico.base.names:
            first = cache.tensor(pico, expert, name, device)
            assert (first.device, first.shape) == (device, pico.base.shape(name))
            assert (cache.tensor(pico, expert, name, device) is first) == (free > 0)
    assert len(cache.copies) == (2 * len(pico.base.names) if free else 0)
    assert cache.tensor(pico, "", pico.base.names[0], torch.device("cpu")).device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("free", [0, 1 << 50])
def test_sources_that_do_not_fit_a_cuda_device_are_pinned(
    free: int, pico: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "free_bytes", lambda device: 0)
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    cache, device, name = MergeCache(), torch.device("cuda"), pico.base.names[0]
    for _ in range(2):
        found = cache.tensor(pico, "", name, device)
        assert found.is_cuda
        assert torch.equal(found.cpu(), pico.base.tensor(name))
    assert [copy.is_pinned() for copy in cache.copies.values()] == ([True] if free else [])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("method", METHODS)
def test_a_cuda_device_merges_as_the_cpu_does(method: str, sources: Sources) -> None:
    parameters = {name: sources.base.tensor(name).cuda() for name in sources.base.names}
    cache = MergeCache()
    for number in (0.5, 0.2):
        merge_into(parameters, sources, pruned(method, number), cache)
        for name, wanted in all_merged(sources, pruned(method, number)).items():
            ours, theirs = parameters[name].cpu().float(), wanted.float()
            step = 2**-7 if wanted.dtype == torch.bfloat16 else 1e-5
            far = (ours - theirs).abs() > step * theirs.abs() + 1e-6
            assert far.float().mean() <= 0.002, (name, number)  # equal importance may fall on either side
