"""LoRA adapters: low-rank deltas that turn a base into an expert.

Read by `checkpoints`, which folds them into the base's tensors. Only what can be folded exactly is accepted: plain and
rank-stabilised LoRA on linear layers (arXiv 2106.09685, 2312.03732); every other setting is refused by its name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load_file

from optimizer.errors import CheckpointError
from optimizer.headers import read_header

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
# Keys that describe or restrict the training without changing what the two factors mean.
NEUTRAL_KEYS = {
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform",
    "lora_alpha", "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "revision",
    "target_modules", "task_type", "use_rslora",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class LowRank:
    """The delta scale * up @ down of one tensor: up (out, r), down (r, in); the tensor (out, in), or (in, out)."""

    up: torch.Tensor
    down: torch.Tensor
    scale: float
    is_transposed: bool

    def folded_into(self, base: torch.Tensor) -> torch.Tensor:
        """Return base + delta: float32 arithmetic, rounded once to the base's dtype."""
        delta = self.up.float() @ self.down.float()
        return torch.add(base.float(), delta.T if self.is_transposed else delta, alpha=self.scale).to(base.dtype)


def read_adapter(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, LowRank]:
    """Read the adapter in a folder as one low-rank delta per tensor name of its base.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.
        shapes: the base's tensors, (out, in) for linear layers, (in, out) for GPT-2's (fan_in_fan_out).

    Raises:
        CheckpointError: a setting that cannot be folded, a tensor without its partner, or one that does not fit.
    """
    config = _read_config(folder)
    scale, rank = _scale_and_rank(folder, config)
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        _refuse(folder, f"{WEIGHTS_FILE} is missing (adapters are read from safetensors only)")
    read_header(file)
    factors = load_file(file)
    deltas: dict[str, LowRank] = {}
    for key in sorted(factors):
        module, kind = _module_and_kind(folder, key)
        if kind == "lora_B":
            continue
        name, partner = f"{module}.weight", key.replace(".lora_A.", ".lora_B.")
        if partner not in factors:
            _refuse(folder, f"{key!r} has no partner {partner!r}")
        up, down = factors[partner], factors[key]
        if name not in shapes:
            _refuse(folder, f"{key!r} changes {name!r}, which the base does not have")
        full = (up.shape[0], *down.shape[1:])
        is_transposed = bool(config.get("fan_in_fan_out")) and full[::-1] == shapes[name]
        if up.shape[1:] != (rank,) or down.shape[:1] != (rank,) or (full != shapes[name] and not is_transposed):
            given = f"{tuple(up.shape)} by {tuple(down.shape)}"
            _refuse(folder, f"rank {rank} and shape {shapes[name]} of {name!r} do not fit its factors {given}")
        deltas[name] = LowRank(up, down, scale, is_transposed)
    if 2 * len(deltas) != len(factors):
        _refuse(folder, "it holds lora_B tensors without their lora_A")
    return deltas


def _scale_and_rank(folder: Path, config: Mapping[str, Any]) -> tuple[float, int]:
    for key in sorted(config):
        if config[key] and key not in NEUTRAL_KEYS:
            _refuse(folder, f"{key}={config[key]!r} is not plain LoRA; merge the adapter with peft and give the folder")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float):
        _refuse(folder, f"r must be a positive whole number and lora_alpha a number; given {rank!r} and {alpha!r}")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), rank


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        _refuse(folder, f"{CONFIG_FILE} cannot be read ({error})")
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        _refuse(folder, "peft_type must be 'LORA'")
    if config.get("bias", "none") != "none":
        _refuse(folder, f"bias must be 'none', given {config['bias']!r}")
    if config.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal"):
        _refuse(folder, f"init_lora_weights={config['init_lora_weights']!r} changes the base itself; merge with peft")
    return config


def _module_and_kind(folder: Path, key: str) -> tuple[str, str]:
    module, dot, kind = key.removesuffix(".weight").rpartition(".")
    if not key.startswith(PREFIX) or not dot or kind not in ("lora_A", "lora_B"):
        _refuse(folder, f"tensor {key!r} is not a plain LoRA factor ({PREFIX}<module>.lora_A.weight or lora_B)")
    return module.removeprefix(PREFIX), kind


def _refuse(folder: Path, fault: str) -> NoReturn:
    raise CheckpointError(f"the LoRA adapter in {folder} cannot be folded: {fault}")
