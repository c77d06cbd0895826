"""Every family of decoders: a merge is the formula, and what is exported loads and is read as transformers reads it."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from evals.engine import Engine
from evals.tokens import Pair
from optimizer.checkpoints.opening import open_checkpoint
from optimizer.checkpoints.resident import add_image_outputs, merge_target, resident_model, tensor_places
from optimizer.errors import CheckpointError
from optimizer.export.model_folder import export_model
from optimizer.merging.gradients import weight_gradients
from optimizer.merging.merge import MergeCache, Sources, merge_into
from optimizer.strict_yaml import read_yaml
from search_spaces import Recipe, Setting, group_of, group_tensors
from search_spaces.groups import PASSED, kind_of
from search_spaces.space import Space
from tests.optimizer.checkpoints.edits import edit_tensors
from tests.pico import byte_tokenizer

LAYERS = 4
SIZES = {
    "vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1}
LINEAR = {f"linear_{side}": n for side, n in (
    ("num_key_heads", 2), ("num_value_heads", 2), ("key_head_dim", 8), ("value_head_dim", 8)
)}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
BY_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 259, "num_kv_shared_layers": 0}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_size": 14,
}
QWEN_VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 4, "out_hidden_size": 32}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
DENSE: dict[str, dict[str, Any]] = {
    "apertus": {}, "cohere2": {}, "ernie4_5": {}, "exaone4": {}, "gemma": {}, "gemma2": {}, "gemma3_text": {},
    "gemma3n_text": {**BY_LAYER, "laurel_rank": 4, "altup_num_inputs": 2, "intermediate_size": [64] * LAYERS,
                     "activation_sparsity_pattern": [0.0] * LAYERS},
    "gemma4_text": {**BY_LAYER, "global_head_dim": 8}, "glm4": {},
    "gpt2": {"n_embd": 32, "n_layer": LAYERS, "n_head": 4}, "gpt_neox": {}, "granite": {}, "hunyuan_v1_dense": {},
    "llama": {}, "ministral": {}, "ministral3": {}, "mistral": {}, "olmo2": {}, "olmo3": {}, "phi": {}, "phi3": {},
    "qwen2": {}, "qwen3": {}, "seed_oss": {}, "smollm3": {},
}  # fmt: skip
MIXTURES: dict[str, dict[str, Any]] = {
    "deepseek_v3": {**ROUTED, **MLA, "first_k_dense_replace": 1, "num_key_value_heads": 4},
    "glm4_moe": {**ROUTED, "first_k_dense_replace": 1}, "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 64, "interleave_moe_layer_step": 2},
    "mixtral": {"num_local_experts": 4}, "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 4}, "qwen2_moe": EXPERTS, "qwen3_moe": EXPERTS,
}  # fmt: skip
HYBRIDS: dict[str, dict[str, Any]] = {
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1},
    "granitemoehybrid": {**MAMBA, "num_local_experts": 4, "shared_intermediate_size": 32,
                         "layer_types": ["mamba", "attention"] * 2},
    "jamba": {"num_experts": 2, "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False,
              "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2": {},
    "lfm2_moe": {**EXPERTS, "layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "state_size": 8, "n_groups": 1},
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1,
                   "hybrid_override_pattern": "M*-E"},
    "qwen3_5_moe_text": {**EXPERTS, **LINEAR}, "qwen3_5_text": LINEAR, "qwen3_next": {**EXPERTS, **LINEAR},
}  # fmt: skip
TOWERS: dict[str, dict[str, Any]] = {
    "gemma3": {"text_config": SIZES, "vision_config": {**VISION, "image_size": 28}, "mm_tokens_per_image": 4},
    "gemma4": {"text_config": {**SIZES, **DENSE["gemma4_text"]}, "audio_config": None,
               "vision_config": {**VISION, "head_dim": 8, "global_head_dim": 8, "num_key_value_heads": 4}},
    "lfm2_vl": {"text_config": {**SIZES, "model_type": "lfm2"},
                "vision_config": {**VISION, "model_type": "siglip2_vision_model"}},
    "llama4": {"text_config": {**SIZES, **MIXTURES["llama4_text"]},
               "vision_config": {**VISION, "image_size": 28, "vision_output_dim": 32, "projector_input_dim": 32,
                                 "projector_output_dim": 32}},
    "mistral3": {"text_config": {**SIZES, "model_type": "mistral"},
                 "vision_config": {**VISION, "image_size": 28, "model_type": "pixtral", "head_dim": 8}},
    "qwen2_5_vl": {"text_config": {**SIZES, "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}, "vision_config": QWEN_VISION},
    "qwen3_5": {"text_config": {**SIZES, **LINEAR}, "vision_config": QWEN_VISION},
}  # fmt: skip
FAMILIES = DENSE | MIXTURES | HYBRIDS | TOWERS
PLAIN = {*HYBRIDS, "qwen3_5"} - {"lfm2"}  # what keeps a state is read without a tree
TOKENS = torch.arange(3, 43).reshape(2, 20)


def loaded(folder: Path, family: str) -> PreTrainedModel:
    auto = AutoModelForImageTextToText if family in TOWERS else AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    add_image_outputs(model)  # without it, transformers' own Llama 4 cannot read text
    return model.eval()


def random_model(family: str, **options: object) -> PreTrainedModel:
    auto = AutoModelForImageTextToText if family in TOWERS else AutoModelForCausalLM
    sizes = {} if family in TOWERS else SIZES
    config = AutoConfig.for_model(family, **(sizes | FAMILIES[family] | options))
    model: PreTrainedModel = auto.from_config(config, dtype=torch.float32)
    return model


def base_and_expert(family: str, folder: Path) -> tuple[Path, Path]:
    """Write a random model, and one that differs from it in every number, buffers too."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = random_model(family)
        numbers = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
        for tensor in numbers:
            if tensor.dim() > 1:
                tensor.normal_(0, 0.1)
        for name in ("base", "law"):
            if name == "law":
                for tensor in numbers:
                    tensor.add_(torch.rand_like(tensor), alpha=0.05)
            model.save_pretrained(folder / name)
            byte_tokenizer().save_pretrained(folder / name)
    return folder / "base", folder / "law"


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_from_groups_to_scores_and_gradients(family: str, tmp_path: Path) -> None:
    base, law = base_and_expert(family, tmp_path)
    sources = Sources.open(base, {"law": str(law)})
    names = sources.base.names
    groups = group_tensors(names)
    kinds = ("attn",) if family in ("mamba2", "nemotron_h") else ("attn", "mlp")
    assert list(groups) == ["embed", *(f"layer.{i:02d}.{k}" for i in range(LAYERS) for k in kinds), "head"]
    weights = {group: 0.1 * i for i, group in enumerate(groups)} | {PASSED: 0.0}
    settings = tuple(Setting("weight", "law", group, weights[group]) for group in groups)
    recipe = Recipe("task_arithmetic", str(base), (("law", str(law)),), settings)

    out = export_model(recipe, sources, tmp_path / "out")
    merged, ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, base, law))
    for name in names:
        expected = ours[name] + weights[group_of(name)] * (theirs[name] - ours[name])
        torch.testing.assert_close(merged[name], expected, msg=lambda text, name=name: f"{name}: {text}")
    assert (out / "mergekit.yaml").exists() == (family not in TOWERS)
    exported = loaded(out, family)

    resident = resident_model(sources.base, dtype="auto", device="cpu")
    places = tensor_places(resident, sources.base)
    merge_into(merge_target(places, sources.base), sources, recipe)
    with torch.inference_mode():
        found = resident(input_ids=TOKENS, use_cache=False).logits
        assert torch.equal(found, exported(input_ids=TOKENS, use_cache=False).logits)
    assert resident.generate(TOKENS[:1], max_new_tokens=3, do_sample=False).shape[1] > TOKENS.shape[1]

    engine = Engine(resident, byte_tokenizer(), token_budget=64)
    assert engine.packs == (family not in PLAIN)
    pairs = [Pair(tuple(range(3, 23)), tuple(range(30 + i, 36 + i))) for i in range(4)]
    pairs.append(Pair((0,), tuple(range(40, 80))))
    for (score, _), pair in zip(engine.loglikelihoods(pairs), pairs, strict=True):
        assert score == pytest.approx(engine._plainly(pair), abs=1e-4 * len(pair.continuation))
    with weight_gradients(resident, places, sources, recipe, MergeCache()) as gradient:
        engine.backward(pairs[:3], lambda x: -x.sum())
    texts = {name for name in names if group_of(name) != PASSED}
    assert {name for (_, name), value in gradient.items() if value} <= texts
    assert (
        sum(bool(gradient["law", name]) for name in texts) > len(texts) / 2
    )  # experts that no token goes to have none


