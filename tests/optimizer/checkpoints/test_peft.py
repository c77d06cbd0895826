"""Adapters as peft itself writes them: each gives what peft's own merge gives, or is refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimizer.checkpoints.compare import compare
from optimizer.checkpoints.opening import open_checkpoint
from optimizer.errors import CheckpointError
from optimizer.export.model_folder import export_model
from optimizer.merging.merge import Sources
from search_spaces import Recipe, Setting
from tests.optimizer.checkpoints.test_families import random_model

peft = pytest.importorskip("peft", reason="peft is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")
LLAMA = ("q_proj", "up_proj", "down_proj")


def write_adapter(
    folder: Path, targets: tuple[str, ...], family: str = "llama", *, config: Any = None, **settings: Any
) -> Any:
    """Write a base and a random adapter on it, LoRA where no other config is given; return peft's model of both."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = random_model(family.removesuffix("-tied"), tie_word_embeddings=family.endswith("-tied"))
        model.save_pretrained(folder / "base")
        config = config or peft.LoraConfig(r=4, lora_alpha=6, target_modules=list(targets), **settings)
        adapted = peft.get_peft_model(model, config)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "ia3_" in name:
                parameter.data.normal_(0, 0.2)
        adapted.save_pretrained(folder / "adapter")
    return adapted


def merged_by_peft(adapted: Any, folder: Path) -> Mapping[str, torch.Tensor]:
    adapted.merge_and_unload().save_pretrained(folder)
    opened = open_checkpoint(folder)
    return {name: opened.tensor(name) for name in opened.names}


@pytest.mark.parametrize(
    ("family", "targets", "settings"),
    [
        ("llama", LLAMA, {}),
        ("llama", LLAMA, {"use_rslora": True}),
        ("llama-tied", LLAMA, {"init_lora_weights": "gaussian"}),
        ("gpt2", ("c_attn", "c_proj"), {"fan_in_fan_out": True}),
        ("gpt_neox", ("query_key_value",), {}),
        ("qwen2", ("k_proj",), {"layers_to_transform": [1]}),
    ],
)
def test_a_folded_adapter_is_what_peft_merges(
    family: str, targets: tuple[str, ...], settings: dict[str, Any], tmp_path: Path
) -> None:
    expected = merged_by_peft(write_adapter(tmp_path, targets, family, **settings), tmp_path / "merged")
    base = open_checkpoint(tmp_path / "base")
    expert = open_checkpoint(tmp_path / "adapter", base=base)
    assert expert.is_adapter
    changed = {name for name in base.names if not expert.tensor(name).equal(base.tensor(name))}
    assert changed == {name for name in base.names if not expected[name].equal(base.tensor(name))} != set()
    for name in base.names:
        torch.testing.assert_close(expert.tensor(name), expected[name], rtol=1e-5, atol=1e-6)


EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


