"""Adapters as peft itself writes them: what can be folded gives what peft's own merge gives, the rest is named."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimizer.checkpoints import Checkpoint
from optimizer.errors import CheckpointError
from optimizer.export import export_model
from optimizer.merge import Sources
from search_spaces import Recipe, Setting
from tests.optimizer.test_architectures import CONFIGS

peft = pytest.importorskip("peft", reason="peft is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")
LLAMA = ("q_proj", "up_proj", "down_proj")


def write_adapter(folder: Path, targets: tuple[str, ...], family: str = "llama", **settings: Any) -> Any:
    """Write a base and a random adapter on it, and return peft's model of both."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[family])
        model.save_pretrained(folder / "base")
        config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=list(targets), **settings)
        adapted = peft.get_peft_model(model, config)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(0, 0.2)
        adapted.save_pretrained(folder / "adapter")
    return adapted


def merged_by_peft(adapted: Any, folder: Path) -> Mapping[str, torch.Tensor]:
    adapted.merge_and_unload().save_pretrained(folder)
    opened = Checkpoint.open(folder)
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
    base = Checkpoint.open(tmp_path / "base")
    expert = Checkpoint.open(tmp_path / "adapter", base=base)
    assert expert.is_adapter
    changed = {name for name in base.names if not expert.tensor(name).equal(base.tensor(name))}
    assert changed == {name for name in base.names if not expected[name].equal(base.tensor(name))} != set()
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


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern="),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern="),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices="),
        ({"bias": "lora_only"}, "bias must be 'none', given 'lora_only'"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base"),
    ],
)
def test_an_adapter_that_is_more_than_two_factors_is_refused_by_name(
    settings: dict[str, Any], named: str, tmp_path: Path
) -> None:
    write_adapter(tmp_path, LLAMA, **settings)
    with pytest.raises(CheckpointError, match=named):
        Checkpoint.open(tmp_path / "adapter", base=Checkpoint.open(tmp_path / "base"))