def test_names_without_the_models_prefix_and_old_masks(tmp_path: Path) -> None:
    base, law = base_and_expert("gpt2", tmp_path)
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
    merged = loaded(export_model(recipe, sources, tmp_path / "out"), "gpt2")
    assert torch.equal(resident(TOKENS).logits, merged(TOKENS).logits)


def test_what_transformers_makes_in_an_unknown_way_is_refused(tmp_path: Path) -> None:
    base, _ = base_and_expert("mixtral", tmp_path)
    resident = resident_model(open_checkpoint(base), dtype="auto", device="cpu")
    resident.model.layers[1].mlp.experts.down_proj.data.mul_(2)
    with pytest.raises(CheckpointError, match=r"makes model.layers.*cannot be searched; `mergefront merge`"):
        tensor_places(resident, open_checkpoint(base))


def test_parts_alike_are_told_apart_by_their_names_or_refused(tmp_path: Path) -> None:
    base, _ = base_and_expert("mistral3", tmp_path)  # every norm is 1 in it, and transformers renames them
    checkpoint = open_checkpoint(base)
    resident = resident_model(checkpoint, dtype="auto", device="cpu")
    places = tensor_places(resident, checkpoint)
    layer = resident.model.language_model.layers[1]
    (name,) = (name for name in checkpoint.names if name.endswith("layers.1.input_layernorm.weight"))
    assert places[name].data_ptr() == layer.input_layernorm.weight.data_ptr()


