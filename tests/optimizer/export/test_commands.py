"""`mergefront merge` makes of a mergekit document what mergekit 0.1.5 makes of it, tensor by tensor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma2Config

from optimizer.checkpoints.opening import open_checkpoint
from optimizer.errors import CheckpointError, MergeError
from optimizer.export.commands import export_trial, merge_recipe
from optimizer.run import open_run
from search_spaces import SpaceError
from search_spaces.mergekit.stack import Stack
from tests.pico import pico_expert, pico_llama
from tests.toy_run import toy_run

pytestmark = pytest.mark.slow  # whole studies are run

LAYERS = 4

FLAT = """
merge_method: ties
base_model: base
models:
  - model: law
    parameters:
      weight:
        - {filter: self_attn.q_proj, value: [0, 0.5, 1]}
        - {filter: up_proj, value: 0.9}
        - {filter: layers.1., value: 0.3}
        - {value: 0.6}
      density: 0.4
  - {model: code, parameters: {weight: [{filter: norm, value: 0.25}, {value: 0.7}], density: [0.3, 0.8]}}
parameters: {lambda: 0.7, normalize: true}
dtype: float32
"""
SLICES = """
merge_method: task_arithmetic
base_model: base
slices:
  - sources:
      - {model: base, layer_range: [0, 3]}
      - {model: law, layer_range: [0, 3], parameters: {weight: [{filter: mlp, value: [0.2, 0.9]}, {value: 0.4}]}}
      - {model: code, layer_range: [0, 3], parameters: {weight: [0.1, 0.3]}}
  - sources:
      - {model: base, layer_range: [3, 4]}
      - {model: law, layer_range: [3, 4]}
    parameters: {weight: [{filter: down_proj, value: 0.8}]}
parameters: {weight: [0.5, 0.7], lambda: 0.9}
dtype: float32
tokenizer_source: base
"""
SLERP = """
merge_method: slerp
base_model: base
slices:
  - sources: [{model: base, layer_range: [0, 4]}, {model: law, layer_range: [0, 4]}]
parameters:
  t: [{filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}, {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}, {value: 0.5}]
dtype: float32
"""
BASELESS = """
merge_method: linear
slices:
  - sources:
      - {model: code, layer_range: [0, 2], parameters: {weight: [0.2, 0.9]}}
      - {model: law, layer_range: [0, 2], parameters: {weight: [{filter: mlp, value: 0.7}, {value: 0.4}]}}
  - sources:
      - {model: code, layer_range: [2, 4], parameters: {weight: 1}}
      - {model: law, layer_range: [2, 4]}
parameters: {weight: 2}
dtype: float32
"""
ONE_MODEL = """
merge_method: passthrough
models:
  - {model: law, parameters: {scale: [{filter: down_proj, value: [0, 1]}, {value: 1}]}}
dtype: float32
"""
STACK = """
merge_method: passthrough
slices:
  - sources: [{model: base, layer_range: [0, 3], parameters: {scale: [{filter: o_proj, value: 0}, {value: [1, 1.5]}]}}]
  - sources: [{model: law, layer_range: [1, 3]}]
  - sources: [{model: law, layer_range: [1, 4], parameters: {scale: [{filter: layers.2., value: 0.5}, {value: 1}]}}]
    parameters: {scale: 3}
dtype: float32
"""
PLAIN_STACK = """
merge_method: passthrough
slices:
  - sources: [{model: base, layer_range: [0, 2]}]
  - sources: [{model: base, layer_range: [1, 4]}]
dtype: float32
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    base = pico_llama(folder / "base", layers=LAYERS, tied=False, dtype="float32")
    for seed, name in enumerate(("law", "code")):
        pico_expert(base, folder / name, seed=seed, scale=0.1)
    return folder


