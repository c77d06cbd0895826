"""Comparing an expert with its base: what differs is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from optimizer.checkpoints.compare import compare, require_compatible
from optimizer.checkpoints.opening import open_checkpoint
from optimizer.errors import CheckpointError
from tests.optimizer.checkpoints.edits import EMBEDDINGS, UP, Q, edit_json, edit_tensors


def test_an_expert_made_from_the_base_fits(base: Path, expert: Path) -> None:
    assert compare(open_checkpoint(base), open_checkpoint(expert)) == []
    require_compatible(open_checkpoint(base), open_checkpoint(expert))


def test_missing_unknown_and_misshapen_tensors_are_named(base: Path, expert: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[UP]
        tensors["model.layers.0.mlp.extra.weight"] = torch.zeros(2)
        tensors[Q] = torch.zeros(32, 16)
        tensors[EMBEDDINGS] = torch.zeros(260, 32)

    edit_tensors(expert, change)
    one, other = open_checkpoint(base), open_checkpoint(expert)
    text = "\n".join(compare(one, other))
    assert f"the expert lacks '{UP}'" in text
    assert "the expert has 'model.layers.0.mlp.extra.weight', unknown to the base" in text
    assert f"{Q} has shape (32, 32) in {base}/model.safetensors, (32, 16) in {expert}/model.safetensors" in text
    assert "(260, 32)" in text
    assert "vocabularies differ in size" in text
    with pytest.raises(CheckpointError, match=f"expert {expert} does not fit base {base}"):
        require_compatible(one, other)


@pytest.mark.parametrize(
    ("key", "value"), [("rms_norm_eps", 1e-5), ("num_key_value_heads", 4), ("hidden_act", "gelu"), ("rope_theta", 5e5)]
)
def test_config_keys_that_change_the_model_are_named(key: str, value: object, base: Path, expert: Path) -> None:
    content = json.loads((expert / "config.json").read_text())
    content.pop("rope_parameters" if key == "rope_theta" else "none", None)
    (expert / "config.json").write_text(json.dumps({**content, key: value}))
    found = compare(open_checkpoint(base), open_checkpoint(expert))
    assert len(found) == 1
    assert ("rope_parameters" if key == "rope_theta" else key) in found[0]


def test_configs_that_say_the_same_in_other_words_fit(base: Path, expert: Path) -> None:
    content = json.loads((expert / "config.json").read_text())
    theta = content.pop("rope_parameters")["rope_theta"]
    del content["attention_bias"]  # false by default
    content |= {"rope_theta": theta, "rope_scaling": None, "torch_dtype": "bfloat16", "transformers_version": "4.40.0"}
    (expert / "config.json").write_text(json.dumps(content))
    assert compare(open_checkpoint(base), open_checkpoint(expert)) == []


def test_a_model_type_that_is_not_known_is_refused(base: Path, expert: Path) -> None:
    edit_json(expert / "config.json", model_type="marvel")
    with pytest.raises(CheckpointError, match=r"expert/config\.json is not a model that transformers knows"):
        compare(open_checkpoint(base), open_checkpoint(expert))


def test_tokenizers_that_differ_are_named_by_their_first_tokens(base: Path, expert: Path) -> None:
    content = json.loads((expert / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    content["model"]["merges"] = [["a", "b"]]
    (expert / "tokenizer.json").write_text(json.dumps(content))
    edit_json(expert / "tokenizer_config.json", eos_token="<s>")
    text = "\n".join(compare(open_checkpoint(base), open_checkpoint(expert)))
    assert "2 tokens have other ids (base / expert): 'A' is" in text
    assert "the merges differ" in text
    assert "eos_token is '</s>' in the base and '<s>' in the expert" in text


def test_a_tokenizer_written_in_another_way_or_not_at_all_fits(base: Path, expert: Path) -> None:
    content = json.loads((expert / "tokenizer.json").read_text())
    (expert / "tokenizer.json").write_text(json.dumps(content, indent=7))
    assert compare(open_checkpoint(base), open_checkpoint(expert)) == []
    (expert / "tokenizer.json").unlink()
    assert compare(open_checkpoint(base), open_checkpoint(expert)) == []
