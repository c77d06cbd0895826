"""Safetensors files written tensor by tensor, so that a shard is never in memory as a whole.

Last step of a merge to disk, the counterpart of `headers`. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from optimizer.checkpoints.headers import ITEM_BYTES

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
Kind = tuple[str, tuple[int, ...]]  # safetensors dtype code and shape


def write_sharded(
    folder: Path, kinds: Mapping[str, Kind], tensor_of: Callable[[str], torch.Tensor], *, shard_bytes: int
) -> None:
    """Write the tensors of a model into a folder: model.safetensors, or shards with an index where it is larger.

    Args:
        kinds, tensor_of: as in `write_tensors`.
        shard_bytes: size of a shard at most; a larger tensor has a shard of its own.
    """
    shards = _planned(kinds, shard_bytes)
    count = len(shards)
    files = [WEIGHTS_FILE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for file, shard in zip(files, shards, strict=True):
        write_tensors(folder / file, {name: kinds[name] for name in shard}, tensor_of)
    if count > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(map(_bytes, kinds.values()))}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


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
        end = position + _bytes(kinds[name])
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


def _planned(kinds: Mapping[str, Kind], shard_bytes: int) -> list[list[str]]:
    """Fill shards in name order."""
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name in sorted(kinds):
        if _bytes(kinds[name]) > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= _bytes(kinds[name])
    return shards


def _bytes(kind: Kind) -> int:
    dtype, shape = kind
    return math.prod(shape) * ITEM_BYTES[dtype]
