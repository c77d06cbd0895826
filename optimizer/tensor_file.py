"""A safetensors file written tensor by tensor, so that a shard is never in memory as a whole.

Last step of a merge to disk, the counterpart of `headers`. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from optimizer.headers import ITEM_BYTES

Kind = tuple[str, tuple[int, ...]]  # safetensors dtype code and shape


def write_tensors(file: Path, kinds: Mapping[str, Kind], tensor_of: Callable[[str], torch.Tensor]) -> None:
    """Write a new file; each tensor is asked for once, when it is its turn, and forgotten before the next.

    Args:
        kinds: dtype code and shape of each tensor.
        tensor_of: name to tensor of just that kind, on the CPU.

    Raises:
        OSError: the file cannot be written.
    """
    names = sorted(kinds, key=lambda name: (-ITEM_BYTES[kinds[name][0]], name))  # widest first: all lie aligned
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in names:
        dtype, shape = kinds[name]
        end = position + math.prod(shape) * ITEM_BYTES[dtype]
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    header = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    with file.open("xb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        for name in names:
            tensor = tensor_of(name).contiguous()
            assert tuple(tensor.shape) == kinds[name][1], f"{name} has another shape than was said"
            stream.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            del tensor  # before the next is made
        assert stream.tell() == 8 + len(header) + position, f"{file} holds other dtypes than was said"
