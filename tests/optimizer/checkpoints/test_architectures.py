"""Every family of decoders: groups are found, a merge is the formula, and what is exported loads and is resident."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from optimizer.checkpoints.opening import open_checkpoint
from optimizer.checkpoints.resident import merge_target, resident_model, tensor_places
from optimizer.errors import CheckpointError
from optimizer.export.model_folder import export_model
from optimizer.merging.merge import Sources, merge_into
from search_spaces import Recipe, Setting, group_of, group_tensors

LAYERS = 2
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32,
}  # fmt: skip
TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES, **TOKENS, tie_word_embeddings=False),
    "llama-tied": LlamaConfig(**SIZES, **TOKENS, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, **TOKENS),
    "qwen2": Qwen2Config(**SIZES, **TOKENS),
    "qwen3": Qwen3Config(**SIZES, **TOKENS),
    "gemma": GemmaConfig(**SIZES, **TOKENS),
    "gemma2": Gemma2Config(**SIZES, **TOKENS),
    "gemma3": Gemma3TextConfig(**SIZES, **TOKENS),
    "gpt_neox": GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, **TOKENS),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=LAYERS, n_head=4, n_positions=32, **TOKENS),
    "phi": PhiConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, **TOKENS),
    "mixtral": MixtralConfig(**SIZES, **TOKENS, num_local_experts=4),
}


def model_and_expert(config: PreTrainedConfig, folder: Path) -> tuple[Path, Path]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for seed, name in enumerate(("base", "law")):
            if seed:
                for parameter in model.parameters():
                    parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
            model.save_pretrained(folder / name)
    return folder / "base", folder / "law"


@pytest.fixture(params=CONFIGS)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_from_groups_to_a_model(family: str, tmp_path: Path) -> None:
    base, law = model_and_expert(CONFIGS[family], tmp_path)
    sources = Sources.open(base, {"law": str(law)})
    groups = group_tensors(sources.base.names)
    assert list(groups) == ["embed", *(f"layer.{i:02d}.{k}" for i in range(LAYERS) for k in ("attn", "mlp")), "head"]
    weights = {group: 0.1 * i for i, group in enumerate(groups)}
    settings = tuple(Setting("weight", "law", group, weight) for group, weight in weights.items())
    recipe = Recipe("task_arithmetic", str(base), (("law", str(law)),), settings)
    out = export_model(recipe, sources, tmp_path / "out")
    merged, ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, base, law))
    for name in sources.base.names:
        expected = ours[name] + weights[group_of(name)] * (theirs[name] - ours[name])
        torch.testing.assert_close(merged[name], expected, msg=lambda text, name=name: f"{name}: {text}")
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info

    resident = resident_model(sources.base, dtype="auto", device="cpu")
    merge_into(merge_target(tensor_places(resident, sources.base), sources.base), sources, recipe)
    tokens = torch.arange(20).reshape(2, 10)
    assert torch.equal(resident(tokens).logits, loaded.eval()(tokens).logits)


def test_names_without_the_models_prefix_and_old_masks(tmp_path: Path) -> None:
    base, law = model_and_expert(CONFIGS["gpt2"], tmp_path)
    for folder in (base, law):
        tensors = {name.removeprefix("transformer."): t for name, t in load_file(folder / "model.safetensors").items()}
        masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 32, 32).tril() for i in range(LAYERS)}
        save_file(tensors | masks, folder / "model.safetensors", metadata={"format": "pt"})
    sources = Sources.open(base, {"law": str(law)})
    resident = resident_model(sources.base, dtype="auto", device="cpu")
    places = tensor_places(resident, sources.base)
    assert set(places) == set(sources.base.names)
    recipe = Recipe("linear", str(base), (("law", str(law)),), (Setting("weight", "", "", 0.3),))
    merge_into(merge_target(places, sources.base), sources, recipe)
    merged = AutoModelForCausalLM.from_pretrained(export_model(recipe, sources, tmp_path / "out")).eval()
    tokens = torch.arange(10)[None]
    assert torch.equal(resident(tokens).logits, merged(tokens).logits)


def test_what_transformers_makes_in_an_unknown_way_is_refused(tmp_path: Path) -> None:
    base, _ = model_and_expert(CONFIGS["mixtral"], tmp_path)
    resident = resident_model(open_checkpoint(base), dtype="auto", device="cpu")
    resident.model.layers[1].mlp.experts.down_proj.data.mul_(2)
    with pytest.raises(CheckpointError, match=r"makes model.layers.*cannot be searched; `mergefront merge`"):
        tensor_places(resident, open_checkpoint(base))
