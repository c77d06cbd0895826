"""Why two checkpoints cannot be merged: their tensors, their configs, their tokenizers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from optimizer.checkpoints.checkpoint import TOKEN_ROWS, Checkpoint
from optimizer.checkpoints.configs import SHOWN, full_config, listed
from optimizer.checkpoints.vocabulary import tokenizer_mismatches
from optimizer.errors import CheckpointError

# Config keys that may differ: they describe training, saving or generation, not what the tensors mean.
FREE_CONFIG_KEYS = {
    "architectures", "dtype", "initializer_range", "pad_token_id", "pretraining_tp", "problem_type", "return_dict",
    "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip


def compare(base: Checkpoint, expert: Checkpoint) -> list[str]:
    """Say why an expert cannot be merged with a base, one plain sentence each; an empty list means it can."""
    return [
        *_tensor_mismatches(base, expert),
        *_config_mismatches(base, expert),
        *tokenizer_mismatches(base.folder, expert.folder, is_matched=expert.is_matched),
    ]


def require_compatible(base: Checkpoint, expert: Checkpoint) -> None:
    """Raise CheckpointError with all that `compare` finds."""
    mismatches = compare(base, expert)
    if mismatches:
        raise CheckpointError(
            f"expert {expert.source} does not fit base {base.source}:\n" + "\n".join(f"- {m}" for m in mismatches)
        )


def _tensor_mismatches(base: Checkpoint, expert: Checkpoint) -> Iterator[str]:
    missing, extra = sorted(set(base.names) - set(expert.names)), sorted(set(expert.names) - set(base.names))
    if missing:
        yield f"the expert lacks {listed(missing)}"
    if extra:
        yield f"the expert has {listed(extra)}, unknown to the base"
    shared = [name for name in base.names if name in expert.entries]
    unlike = [name for name in shared if base.shape(name) != expert.shape(name)]
    for name in unlike[:SHOWN]:
        shapes = f"{base.shape(name)} in {base.file(name)}, {expert.shape(name)} in {expert.file(name)}"
        hint = "; the vocabularies differ in size: rows are matched by tokenizer.json, which both folders must hold"
        hint = hint if name.endswith(TOKEN_ROWS) and not expert.is_matched else ""
        yield f"{name} has shape {shapes}{hint}"
    if len(unlike) > SHOWN:
        yield f"{len(unlike) - SHOWN} more tensors differ in shape"
    for name in shared:
        if base.dtype(name).is_floating_point != expert.dtype(name).is_floating_point:
            yield f"{name} is {base.dtype(name)} in the base and {expert.dtype(name)} in the expert"


def _config_mismatches(base: Checkpoint, expert: Checkpoint) -> Iterator[str]:
    if expert.config is base.config:
        return
    ours, theirs = full_config(base.folder), full_config(expert.folder)
    if expert.is_matched:
        ours, theirs = _without_size(ours), _without_size(theirs)
    for key in sorted(set(ours) | set(theirs)):
        if key.startswith("_") or key in FREE_CONFIG_KEYS or key.endswith("dropout"):
            continue
        if ours.get(key) != theirs.get(key):
            yield f"config.json: {key} is {ours.get(key)!r} in the base and {theirs.get(key)!r} in the expert"


def _without_size(config: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the number of tokens, also of a nested language model."""
    kept = {key: value for key, value in config.items() if key != "vocab_size"}
    return {k: _without_size(v) if k == "text_config" and isinstance(v, dict) else v for k, v in kept.items()}
