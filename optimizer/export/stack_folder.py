"""A stack on disk: whole layers of models, copied tensor by tensor into a new model of another depth.

What `merge` does for recipes, for mergekit documents that stack slices: weights, a config that has the new depth, the
tokenizer of the first layer's model, and the stack itself as stack.json and mergekit.yaml.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from optimizer.checkpoints.checkpoint import Checkpoint, count_nonfinite
from optimizer.checkpoints.compare import require_compatible
from optimizer.checkpoints.configs import LAYER_COUNT_KEYS, full_config
from optimizer.checkpoints.tensor_file import write_sharded
from optimizer.errors import CheckpointError, MergeError
from optimizer.export.card import stack_card
from optimizer.export.model_folder import SHARD_BYTES, float_dtype, write_model_folder
from optimizer.merging.merge import code_of, stored_as
from search_spaces.mergekit.stack import Stack

# Settings that say by a layer's place what it is like; a stack moves layers to other places.
PLACES = ("mlp_only_layers", "decoder_sparse_step", "first_k_dense_replace", "interleave_moe_layer_step")


def write_stack(stack: Stack, models: Mapping[str, Checkpoint], out: Path) -> Path:
    """Write a stack to a new model folder that appears only when it is whole, and return the folder.

    Args:
        models: the opened checkpoints by the stack's names.

    Raises:
        CheckpointError: the models do not fit each other, have not the layers, or differ by place.
        MergeError: the folder exists or cannot be written, or a tensor is not finite.
    """
    first, *others = (models[name] for name in dict.fromkeys(name for name, _ in stack.layers))
    for other in others:
        require_compatible(first, other)
    config = _config(stack, models)
    names, anew = stack.tensors(first.names), {name: model.read_anew() for name, model in models.items()}

    def tensor_of(name: str) -> torch.Tensor:
        model, there = stack.source_of(name)
        dtype = stored_as(stack.dtype, first.dtype(there))
        return _scaled(anew[model].tensor(there), stack.scale(name), dtype, name)

    stack.require_scaled(names)
    kinds = {}
    for name in names:
        model, there = stack.source_of(name)
        if there not in models[model].names:
            raise CheckpointError(f"{models[model].folder} has no {there}, which the stack asks for as {name}")
        kinds[name] = code_of(stored_as(stack.dtype, first.dtype(there))), first.shape(there)
    return write_model_folder(
        out,
        first,
        write_weights=lambda folder: write_sharded(folder, kinds, tensor_of, shard_bytes=SHARD_BYTES),
        recipe=stack.to_json(),
        mergekit=stack.to_mergekit(first.names, dtype=stack.dtype or float_dtype(first)),
        card=stack_card(stack, models, out.name),
        dtype=stack.dtype,
        config=config,
    )


def _scaled(tensor: torch.Tensor, scale: float, dtype: torch.dtype, name: str) -> torch.Tensor:
    scaled = tensor if scale == 1.0 or not tensor.is_floating_point() else tensor.float() * scale
    scaled = scaled.to(dtype)
    if bad := count_nonfinite(scaled):
        raise MergeError(f"a stack must be finite: {name} has {bad} NaN or infinite values")
    return scaled


def _config(stack: Stack, models: Mapping[str, Checkpoint]) -> dict[str, Any]:
    """Return the first model's config with the stack's depth, and what it says of each layer moved with the layers."""
    first = models[stack.layers[0][0]]
    config = json.loads(json.dumps(first.config))
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    key = next((key for key in LAYER_COUNT_KEYS if key in text), None)
    if key is None:
        raise CheckpointError(f"{first.folder / 'config.json'} has none of {', '.join(LAYER_COUNT_KEYS)}")
    depth = text[key]
    for place in PLACES:
        if text.get(place) not in (None, 0, 1, []):
            raise CheckpointError(f"{first.folder / 'config.json'}: {place}={text[place]!r} goes by a layer's place")
    full = full_config(first.folder)
    per_layer = {name: value for name, value in (full.get("text_config") or full).items() if isinstance(value, list)}
    for name, value in per_layer.items():
        if len(value) == depth and name in (*text, "layer_types"):
            text[name] = [value[layer] for _, layer in stack.layers]
    text[key] = len(stack.layers)
    return config