def written(folder: Path, text: str, models: Path) -> Path:
    for name in ("base", "law", "code"):
        text = text.replace(f"model: {name},", f"model: {models / name},").replace(
            f"model: {name}\n", f"model: {models / name}\n"
        )
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "text",
    [FLAT, SLICES, SLERP, BASELESS, ONE_MODEL, STACK, PLAIN_STACK],
    ids=["flat", "slices", "slerp", "baseless", "one-model", "stack", "plain-stack"],
)
def test_mergekit_makes_the_same(text: str, models: Path, tmp_path: Path) -> None:
    pytest.importorskip("mergekit", reason="mergekit is not installed")
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    path = written(tmp_path, text, models)
    options = MergeOptions(quiet=True, copy_tokenizer=False, clone_tensors=True)
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(path.read_text())), str(tmp_path / "peer"), options)
    merge_recipe(path, tmp_path / "ours")
    theirs = {
        name: tensor for file in (tmp_path / "peer").glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    ours = load_file(tmp_path / "ours/model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).abs().max() <= 1e-6 * tensor.abs().max(), name
    again = tmp_path / "again"  # and what is written beside it makes it once more
    for file in ("recipe.json", "mergekit.yaml"):
        merge_recipe(tmp_path / "ours" / file, again / file)
        assert all(tensor.equal(ours[name]) for name, tensor in load_file(again / file / "model.safetensors").items())


def test_a_stack_is_a_model_of_its_own_depth(models: Path, tmp_path: Path) -> None:
    out = merge_recipe(written(tmp_path, PLAIN_STACK, models), tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.num_hidden_layers == len(model.model.layers) == 5
    base, stacked = open_checkpoint(models / "base"), open_checkpoint(out)
    for i, layer in enumerate((0, 1, 1, 2, 3)):
        name = "model.layers.{}.self_attn.q_proj.weight"
        assert stacked.tensor(name.format(i)).equal(base.tensor(name.format(layer)))
    assert "| 2 | base | 1 |" in (out / "README.md").read_text()
    assert Stack.from_json((out / "recipe.json").read_text()).layers == tuple(("m0", i) for i in (0, 1, 1, 2, 3))


def dtypes_of(model: Path) -> set[torch.dtype]:
    return {tensor.dtype for tensor in load_file(model / "model.safetensors").values()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("text", [FLAT, STACK], ids=["merge", "stack"])
@pytest.mark.parametrize(
    ("asked", "stored"),
    [
        ("dtype: float32", torch.float32),
        ("dtype: bfloat16", torch.bfloat16),
        ("dtype: float32\nout_dtype: float16", torch.float16),
        ("", torch.bfloat16),  # the base's
    ],
)
def test_a_document_says_what_the_model_is_stored_in(
    text: str, asked: str, stored: torch.dtype, models: Path, tmp_path: Path
) -> None:
    for name in ("base", "law", "code"):
        shutil.copytree(models / name, tmp_path / name)
        tensors = load_file(tmp_path / name / "model.safetensors")
        halved = {key: tensor.bfloat16() for key, tensor in tensors.items()}
        save_file(halved, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((tmp_path / name / "config.json").read_text()) | {"dtype": "bfloat16"}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    path = written(tmp_path, text.replace("dtype: float32", asked), tmp_path)
    document = yaml.safe_load(path.read_text())
    out = merge_recipe(path, tmp_path / "out")
    assert dtypes_of(out) == {stored}
    assert getattr(torch, json.loads((out / "config.json").read_text())["dtype"]) == stored
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {stored}
    exact = merge_recipe(written(tmp_path, text, tmp_path), tmp_path / "exact")  # float32 sums, rounded once
    for name, tensor in load_file(exact / "model.safetensors").items():
        assert load_file(out / "model.safetensors")[name].equal(tensor.to(stored)), name
    for file in ("recipe.json", "mergekit.yaml"):
        again = merge_recipe(out / file, tmp_path / "again" / file)
        assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    pytest.importorskip("mergekit", reason="mergekit is not installed")
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    options = MergeOptions(quiet=True, copy_tokenizer=False, clone_tensors=True)
    run_merge(MergeConfiguration.model_validate(document), str(tmp_path / "peer"), options)
    peers = {tensor.dtype for file in (tmp_path / "peer").glob("*.safetensors") for tensor in load_file(file).values()}
    assert peers == {stored}


def test_a_merge_that_overflows_the_dtype_asked_for_is_refused(models: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(models / "base", base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e5  # float16 ends at 65,504
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    law = {"model": str(models / "law"), "parameters": {"weight": 0.0}}
    document = {"merge_method": "task_arithmetic", "base_model": str(base), "models": [law], "out_dtype": "float16"}
    (tmp_path / "recipe.yaml").write_text(json.dumps(document))
    with pytest.raises(MergeError, match=r"1 NaN or infinite values in model.norm.weight"):
        merge_recipe(tmp_path / "recipe.yaml", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_number_or_a_factor_for_what_is_not_there_is_refused(models: Path, tmp_path: Path) -> None:
    experts = [["law", str(models / "law")]]
    recipe = {"method": "linear", "base": str(models / "base"), "experts": experts}
    recipe["settings"] = [["weight", "law", "layer.99.attn", 0.5]]
    stack = {"method": "passthrough", "models": experts, "layers": [["law", 0]], "scales": [["model.layers.1.w", 2]]}
    for document, message in ((recipe, "part of the base; given: layer.99.attn; .* layer.00.attn to layer.03.mlp"),
                              (stack, "tensor of the stack, which has 1 layers; given: model.layers.1.w")):  # fmt: skip
        (tmp_path / "recipe.json").write_text(json.dumps(document))
        with pytest.raises(SpaceError, match=message):
            merge_recipe(tmp_path / "recipe.json", tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_what_a_config_says_of_each_layer_moves_with_it(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "base", tmp_path / "base")
    config = Gemma2Config(**(json.loads((models / "base/config.json").read_text()) | {"model_type": "gemma2"}))
    config.layer_types = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    config.save_pretrained(tmp_path / "base")
    text = PLAIN_STACK.replace("model: base", f"model: {tmp_path / 'base'}")
    (tmp_path / "recipe.yaml").write_text(text)
    out = merge_recipe(tmp_path / "recipe.yaml", tmp_path / "out")
    types = json.loads((out / "config.json").read_text())["layer_types"]
    assert [word[0] for word in types] == ["s", "f", "f", "f", "s"]


@pytest.mark.parametrize(
    ("old", "new", "error", "message"),
    [
        ("[1, 4]", "[1, 5]", SpaceError, r"has 4 layers; given: \[1, 5\]; where: slices\[1\].*layer_range"),
        ("dtype: float32", "dtype: float64", SpaceError, "dtype is one of.*float64"),
        ("dtype: float32", "tokenizer: {source: union}", SpaceError, "'tokenizer'"),
        ("dtype: float32", "parameters: {weight: 1}", SpaceError, "'weight'.*only scale"),
        ("dtype: float32", "parameters: {scale: much}", SpaceError, "scale is a number.*much"),
        ("dtype: float32", "parameters: {scale: .inf}", SpaceError, "scale is a finite number.*inf"),
        ("dtype: float32", "parameters: {scale: 1e39}", MergeError, "must be finite"),
        ("model: base,", "model: base+law,", SpaceError, "base.law.*merge an adapter"),
        ("[0, 2]}]", "[0, 2]}, {model: law, layer_range: [0, 2]}]", SpaceError, "has one model"),
    ],
)
def test_a_stack_that_cannot_be_is_refused(
    old: str, new: str, error: type[Exception], message: str, models: Path, tmp_path: Path
) -> None:
    assert old in PLAIN_STACK
    with pytest.raises(error, match=message):
        merge_recipe(written(tmp_path, PLAIN_STACK.replace(old, new), models), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "models", ["{base: b, experts: 3}", "{base: [1], experts: {clinical: 4}}", "{experts: [a]}", "7"]
)
def test_models_of_a_runs_study_file_that_are_none_are_left_aside(tmp_path: Path, models: str) -> None:
    run = toy_run(tmp_path / "toy", trials=4)
    (run / "study.yaml").write_text(f"name: toy\nmodels: {models}\n")
    with pytest.raises(CheckpointError):  # its models are made up
        export_trial(open_run(run), 3, describe=str)
