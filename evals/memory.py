"""Memory for activations: what a backward pass needs of the forward pass, what is free, and recomputation.

A layer that stores only its input is run again in the backward pass: the same numbers for a third more arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.utils.checkpoint import checkpoint

from evals.layerwise import layers_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

SHARE = 4  # activations may take one part in so many of what is free: other workers look at the same memory


def free_bytes(device: torch.device) -> int:
    """Return the memory that is free for tensors on a device; 0 where the system does not tell."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    try:
        told = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in told.splitlines() if line.startswith("MemAvailable:")), 0)


def activation_bytes(config: PreTrainedConfig, tokens: int, width: int) -> int:
    """Estimate the activations that a forward pass over so many tokens stores, a number having so many bytes.

    A layer stores about 20 numbers a token for each of its width and 4 for each of its MLP's; measured on a Llama of
    8 B numbers in bf16: 9 MB a token.
    """
    config = config.get_text_config()
    layer = 20 * config.hidden_size + 4 * inner_size(config)
    return int(tokens * config.num_hidden_layers * layer * width)


def inner_size(config: PreTrainedConfig) -> int:
    """Return the width of the widest feed-forward."""
    given = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return int(max(given) if isinstance(given, list) else given)


def fits_whole(model: PreTrainedModel, tokens: int) -> bool:
    """Tell whether all activations of a pass over so many tokens fit."""
    return activation_bytes(model.config, tokens, model.dtype.itemsize) <= free_bytes(model.device) // SHARE


@contextmanager
def recomputing(model: PreTrainedModel) -> Iterator[None]:
    """Let every layer store only its input, and run again in the backward pass (gradient checkpointing).

    Raises:
        ValueError: the model has no list of layers.
    """
    layers = layers_of(model)
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own is under it
