"""Tensor names as well-known checkpoints write them, for any number of layers, and the depth of their groups."""

from __future__ import annotations

from search_spaces.groups import layer_of

_ATTN = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


def _stack(prefix: str, layers: int, attn: tuple[str, ...], mlp: tuple[str, ...]) -> dict[str, str]:
    kinds = {"attn": attn, "mlp": mlp}
    return {
        f"{prefix}.{i}.{name}": f"layer.{i:02d}.{kind}" for i in range(layers) for kind in kinds for name in kinds[kind]
    }


def _weights(module: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{module}.{name}.weight" for name in names)


def _both(*names: str) -> tuple[str, ...]:
    return tuple(f"{name}.{part}" for name in names for part in ("weight", "bias"))


def llama(layers: int = 3, *, tied: bool = True) -> dict[str, str]:
    """Give tensor name -> group; Mistral, SmolLM and Granite write the same names."""
    attn = ("input_layernorm.weight", *_weights("self_attn", _ATTN))
    mlp = ("post_attention_layernorm.weight", *_weights("mlp", _MLP))
    outer = {"model.embed_tokens.weight": "embed", "model.norm.weight": "head"}
    return outer | ({} if tied else {"lm_head.weight": "head"}) | _stack("model.layers", layers, attn, mlp)


def qwen3(layers: int = 3) -> dict[str, str]:
    attn = ("input_layernorm.weight", *_weights("self_attn", (*_ATTN, "q_norm", "k_norm")))
    mlp = ("post_attention_layernorm.weight", *_weights("mlp", _MLP))
    outer = {"model.embed_tokens.weight": "embed", "model.norm.weight": "head", "lm_head.weight": "head"}
    return outer | _stack("model.layers", layers, attn, mlp)


def gemma3(layers: int = 3) -> dict[str, str]:
    """Four norms in a layer; Gemma 2 writes the same without q_norm and k_norm."""
    norms = ("post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    attn = ("input_layernorm.weight", *_weights("self_attn", (*_ATTN, "q_norm", "k_norm")))
    mlp = (*(f"{norm}.weight" for norm in norms), *_weights("mlp", _MLP))
    outer = {"model.embed_tokens.weight": "embed", "model.norm.weight": "head"}
    return outer | _stack("model.layers", layers, attn, mlp)


def mixtral(layers: int = 3) -> dict[str, str]:
    attn = ("input_layernorm.weight", *_weights("self_attn", _ATTN))
    experts = tuple(f"block_sparse_moe.experts.{e}.w{w}.weight" for e in range(8) for w in (1, 2, 3))
    mlp = ("post_attention_layernorm.weight", "block_sparse_moe.gate.weight", *experts)
    outer = {"model.embed_tokens.weight": "embed", "model.norm.weight": "head", "lm_head.weight": "head"}
    return outer | _stack("model.layers", layers, attn, mlp)


def phi2(layers: int = 3) -> dict[str, str]:
    attn = _both("input_layernorm", *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "dense")))
    outer = {"model.embed_tokens.weight": "embed"} | dict.fromkeys(_both("model.final_layernorm", "lm_head"), "head")
    return outer | _stack("model.layers", layers, attn, _both("mlp.fc1", "mlp.fc2"))


def gpt2(layers: int = 3) -> dict[str, str]:
    attn = ("attn.bias", *_both("ln_1", "attn.c_attn", "attn.c_proj"))
    outer = {"transformer.wte.weight": "embed", "transformer.wpe.weight": "embed"}
    outer |= dict.fromkeys(_both("transformer.ln_f"), "head")
    return outer | _stack("transformer.h", layers, attn, _both("ln_2", "mlp.c_fc", "mlp.c_proj"))


def gpt_neox(layers: int = 3) -> dict[str, str]:
    attn = ("attention.rotary_emb.inv_freq", *_both("input_layernorm", "attention.query_key_value", "attention.dense"))
    mlp = _both("post_attention_layernorm", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    outer = {"gpt_neox.embed_in.weight": "embed", "embed_out.weight": "head"}
    outer |= dict.fromkeys(_both("gpt_neox.final_layer_norm"), "head")
    return outer | _stack("gpt_neox.layers", layers, attn, mlp)


def opt(layers: int = 3) -> dict[str, str]:
    """The last norm of a layer and that of the model share a name."""
    attn = _both("self_attn_layer_norm", *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")))
    outer = dict.fromkeys(("model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight"), "embed")
    outer |= dict.fromkeys(_both("model.decoder.final_layer_norm"), "head")
    return outer | _stack("model.decoder.layers", layers, attn, _both("fc1", "fc2", "final_layer_norm"))


ALL = {f.__name__: f for f in (llama, qwen3, gemma3, mixtral, phi2, gpt2, gpt_neox, opt)}


def depth_of(group: str, layers: int) -> float:
    """Give a group's depth in [0, 1]: embed 0, layer i of n at i/(n-1), head 1."""
    layer = layer_of(group)
    if layer is None:
        return 0.0 if group == "embed" else 1.0
    return layer / max(layers - 1, 1)
