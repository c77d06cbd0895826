from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from evals import products
from evals.errors import ScoreError, TaskError
from evals.outcomes import Chat, TaskSpec
from optimizer.checkpoints.opening import open_checkpoint
from optimizer.checkpoints.resident import resident_model
from optimizer.errors import CheckpointError, MergeError, WorkerError
from optimizer.merging.merge import merge_to_folder
from optimizer.workers.orders import Derivation, Form, Lesson, Loss
from optimizer.workers.worker import Worker, WorkerSpec
from search_spaces.recipe import Recipe, Setting
from tests.pico import pico_expert, pico_llama

ITEMS = 6
WORDS = ("red", "green", "blue", "brown")


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> WorkerSpec:
    folder = tmp_path_factory.mktemp("models")
    base = pico_llama(folder / "base")
    expert = pico_expert(base, folder / "expert", scale=0.2)
    tasks = tuple(
        TaskSpec(str(write_task(folder, name)), role, search_items=ITEMS, holdout_items=ITEMS)
        for name, role in (("colours", "domain"), ("numbers", "general"))
    )
    return WorkerSpec(
        base=str(base),
        experts=(("e", str(expert)),),
        tasks=tasks,
        chat=Chat(),
        allow_task_code=False,
        token_budget=256,
        dtype="auto",
        device="cpu",
        threads=1,
        seed=0,
    )


