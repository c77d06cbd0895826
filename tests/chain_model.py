"""A pico model that writes what it is told to: its next token depends on the last one alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tests.pico import pico_llama

SHARP = 6.0  # of a logit over those of other tokens, in units of what two embeddings have in common


def chain_llama(folder: Path, steps: Mapping[str, str]) -> Path:
    """Write a model that says after each character (or byte, as `\\xd0`) the one that a chain names; return its folder.

    Args:
        steps: from a character to the next. Bytes that are no character of their own stand as latin-1.
    """
    pico_llama(folder, tied=False, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    by_byte = {byte: tokenizer.convert_tokens_to_ids(_shown(byte)) for byte in range(256)}
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.nn.functional.normalize(torch.randn(259, 32, generator=generator), dim=1)
    head = torch.zeros(259, 32)
    for last, following in steps.items():
        head[by_byte[ord(following)]] += SHARP * embeddings[by_byte[ord(last)]]
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):  # a layer adds nothing to what it reads
            tensors[name] = torch.zeros_like(tensor)
    tensors |= {"model.embed_tokens.weight": embeddings, "lm_head.weight": head, "model.norm.weight": torch.ones(32)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _shown(byte: int) -> str:
    """The character by which a byte-level tokenizer writes a byte."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return str(bytes_to_unicode()[byte])