def test_tied_heads_are_one_tensor(tmp_path: Path) -> None:
    base, _ = base_and_expert("llama", tmp_path)
    edit_tensors(base, lambda tensors: tensors.pop("lm_head.weight", None))
    with pytest.raises(CheckpointError, match="no tensor is the head"):
        open_checkpoint(base)


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_kinds_of_a_mixture_have_weights_of_their_own(family: str, tmp_path: Path) -> None:
    base, law = base_and_expert(family, tmp_path)
    sources = Sources.open(base, {"law": str(law)})
    modules = ("attn", "mlp", "experts", "router", *(["shared_expert"] if family == "qwen2_moe" else []))
    space = Space.build(
        "task_arithmetic", str(base), experts={"law": str(law)}, tensors=sources.base.names, shape="uniform",
        modules=modules, ranges={},
    )  # fmt: skip
    recipe = space.recipe({name: (1 + i) / 10 for i, name in enumerate(space.distributions())})
    weights = {kind: recipe.value("weight", expert="law", group=f"layer.02.{kind}") for kind in modules}
    assert len(set(weights.values())) == len(modules)
    resident = resident_model(sources.base, dtype="auto", device="cpu")
    merge_into(merge_target(tensor_places(resident, sources.base), sources.base), sources, recipe)
    out = export_model(recipe, sources, tmp_path / "out")
    assert torch.equal(resident(TOKENS).logits, loaded(out, family)(TOKENS).logits)
    merged, ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, base, law))
    for name in merged:
        kind = "experts" if ".experts." in name else "router" if ".gate." in name or ".router." in name else ""
        kind = kind or ("shared_expert" if "shared_expert" in name else kind_of(group_of(name)))
        expected = torch.lerp(ours[name], theirs[name], weights.get(kind, fmean([weights["attn"], weights["mlp"]])))
        torch.testing.assert_close(merged[name], expected, msg=lambda text, name=name: f"{name}: {text}")
    filters = [rule.get("filter") for rule in read_yaml(out / "mergekit.yaml")["models"][0]["parameters"]["weight"]]
    assert filters[:2] == [".experts.", ".gate." if family == "qwen2_moe" else ".router."]
    assert "layer.02.router" in (out / "README.md").read_text()
