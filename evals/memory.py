"""Devices: what a backward pass needs of the forward pass, what is free where layers lie, recomputation, float64.

A layer that stores only its input is run again in the backward pass: the same numbers for a third more arithmetic.
"""

from __future__ import annotations

import ctypes
import os
from collections import Counter
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
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
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


def layers_by_device(model: PreTrainedModel) -> Counter[torch.device]:
    """Count the layers on each device that a model lies on."""
    try:
        layers = layers_of(model)
    except ValueError:
        return Counter([model.device])
    places = [next((parameter.device for parameter in layer.parameters()), model.device) for layer in layers]
    return Counter(places or [model.device])


def fits_whole(model: PreTrainedModel, tokens: int) -> bool:
    """Tell whether all activations of a pass over so many tokens fit, those of each layer on its device."""
    needed, layers = activation_bytes(model.config, tokens, model.dtype.itemsize), layers_by_device(model)
    return all(needed * n <= free_bytes(at) // SHARE * layers.total() for at, n in layers.items())


def return_freed() -> None:
    """Give the system back the memory that malloc holds without use, where malloc is glibc's; 1 GB takes 30 ms."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def where_float64_is(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor on its own device; on the CPU where the device has no float64 (Apple's MPS)."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor


@contextmanager
def recomputing(model: PreTrainedModel) -> Iterator[None]:
    """Let every layer store only its input, and run again in the backward pass (gradient checkpointing).

    Raises:
        ValueError: the model has no list of layers.
    """
    layers = layers_of(model)
    own = [vars(layer).get("forward") for layer in layers]  # one that accelerate put there, where layers are spread
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer, before in zip(layers, own, strict=True):
            if before is None:
                del layer.forward  # the class's own is under it
            else:
                layer.forward = before