@pytest.mark.parametrize(
    ("family", "targets", "settings"),
    [
        ("llama", ("q_proj", "lm_head"), {}),
        ("llama-tied", ("q_proj", "lm_head"), {}),
        ("llama", ("embed_tokens", "lm_head"), {}),
        ("qwen2_moe", ("q_proj",), {"target_parameters": list(EXPERTS)}),  # fused of a file's tensor for each expert
        ("gpt_oss", ("q_proj",), {"target_parameters": list(EXPERTS)}),
        ("llama4_text", (), {"target_parameters": ["feed_forward.experts.gate_up_proj"]}),
    ],
)
def test_heads_embeddings_and_parameters_are_folded_by_peft(
    family: str, targets: tuple[str, ...], settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    expected = merged_by_peft(write_adapter(tmp_path, targets, family, **settings), tmp_path / "merged")
    base = open_checkpoint(tmp_path / "base")
    expert = open_checkpoint(tmp_path / "adapter", base=base)
    changed = {name for name in base.names if not expert.tensor(name).equal(base.tensor(name))}
    assert changed == {name for name in base.names if not expected[name].equal(base.tensor(name))}
    words = [part.rsplit(".", 1)[-1] for part in settings.get("target_parameters", ())] or ["lm_head", "embed_tokens"]
    assert any(word.split("_")[0] in name for word in words for name in changed)
    for name in base.names:
        torch.testing.assert_close(expert.tensor(name), expected[name], rtol=1e-5, atol=1e-6)


def test_an_adapter_from_peft_to_a_model(tmp_path: Path) -> None:
    expected = merged_by_peft(write_adapter(tmp_path, LLAMA), tmp_path / "merged")
    experts = {"law": str(tmp_path / "adapter")}
    sources = Sources.open(tmp_path / "base", experts)
    recipe = Recipe("linear", str(tmp_path / "base"), tuple(experts.items()), (Setting("weight", "", "", 1.0),))
    out = export_model(recipe, sources, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(out).state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=1e-5, atol=1e-6)
    assert "lora:" in (out / "mergekit.yaml").read_text()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/mergefront/adapters"


@pytest.mark.parametrize(
    ("family", "targets", "settings"),
    [
        ("llama", LLAMA, {"use_dora": True}),
        ("llama", LLAMA, {"modules_to_save": ["lm_head", "norm"]}),
        ("llama", LLAMA, {"trainable_token_indices": [1, 2]}),
        ("llama", ("embed_tokens", "up_proj"), {}),
        ("qwen2", ("k_proj",), {"bias": "lora_only"}),
        ("gpt2", ("c_attn",), {"fan_in_fan_out": True, "lora_bias": True}),
        ("gpt2", ("c_proj",), {"fan_in_fan_out": True, "use_dora": True}),
    ],
)
def test_what_peft_folds_is_folded_once(
    family: str, targets: tuple[str, ...], settings: dict[str, Any], tmp_path: Path, cache: Path
) -> None:
    expected = merged_by_peft(write_adapter(tmp_path, targets, family, **settings), tmp_path / "merged")
    base = open_checkpoint(tmp_path / "base")
    expert = open_checkpoint(tmp_path / "adapter", base=base)
    assert expert.is_adapter
    assert compare(base, expert) == []
    assert any(not expert.tensor(name).equal(base.tensor(name)) for name in base.names)
    for name in base.names:
        torch.testing.assert_close(expert.tensor(name), expected[name], rtol=1e-5, atol=1e-6)
    (folder,) = cache.iterdir()
    before = (folder / "model.safetensors").stat().st_mtime_ns
    again = open_checkpoint(tmp_path / "adapter", base=base)
    assert (again.fingerprint, again.own_bytes) == (expert.fingerprint, base.bytes)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_adapters_of_other_kinds_are_folded_or_refused(tmp_path: Path) -> None:
    scales = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    expected = merged_by_peft(write_adapter(tmp_path, (), config=scales), tmp_path / "merged")
    base = open_checkpoint(tmp_path / "base")
    expert = open_checkpoint(tmp_path / "adapter", base=base)
    assert all(expert.tensor(name).equal(expected[name]) for name in base.names)
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    write_adapter(tmp_path / "prompt", (), config=prompt)
    with pytest.raises(CheckpointError, match="'PROMPT_TUNING' adds to a model's input and cannot be merged"):
        open_checkpoint(tmp_path / "prompt/adapter", base=base)


@pytest.mark.parametrize("settings", [{"rank_pattern": {"q_proj": 2}}, {"alpha_pattern": {r"0\..*up_proj": 2}}])
def test_ranks_and_alphas_by_module_need_no_peft(settings: dict[str, Any], tmp_path: Path, cache: Path) -> None:
    expected = merged_by_peft(write_adapter(tmp_path, LLAMA, **settings), tmp_path / "merged")
    expert = open_checkpoint(tmp_path / "adapter", base=open_checkpoint(tmp_path / "base"))
    for name in expert.names:
        torch.testing.assert_close(expert.tensor(name), expected[name], rtol=1e-5, atol=1e-6)
    assert not cache.exists()


def test_the_folded_are_stored_in_the_base_s_dtype(tmp_path: Path) -> None:
    write_adapter(tmp_path, LLAMA, use_dora=True)
    exact = open_checkpoint(tmp_path / "adapter", base=open_checkpoint(tmp_path / "base"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32).save_pretrained(tmp_path / "base")
    half = open_checkpoint(tmp_path / "adapter", base=open_checkpoint(tmp_path / "half"))
    wide = open_checkpoint(tmp_path / "adapter", base=open_checkpoint(tmp_path / "base"))
    assert len({exact.fingerprint, half.fingerprint, wide.fingerprint}) == 3
    for name in half.names:
        assert half.tensor(name).equal(wide.tensor(name).bfloat16())


@pytest.mark.parametrize(
    ("family", "settings", "change", "named"),
    [
        ("llama", {"use_dora": True}, {"new_trick": 1}, r"new_trick=1 is unknown to peft"),
        ("llama", {"use_dora": True}, {"peft_type": "MARVEL"}, "knows no peft_type 'MARVEL'"),
        ("llama", {"use_dora": True}, {"megatron_config": {"a": 1}}, "megatron_config=.* is not supported"),
        ("llama", {"use_dora": True}, {"use_dora": False, "bias": "all"}, "has, with no place for it, .*magnitude"),
        ("llama", {}, {"use_dora": True}, "lacks .*magnitude"),
        ("llama", {"use_dora": True}, {"target_modules": ["nothing"]}, "peft says: .*nothing"),
        ("llama", {"init_lora_weights": "pissa"}, {}, "init_lora_weights='pissa' changes the base"),
        ("llama-tied", {"modules_to_save": ["lm_head"]}, {}, r"'lm_head.weight' a tensor of its own"),
    ],
)
def test_what_cannot_be_folded_is_refused_by_name(
    family: str, settings: dict[str, Any], change: dict[str, object], named: str, tmp_path: Path
) -> None:
    write_adapter(tmp_path, LLAMA, family, **settings)
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=named):
        open_checkpoint(tmp_path / "adapter", base=open_checkpoint(tmp_path / "base"))
