"""Changes to a checkpoint's files, as tests make them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

UP = "model.layers.0.mlp.up_proj.weight"
Q = "model.layers.1.self_attn.q_proj.weight"
EMBEDDINGS = "model.embed_tokens.weight"


def edit_json(file: Path, **changes: object) -> None:
    content = json.loads(file.read_text())
    content.update(changes)
    file.write_text(json.dumps(content))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def shard(folder: Path) -> dict[str, str]:
    """Split a folder's file in two with an index, and return the weight map."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {name: f"model-0000{1 + (i >= 9)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def safetensors(file: Path, header: object, payload: bytes = b"\0" * 8, *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + payload)
    return file


def adapter(folder: Path, *, rank: int = 4, **config: object) -> Path:
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "bias": "none", "megatron_core": "megatron.core"}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "target_modules": ["q_proj"], **config}))
    generator = torch.Generator().manual_seed(5)
    factors = {
        "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight": torch.randn(rank, 32, generator=generator),
        "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight": torch.randn(32, rank, generator=generator),
    }
    save_file(factors, folder / "adapter_model.safetensors")
    return folder


def cached(base: Path, repository: Path) -> Path:
    """Lay a folder out as the hub cache does: links from a snapshot into blobs."""
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0" * 40)
    for i, file in enumerate(sorted(base.iterdir())):
        file.rename(repository / "blobs" / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    return snapshot
