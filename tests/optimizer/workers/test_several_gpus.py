"""A model over several GPUs: on devices that are not there (`tests.two_devices`), and on two real ones if there are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention

from evals import memory, trie_attention
from evals.engine import Engine
from evals.losses import pairs_of
from evals.outcomes import Chat, TaskSpec
from evals.tokens import Pair
from optimizer.checkpoints import devices as module
from optimizer.checkpoints.devices import Spread, devices_of
from optimizer.checkpoints.opening import open_checkpoint
from optimizer.checkpoints.resident import resident_model, tensor_places
from optimizer.errors import CheckpointError, WorkerError
from optimizer.merging import merge
from optimizer.merging.gradients import LEARNABLE, weight_gradients
from optimizer.merging.merge import Sources
from optimizer.workers.orders import Derivation, Form, Lesson, Loss
from optimizer.workers.worker import Worker, WorkerSpec
from search_spaces import METHODS, Recipe, Setting
from tests.optimizer.checkpoints.test_families import FAMILIES, base_and_expert
from tests.optimizer.workers.test_worker import ITEMS, KINDS, write_task
from tests.pico import byte_tokenizer, pico_expert, pico_llama
from tests.two_devices import MixedDevicesError, PretendedDevices

PLENTY = 1 << 40  # bytes free on a device that is not there


@pytest.fixture(scope="module", params=["tied", pytest.param("a head of its own", marks=pytest.mark.slow)])
def spec(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> WorkerSpec:
    """Three layers, two experts, a task of every kind."""
    folder = tmp_path_factory.mktemp("spread")
    base = pico_llama(folder / "base", layers=3, tied=request.param == "tied")
    experts = [pico_expert(base, folder / f"expert{seed}", seed=seed, scale=0.2) for seed in (1, 2)]
    tasks = []
    for kind, settings in KINDS.items():
        path = write_task(folder, kind)
        head = path.read_text().split("output_type")[0]
        path.write_text(f"{head}output_type: {kind}\ndoc_to_text: '{{{{q}}}}'\n{settings}")
        role = "domain" if kind == "multiple_choice" else "general"
        tasks.append(TaskSpec(str(path), role, search_items=ITEMS, holdout_items=ITEMS))
    return WorkerSpec(
        base=str(base),
        experts=(("e", str(experts[0])), ("f", str(experts[1]))),
        tasks=tuple(tasks),
        chat=Chat(),
        allow_task_code=False,
        token_budget=48,  # several passes, so that keys and values are carried from one to the next
        dtype="auto",
        device="auto",
        threads=1,
        seed=0,
    )


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, *, block_mask: BlockMask, scale: float, **_: Any
) -> Tensor:
    """Compute what FlexAttention does, which is compiled for a GPU; what it is given lies where the layer does."""
    assert block_mask.kv_indices.device == query.device
    nodes, places = (torch.arange(n, device=query.device) for n in (query.shape[2], key.shape[2]))
    reads = block_mask.mask_mod(nodes, nodes, nodes[:, None], places[None, :])
    return scaled_dot_product_attention(query, key, value, attn_mask=reads, scale=scale, enable_gqa=True)


@contextmanager
def two_gpus(devices: PretendedDevices) -> Iterator[pytest.MonkeyPatch]:
    """Have torch see two GPUs that are not there."""

    alike = {"default": lambda tensor: (tensor.shape, tensor.dtype)}  # and not devices, of which half is seen
    with pytest.MonkeyPatch.context() as patch, devices:
        patch.setattr(module, "gpus_seen", lambda: 2)
        patch.setattr(module, "require_mps", lambda: None)
        patch.setattr("torch.cuda.get_device_capability", lambda device=None: (7, 0))  # transformers asks for mixtures
        patch.setattr(merge, "free_bytes", lambda device: PLENTY)
        patch.setattr(memory, "free_bytes", lambda device: PLENTY)
        patch.setattr(trie_attention, "_flex_attention", lambda: plain_attention)
        patch.setattr("torch.utils.checkpoint._allowed_determinism_checks_to_fns", alike)
        yield patch


@dataclass(frozen=True)
class Three:
    """Workers whose model lies on one device, is spread over two, and lies on one without float64."""

    one: Worker
    two: Worker
    without: Worker
    devices: PretendedDevices


@pytest.fixture(scope="module")
def three(spec: WorkerSpec) -> Three:
    devices = PretendedDevices()
    with two_gpus(devices):
        without = replace(
            spec, device="mps", tasks=spec.tasks[:-1]
        )  # transformers writes answers by events of a device
        return Three(Worker(spec), Worker(replace(spec, gpus=2)), Worker(without), devices)


@pytest.fixture
def patch(three: Three) -> Iterator[pytest.MonkeyPatch]:
    with two_gpus(three.devices) as patch:
        yield patch


def recipe(method: str, weight: float) -> str:
    known, names = METHODS[method], ("e", "f")[: METHODS[method].max_experts]
    scale = known.parameter(known.scale)
    settings = [Setting(known.scale, names[0] if scale.scope == "expert" else "", "", weight)]
    settings += [Setting(known.scale, name, "", 0.2) for name in names[1:] if scale.scope == "expert"]
    settings += [Setting("density", "", "", 0.5)] if known.parameter("density") else []
    settings += [Setting("normalize", "", "", 0.0)] if known.parameter("normalize") else []
    return Recipe(method, "elsewhere", tuple((name, "elsewhere") for name in names), tuple(settings)).to_json()


def lesson(method: str, loss: Loss, steps: int = 3) -> Lesson:
    return Lesson(recipe(method, 0.5), (("e", 0.3), ("f", 0.3)), "tensor", steps, (-1.0, 2.0), 0, loss)


SEARCHED = [name for name, spec in METHODS.items() if not spec.unsearchable]
QUICK = ("task_arithmetic", "slerp", "dare_ties")  # the others take seconds
BY_METHOD = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SEARCHED]


def test_the_layers_lie_on_both_devices_and_all_else_on_the_first(three: Three, patch: pytest.MonkeyPatch) -> None:
    model = three.two.engine.model
    layers = [layer.mlp.up_proj.weight.device.index for layer in model.model.layers]
    assert layers == sorted(layers)
    assert set(layers) == {0, 1}
    outside = [parameter.device for name, parameter in model.named_parameters() if ".layers." not in name]
    assert {*outside, model.device} == {torch.device("cuda", 0)}
    assert three.two.engine.packs
    assert three.two.engine.flexes
    assert memory.layers_by_device(model) == Counter(torch.device("cuda", i) for i in layers)


@pytest.mark.parametrize("method", BY_METHOD)
def test_a_spread_model_scores_bit_for_bit_as_on_one_device(
    method: str, three: Three, patch: pytest.MonkeyPatch
) -> None:
    for weight in (0.6, 0.0):
        before, asked = three.devices.moves, recipe(method, weight)
        found = three.two.evaluate(asked, "search").outcomes
        assert three.devices.moves > before
        assert found == three.one.evaluate(asked, "search").outcomes
        for name, tensor in three.one._parameters.items():
            assert torch.equal(tensor.cpu(), three.two._parameters[name].cpu())


@pytest.mark.parametrize("loss", ["labels", "teachers"])
@pytest.mark.parametrize("recomputes", [False, True])
def test_a_spread_model_learns_bit_for_bit_as_on_one_device(
    loss: Loss, recomputes: bool, three: Three, patch: pytest.MonkeyPatch
) -> None:
    patch.setattr(memory, "free_bytes", lambda device: 0 if recomputes else PLENTY)
    first, second = (worker.learn(lesson("task_arithmetic", loss)) for worker in (three.one, three.two))
    assert replace(first, seconds=0) == replace(second, seconds=0)


@pytest.mark.parametrize(
    "method", [m if m == "dare_ties" else pytest.param(m, marks=pytest.mark.slow) for m in LEARNABLE]
)
def test_every_learnable_method_has_the_same_gradients(method: str, three: Three, patch: pytest.MonkeyPatch) -> None:
    asked = Recipe.from_json(recipe(method, 0.5))
    found = []
    for worker in (three.one, three.two):
        worker.merge(asked)
        with worker.gradients(asked) as gradient:
            worker.engine.backward(pairs_of(worker.examples()[:2]), torch.sum)
        found.append(gradient)
    assert found[0] == found[1]
    assert any(found[0].values())


@pytest.mark.parametrize("form", ["kfac", "regmean", "fisher"])
def test_a_spread_model_derives_bit_for_bit_as_on_one_device(
    form: Form, three: Three, patch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    paths = [Derivation(form, "e", (0.4,), tmp_path / name) for name in ("one", "two")]
    made = [worker.derive(path)[0] for worker, path in zip((three.one, three.two), paths, strict=True)]
    files = [[(file.name, file.read_bytes()) for file in sorted(folder.glob("*.safetensors"))] for folder in made]
    assert files[0] == files[1]
    assert files[0]


@pytest.mark.slow
def test_a_spread_model_measures_the_same_sensitivities(three: Three, patch: pytest.MonkeyPatch) -> None:
    first, second = (worker.sensitivities("e", points=2) for worker in (three.one, three.two))
    assert replace(first, seconds=0) == replace(second, seconds=0)


@pytest.mark.parametrize("method", BY_METHOD)
def test_no_merge_asks_a_device_without_float64_for_it(method: str, three: Three, patch: pytest.MonkeyPatch) -> None:
    assert three.without.engine.model.device.type == "mps"
    found = three.without.evaluate(recipe(method, 0.6), "search").outcomes
    assert found == three.one.evaluate(recipe(method, 0.6), "search").outcomes[: len(found)]
    assert len(found) == 3 * ITEMS


@pytest.mark.slow
def test_nothing_that_is_learned_or_derived_asks_such_a_device_for_float64(
    three: Three, patch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for loss in ("labels", "teachers"):
        assert three.without.learn(lesson("ties", loss, steps=1)).candidates > 0
    for form in ("kfac", "regmean", "fisher"):
        assert three.without.derive(Derivation(form, "e", (0.4,), tmp_path))
    assert three.without.sensitivities("e", points=2).domain


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_spread(family: str, tmp_path: Path) -> None:
    base, law = base_and_expert(family, tmp_path)
    sources = Sources.open(base, {"law": str(law)})
    asked = Recipe("task_arithmetic", str(base), (("law", str(law)),), (Setting("weight", "law", "", 0.5),))
    pairs = [Pair(tuple(range(3, 23)), tuple(range(30 + i, 36 + i))) for i in range(4)]
    pairs.append(Pair((0,), tuple(range(40, 80))))
    devices, found = PretendedDevices(), []
    with two_gpus(devices):
        for gpus in (1, 2):
            model = resident_model(sources.base, dtype="auto", device="cuda", gpus=gpus)
            places = tensor_places(model, sources.base)
            merge.merge_into(places, sources, asked)
            engine = Engine(model, byte_tokenizer(), token_budget=64)
            scores = engine.loglikelihoods(pairs)
            with weight_gradients(model, places, sources, asked, merge.MergeCache()) as gradient:
                engine.backward(pairs[:3], lambda x: -x.sum())
            found.append((scores, gradient, engine.packs, engine.flexes, engine.gathers))
    assert devices.moves
    assert found[0] == found[1]


def test_the_pretended_devices_refuse_what_gpus_refuse() -> None:
    with PretendedDevices():
        one, two = (torch.ones(2, device=f"cuda:{i}") for i in (0, 1))
        for mixed in (lambda: one + two, lambda: one + torch.ones(2), lambda: two[one.long()], lambda: one.numpy()):
            with pytest.raises(MixedDevicesError):
                mixed()
        with pytest.raises(TypeError, match="float64"):
            torch.zeros(2, dtype=torch.float64, device="mps")
        assert (one + two.to("cuda:0")).device == (one[torch.tensor([0])] * torch.tensor(2.0)).device == one.device
        assert torch.empty_like(two)[None].mT.contiguous().device == two.device


# Where a model lies


def test_layers_are_spread_so_that_each_device_holds_about_as_much(tmp_path: Path) -> None:
    base = open_checkpoint(pico_llama(tmp_path / "base", layers=9))
    for devices in (2, 3, 4):
        spread = Spread.of(base, devices)
        assert list(spread.layers) == sorted(spread.layers)
        assert set(spread.layers) <= set(range(devices))
        assert sum(spread.bytes) == base.bytes
        layer = sum(base.size(name) for name in base.names if ".layers.0." in name)
        assert max(spread.bytes) - min(spread.bytes) <= 2 * layer
        assert all(spread.device(n) == 0 for n in base.names if ".layers." not in n)
        assert spread.device("model.layers.8.mlp.up_proj.weight") == devices - 1


def test_more_devices_than_layers_are_refused(tmp_path: Path) -> None:
    base = open_checkpoint(pico_llama(tmp_path / "base", layers=2))
    with pytest.raises(CheckpointError, match=r"2 layers, which cannot be spread over 4 GPUs; lower workers\.gpus"):
        Spread.of(base, 4)


def test_devices_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "gpus_seen", lambda: 0)
    assert devices_of("auto", 0) == devices_of("cpu", 0) == [torch.device("cpu")]
    with pytest.raises(WorkerError, match=r"workers\.device is cuda, and torch sees no CUDA device; say auto or cpu"):
        devices_of("cuda", 0)
    monkeypatch.setattr(module, "gpus_seen", lambda: 2)
    assert devices_of("cuda", 1) == devices_of("auto", 0) == [torch.device("cuda")]
    assert devices_of("auto", 2) == [torch.device("cuda", 0), torch.device("cuda", 1)]
    with pytest.raises(WorkerError, match=r"workers\.gpus must be at most .* given 4, torch sees 2"):
        devices_of("cuda", 4)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(WorkerError, match=r"mps is the GPU of an Apple computer; .* finds none here; say auto"):
        devices_of("mps", 0)


# Never run so far: nothing that tests this project has had two GPUs


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two CUDA devices")
def test_two_cuda_devices_score_and_learn_as_one_does(spec: WorkerSpec) -> None:
    one, two = Worker(spec), Worker(replace(spec, gpus=2))
    for name, tensor in two._parameters.items():
        assert tensor.device.index == Spread.of(two._sources.base, 2).device(name)
    for method in ("task_arithmetic", "ties", "slerp"):
        ours, theirs = (worker.evaluate(recipe(method, 0.6), "search").outcomes for worker in (two, one))
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.loglikelihoods == pytest.approx(other.loglikelihoods, rel=0.02, abs=0.3)
    for loss in ("labels", "teachers"):
        ours, theirs = (worker.learn(lesson("task_arithmetic", loss)) for worker in (two, one))
        assert ours.seen_before == pytest.approx(theirs.seen_before, rel=0.1, abs=0.05)
