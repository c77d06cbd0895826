"""Pico models on disk: a byte-level Llama of a few thousand parameters, and experts made from it by noise."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from optimizer.demo.models import byte_tokenizer


def pico_llama(
    folder: Path, *, seed: int = 0, layers: int = 2, tied: bool = True, dtype: str = "bfloat16", context: int = 512
) -> Path:
    """Write a random Llama (hidden 32, 259 tokens) with its tokenizer to a new folder and return it."""
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        dtype=dtype,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():  # wide enough that two models disagree on most items
            parameter.data.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.15)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def pico_expert(base: Path, folder: Path, *, seed: int = 1, scale: float = 0.02) -> Path:
    """Write the base plus normal noise of the given scale to a new folder and return it."""
    shutil.copytree(base, folder)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: (tensor.float() + scale * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
        for name, tensor in load_file(base / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