def write_task(folder: Path, name: str) -> Path:
    rows = [{"q": f"{name} {i}:", "choices": list(WORDS), "gold": i % 4} for i in range(2 * ITEMS)]
    (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    path = folder / f"{name}.yaml"
    path.write_text(
        f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {name}.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\n"
        "doc_to_choice: choices\ndoc_to_target: gold\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    return path


def recipe(weight: float, method: str = "task_arithmetic") -> str:
    experts = (("e", "elsewhere"),)
    return Recipe(method, "elsewhere", experts, (Setting("weight", "", "", weight),)).to_json()


def test_a_worker_has_no_memory_of_earlier_recipes(spec: WorkerSpec) -> None:
    worker, fresh = Worker(spec), Worker(spec)
    for weight in (1.0, 0.3, 0.0):
        worker.evaluate(recipe(weight), "search")
    again, first = worker.evaluate(recipe(0.3), "search"), fresh.evaluate(recipe(0.3), "search")
    assert again.outcomes == first.outcomes
    assert {row.suite for row in first.outcomes} == {"search"}
    assert len(first.outcomes) == 2 * ITEMS
    assert first.outcomes != fresh.evaluate(recipe(1.0), "search").outcomes
    assert {row.item for row in first.outcomes}.isdisjoint(
        row.item for row in fresh.evaluate(recipe(0.3), "holdout").outcomes
    )


def test_a_worker_leaves_products_to_onednn_where_they_stay_float32(spec: WorkerSpec) -> None:
    settings = torch.backends.mkldnn.matmul
    wanted = products.ALLOWED if products.prefer_onednn() else products.EXACT
    settings.fp32_precision = products.EXACT
    Worker(spec)
    assert settings.fp32_precision == wanted


def test_a_recipe_scores_as_the_model_it_exports(spec: WorkerSpec, tmp_path: Path) -> None:
    worker = Worker(spec)
    scored = worker.evaluate(recipe(0.4), "search")
    merge_to_folder(worker._sources, Recipe.from_json(recipe(0.4)), tmp_path / "out")
    exported = tmp_path / "exported"
    pico_llama(exported)  # config and tokenizer
    for path in (tmp_path / "out").glob("*.safetensors*"):
        path.replace(exported / path.name)
    assert Worker(replace(spec, base=str(exported))).evaluate(recipe(0.0), "search").outcomes == scored.outcomes


def test_a_merge_is_rounded_to_the_bases_dtype_whatever_it_is_scored_in(spec: WorkerSpec) -> None:
    wide, own = Worker(replace(spec, dtype="float32")), Worker(spec)
    wide.evaluate(recipe(0.3), "search")
    own.evaluate(recipe(0.3), "search")
    for name, parameter in own._parameters.items():
        assert wide._parameters[name].dtype == torch.float32
        assert torch.equal(wide._parameters[name], parameter.float())


def test_the_resident_model_is_loaded_without_a_bar(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = open_checkpoint(pico_llama(tmp_path / "base"))
    logging.enable_progress_bar()
    capfd.readouterr()
    resident_model(base, dtype="auto", device="cpu")
    assert capfd.readouterr().err == ""
    assert logging.is_progress_bar_enabled()


@pytest.mark.parametrize("tied", [True, False])
def test_the_resident_model_owns_its_memory_and_keeps_its_ties(tmp_path: Path, tied: bool) -> None:
    folder = pico_llama(tmp_path / "model", tied=tied)
    base = open_checkpoint(folder)
    model = resident_model(base, dtype="auto", device="cpu")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert not any(parameter.is_meta for parameter in (*model.parameters(), *model.buffers()))
    for parameter in model.parameters():
        parameter.fill_(7.0)
    again = open_checkpoint(folder)
    assert not any(bool((again.tensor(name) == 7.0).all()) for name in again.names)
    assert not any(bool((base.tensor(name) == 7.0).all()) for name in base.names)


def test_a_config_that_asks_for_other_tensors_is_refused(tmp_path: Path) -> None:
    base = open_checkpoint(pico_llama(tmp_path / "model"))
    config = json.loads((base.folder / "config.json").read_text())
    (base.folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"do not fit: .*layers\.2"):
        resident_model(base, dtype="auto", device="cpu")


def test_a_recipe_of_another_expert_is_an_error_and_leaves_the_worker_usable(spec: WorkerSpec) -> None:
    worker = Worker(spec)
    stranger = Recipe("task_arithmetic", "elsewhere", (("who", "elsewhere"),), ()).to_json()
    before = worker.evaluate(recipe(0.5), "search")
    with pytest.raises(MergeError, match="who"):
        worker.evaluate(stranger, "search")
    assert worker.evaluate(recipe(0.5), "search").outcomes == before.outcomes


def test_another_folder_under_the_name_of_a_derived_expert_is_refused(spec: WorkerSpec, tmp_path: Path) -> None:
    worker, source = Worker(spec), Path(spec.experts[0][1])
    for place in ("one", "other"):
        shutil.copytree(source, tmp_path / place)
    whole = (Setting("weight", "derived", "", 1.0),)
    recipes = [
        Recipe("task_arithmetic", spec.base, (("derived", str(tmp_path / place)),), whole) for place in ("one", "other")
    ]
    worker.evaluate(recipes[0].to_json(), "search")
    with pytest.raises(MergeError, match="two experts are called 'derived'"):
        worker.evaluate(recipes[1].to_json(), "search")
    worker.evaluate(recipes[0].to_json(), "search")


def test_a_chat_template_runs_no_code(spec: WorkerSpec, tmp_path: Path) -> None:
    base = Path(shutil.copytree(spec.base, tmp_path / "base"))
    attack = f"{{{{ cycler.__init__.__globals__.os.mkdir('{tmp_path}/marker') }}}}"
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": attack}))
    with pytest.raises(TaskError, match="SecurityError"):
        Worker(replace(spec, base=str(base), experts=(), chat=Chat(template=True))).evaluate(
            Recipe("task_arithmetic", "elsewhere", (("e", "elsewhere"),), ()).to_json(), "search"
        )
    assert not (tmp_path / "marker").exists()


def test_a_lack_of_memory_is_said_with_what_helps(spec: WorkerSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(*_: object) -> None:
        torch.empty(2**60, dtype=torch.uint8)

    words = r"out of memory: .*0\.00 GB.* are free; lower workers\.count or evals\.token_budget \(RuntimeError"
    worker = Worker(spec)
    before = worker.evaluate(recipe(0.5), "search")
    with monkeypatch.context() as patch:
        patch.setattr(worker._harness, "score", greedy)
        with pytest.raises(WorkerError, match=words):
            worker.evaluate(recipe(0.5), "search")
        of_gpu = torch.OutOfMemoryError("CUDA out of memory")
        patch.setattr(worker._harness, "score", Mock(side_effect=of_gpu))
        with pytest.raises(WorkerError, match=r"its GPU has no room; lower evals\.token_budget, .*workers\.gpus"):
            worker.evaluate(recipe(0.5), "search")
    assert worker.evaluate(recipe(0.5), "search").outcomes == before.outcomes
    monkeypatch.setattr("optimizer.checkpoints.resident.resident_model", lambda *_, **__: greedy())
    with pytest.raises(WorkerError, match=words):
        Worker(spec)


def test_a_driver_does_not_import_what_only_workers_need() -> None:
    code = (
        "import sys, optimizer.workers.worker, optimizer.workers.ray_pool, optimizer.search.driver\n"
        "print([name for name in ('torch', 'transformers', 'lm_eval', 'datasets', 'ray') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


KINDS = {
    "multiple_choice": "doc_to_choice: choices\ndoc_to_target: gold\nmetric_list: [{metric: acc, aggregation: mean}]\n",
    "loglikelihood": "doc_to_target: ' red'\nmetric_list: [{metric: acc, aggregation: mean}]\n",
    "loglikelihood_rolling": "doc_to_target: '{{q}}'\nmetric_list: [{metric: bits_per_byte}]\n",
    "generate_until": "doc_to_target: red\ngeneration_kwargs: {until: ['.'], max_gen_toks: 3}\n"
    "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_an_error_that_names_it_and_never_a_score(
    spec: WorkerSpec, tmp_path: Path, kind: str, bad: float
) -> None:
    path = write_task(tmp_path, "kind")
    head = path.read_text().split("output_type")[0]
    path.write_text(f"{head}output_type: {kind}\ndoc_to_text: '{{{{q}}}}'\n{KINDS[kind]}")
    expert = Path(shutil.copytree(spec.experts[0][1], tmp_path / "expert"))
    tensors = load_file(expert / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][3, 5] = bad
    save_file(tensors, expert / "model.safetensors", metadata={"format": "pt"})
    task = TaskSpec(str(path), "general", search_items=ITEMS, holdout_items=ITEMS)
    worker = Worker(replace(spec, tasks=(task,), experts=(("e", str(expert)),)))
    with pytest.raises(MergeError, match=re.escape(name)):
        worker.evaluate(recipe(0.5), "search")
    outcomes = worker.evaluate(recipe(0.0), "search").outcomes  # without the expert, and with no memory of it
    assert len(outcomes) == ITEMS
    assert all(math.isfinite(row.value) for row in outcomes)
    worker._parameters[name][3, 5] = bad  # and an engine that is given such a model finds it too
    with pytest.raises(ScoreError, match="not finite"):
        worker._harness.score(worker._engine, "search")


def test_a_source_that_changed_on_the_disk_is_not_merged(spec: WorkerSpec, tmp_path: Path) -> None:
    expert = Path(shutil.copytree(spec.experts[0][1], tmp_path / "expert"))
    worker = Worker(replace(spec, experts=(("e", str(expert)),)))
    before = worker.evaluate(recipe(0.5), "search").outcomes
    content = (expert / "model.safetensors").read_bytes()
    (expert / "new").write_bytes(content)
    (expert / "new").rename(expert / "model.safetensors")  # the same again is as good
    assert worker.evaluate(recipe(0.5), "search").outcomes == before
    (expert / "new").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (expert / "new").rename(expert / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors changed after it was opened"):
        worker.evaluate(recipe(0.5), "search")


IN_ANOTHER_PROCESS = """
import sys
from evals.outcomes import Chat, TaskSpec
from optimizer.workers.orders import Derivation, Form, Lesson, Loss
from optimizer.workers.worker import Worker, WorkerSpec

spec, recipe = (eval(text) for text in sys.argv[1:])
for row in Worker(spec).evaluate(recipe, "search").outcomes:
    print(row)
"""


@pytest.mark.slow
def test_another_process_gives_the_same_bits(spec: WorkerSpec, tmp_path: Path) -> None:
    """A random method too: dare_linear draws its masks from the recipe, not from the process."""
    tasks = []
    for kind, settings in KINDS.items():
        path = write_task(tmp_path, kind)
        head = path.read_text().split("output_type")[0]
        path.write_text(f"{head}output_type: {kind}\ndoc_to_text: '{{{{q}}}}'\n{settings}")
        tasks.append(TaskSpec(str(path), "general", search_items=ITEMS, holdout_items=ITEMS))
    spec = replace(spec, tasks=tuple(tasks), dtype="float32")
    numbers = (Setting("weight", "", "", 0.7), Setting("density", "", "", 0.5))
    asked = Recipe("dare_linear", "elsewhere", (("e", "elsewhere"),), numbers).to_json()
    worker = Worker(spec)
    worker.evaluate(recipe(0.3), "search")
    here = worker.evaluate(asked, "search").outcomes
    there = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS, repr(spec), repr(asked)],
        env=os.environ | {"PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert there.stdout.splitlines() == [repr(row) for row in here]  # repr gives every bit of a float
    assert len(here) == len(KINDS) * ITEMS


GPU = os.environ.get("MERGEFRONT_TEST_GPU", "cuda")  # "cpu" tries the tests themselves


@pytest.fixture(scope="module", params=["auto", "float32"])
def both(request: pytest.FixtureRequest, spec: WorkerSpec) -> tuple[Worker, Worker]:
    """A worker on a CUDA device, and one on the CPU."""
    if GPU == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    return Worker(replace(spec, dtype=request.param, device=GPU)), Worker(replace(spec, dtype=request.param))


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties", "breadcrumbs"])
def test_a_cuda_device_scores_as_the_cpu_does(method: str, both: tuple[Worker, Worker]) -> None:
    for weight in (0.0, 0.6):
        ours, theirs = (worker.evaluate(recipe(weight, method), "search").outcomes for worker in both)
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.loglikelihoods == pytest.approx(other.loglikelihoods, rel=0.02, abs=0.3)


@pytest.mark.parametrize("loss", ["labels", "teachers"])
def test_a_cuda_device_learns_as_the_cpu_does(loss: Loss, both: tuple[Worker, Worker]) -> None:
    lesson = Lesson(recipe(0.5), (("e", 0.5),), "tensor", 3, (-1.0, 2.0), 0, loss)
    ours, again, theirs = (worker.learn(lesson) for worker in (both[0], *both))
    assert ours.recipe == again.recipe
    assert ours.seen_before == pytest.approx(theirs.seen_before, rel=0.1, abs=0.05)
    assert ours.candidates > 0


@pytest.mark.parametrize("form", ["kfac", "regmean", "fisher"])
def test_a_cuda_device_derives_as_the_cpu_does(form: Form, both: tuple[Worker, Worker], tmp_path: Path) -> None:
    folders = [both[i].derive(Derivation(form, "e", (0.4,), tmp_path / str(i)))[0] for i in (0, 1)]
    ours, theirs = (open_checkpoint(folder) for folder in folders)
    apart = [float((ours.tensor(name).float() - theirs.tensor(name).float()).abs().mean()) for name in theirs.names]
    assert max(apart) < 0.01


def test_a_cuda_device_measures_sensitivities_as_the_cpu_does(both: tuple[Worker, Worker]) -> None:
    ours, theirs = (worker.sensitivities("e", points=2) for worker in both)
    scale = max(abs(x) for row in theirs.domain for x in row)
    for mine, other in zip(ours.domain, theirs.domain, strict=True):
        assert mine == pytest.approx(other, abs=0.1 * scale)
