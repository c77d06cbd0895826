"""LoRA adapters: low-rank deltas that turn a base into an expert.

Read by `checkpoints`, which folds them into the base's tensors. Here is what two factors say exactly: plain and
rank-stabilised LoRA on linear layers (arXiv 2106.09685, 2312.03732), with ranks and alphas by module. Every other
adapter is left to `folding`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from optimizer.checkpoints.headers import read_header, read_json
from optimizer.errors import CheckpointError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
MAX_RANK = 65_536
REPEATS = re.compile(r"[*+{]")
REPEATED_GROUP = re.compile(r"\)[*+{]")
MOST_REPEATS = 8  # in a pattern: the time of a search grows by a name's length with each
# Keys that describe or restrict the training without changing what the two factors mean.
NEUTRAL_KEYS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "rank_pattern",
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


def is_plain(folder: Path) -> bool:
    """Tell whether an adapter is its factors and nothing else.

    Raises:
        CheckpointError: its config cannot be read, its weights are missing, or its training changed the base itself.
    """
    if not (folder / WEIGHTS_FILE).is_file():
        _refuse(folder, f"{WEIGHTS_FILE} is missing (adapters are read from safetensors only)")
    config = _read_config(folder)
    is_factors = config.get("peft_type") == "LORA" and config.get("bias", "none") == "none"
    # peft puts the base's own embeddings or head into the file where it adapts them
    others = (".lora_embedding_", ".base_layer.")
    is_linear = not any(word in key for key in read_header(folder / WEIGHTS_FILE).entries for word in others)
    return is_factors and is_linear and not any(config[key] and key not in NEUTRAL_KEYS for key in config)


def read_adapter(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, LowRank]:
    """Read a plain adapter in a folder as one low-rank delta per tensor name of its base.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.
        shapes: the base's tensors, (out, in) for linear layers, (in, out) for GPT-2's (fan_in_fan_out).

    Raises:
        CheckpointError: a rank or alpha that is none, a tensor without its partner, or one that does not fit.
    """
    config = _read_config(folder)
    factors = read_weights(folder)
    deltas: dict[str, LowRank] = {}
    for key in sorted(factors):
        module, kind = _module_and_kind(folder, key)
        if kind == "lora_B":
            continue
        name, partner = f"{module}.weight", key.replace(".lora_A.", ".lora_B.")
        if partner not in factors:
            _refuse(folder, f"{key!r} has no partner {partner!r}")
        up, down = factors[partner], factors[key]
        scale, rank = _scale_and_rank(folder, config, module)
        if name not in shapes:
            _refuse(folder, f"{key!r} changes {name!r}, which the base does not have")
        full = (*up.shape[:1], *down.shape[1:])
        is_transposed = bool(config.get("fan_in_fan_out")) and full[::-1] == shapes[name]
        if up.shape[1:] != (rank,) or down.shape[:1] != (rank,) or (full != shapes[name] and not is_transposed):
            given = f"{tuple(up.shape)} by {tuple(down.shape)}"
            _refuse(folder, f"rank {rank} and shape {shapes[name]} of {name!r} do not fit its factors {given}")
        deltas[name] = LowRank(up, down, scale, is_transposed)
    if 2 * len(deltas) != len(factors):
        _refuse(folder, "it holds lora_B tensors without their lora_A")
    return deltas


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Read an adapter's tensors into memory, after its header has been checked."""
    read_header(folder / WEIGHTS_FILE)
    try:
        return load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        _refuse(folder, f"{WEIGHTS_FILE} cannot be read ({error})")


def _scale_and_rank(folder: Path, config: Mapping[str, Any], module: str) -> tuple[float, int]:
    rank = _of_pattern(folder, config, "rank_pattern", module, config.get("r"))
    alpha = _of_pattern(folder, config, "alpha_pattern", module, config.get("lora_alpha"))
    is_number = type(alpha) in (int, float) and math.isfinite(alpha)
    if type(rank) is not int or not 1 <= rank <= MAX_RANK or not is_number:
        rule = f"r must be a whole number from 1 to {MAX_RANK:,} and lora_alpha a number"
        _refuse(folder, f"{rule}; given {rank!r:.80} and {alpha!r:.80}")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), rank


def _of_pattern(folder: Path, config: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
    """Return the value of the first pattern, a regular expression, that fits the end of a module's name."""
    patterns = config.get(key) or {}
    try:
        return next((value for p, value in patterns.items() if re.match(rf"(.*\.)?({p})$", module)), default)
    except (AttributeError, OverflowError, RecursionError, re.error) as error:
        _refuse(folder, f"{key} must map regular expressions to numbers, given {patterns!r:.80} ({error})")


def _read_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / CONFIG_FILE, unique=True)
    initial = config.get("init_lora_weights", True)
    if initial not in (True, False, "gaussian", "orthogonal"):
        mend = "merge it with peft into its own base and give the folder"
        _refuse(folder, f"init_lora_weights={initial!r:.80} changes the base itself; {mend}")
    for key in ("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"):
        given = config.get(key)
        for pattern in [given] if isinstance(given, str) else given if isinstance(given, dict) else ():
            if len(REPEATS.findall(pattern)) > MOST_REPEATS or REPEATED_GROUP.search(pattern):
                rule = f"a pattern may repeat {MOST_REPEATS} times and no group, or its search need not end"
                _refuse(folder, f"{key}: {rule}; given {pattern!r:.80}")
    return config


def _module_and_kind(folder: Path, key: str) -> tuple[str, str]:
    module, dot, kind = key.removesuffix(".weight").rpartition(".")
    if not key.startswith(PREFIX) or not dot or kind not in ("lora_A", "lora_B"):
        _refuse(folder, f"tensor {key!r} is not a plain LoRA factor ({PREFIX}<module>.lora_A.weight or lora_B)")
    return module.removeprefix(PREFIX), kind


def _refuse(folder: Path, fault: str) -> NoReturn:
    raise CheckpointError(f"the adapter in {folder} cannot be folded: {fault}")
