"""A finished merge as a Hugging Face folder that a person can load, publish and rebuild.

Last step of the flow: weights from `merge`, config and tokenizer of the base byte for byte, and the recipe three times:
as recipe.json for us, as mergekit.yaml for mergekit, and in words in the model card.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from optimizer.checkpoints.checkpoint import Checkpoint
from optimizer.checkpoints.new_folder import new_folder
from optimizer.export.card import model_card
from optimizer.merging.merge import Sources, require_fitting, write_shards
from optimizer.strict_yaml import dump_yaml
from search_spaces import Recipe, SpaceError
from search_spaces.mergekit.writer import to_mergekit

COPIED = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json", "LICENSE*", "NOTICE*",
    "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json",  # of images and sound
)  # fmt: skip
TEMPLATE_FOLDER = "additional_chat_templates"
SHARD_BYTES = 5_000_000_000


def export_model(
    recipe: Recipe,
    sources: Sources,
    out: Path,
    *,
    scores: Mapping[str, Mapping[str, float]] | None = None,
    card: str = "",
) -> Path:
    """Write a merge to a new folder that appears only when it is whole.

    Args:
        recipe: what to merge.
        sources: the opened checkpoints.
        out: the new folder; its name is the model's.
        scores: for the card: row (such as a task) to column (such as "candidate") to number.
        card: Markdown for the card, put below its title.

    Returns:
        The folder.

    Raises:
        MergeError: the recipe and the sources do not fit, the folder exists or cannot be written, or the merge is not
            finite.
    """
    require_fitting(sources, recipe)
    mergekit, unsaid = _mergekit_document(recipe, sources)
    return write_model_folder(
        out,
        sources.base,
        write_weights=lambda folder: write_shards(sources, recipe, folder, shard_bytes=SHARD_BYTES),
        recipe=recipe.to_json(),
        mergekit=mergekit,
        card=model_card(recipe, sources, title=out.name, scores=scores or {}, card=card, unsaid=unsaid),
        dtype=recipe.dtype,
    )


def write_model_folder(
    out: Path,
    like: Checkpoint,
    *,
    write_weights: Callable[[Path], None],
    recipe: str,
    mergekit: Mapping[str, Any] | None,
    card: str,
    dtype: str = "",
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model to a new folder that appears only when it is whole, and return the folder.

    Args:
        like: whose config, tokenizer, templates and licences are copied.
        write_weights: writes the tensors into the folder it is given.
        recipe: recipe.json.
        mergekit: mergekit.yaml; None where there is none.
        card: README.md.
        dtype: of the weights, where the config must name another than it does.
        config: config.json, where it is not the copied one.

    Raises:
        MergeError: the folder exists or cannot be written.
    """
    with new_folder(out) as folder:
        write_weights(folder)
        copy_files(like.folder, folder)
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if dtype:
            say_dtype(folder / "config.json", dtype)
        (folder / "recipe.json").write_text(recipe + "\n", encoding="utf-8")
        if mergekit is not None:
            (folder / "mergekit.yaml").write_text(dump_yaml(mergekit), encoding="utf-8")
        (folder / "README.md").write_text(card, encoding="utf-8")
    return out


def _mergekit_document(recipe: Recipe, sources: Sources) -> tuple[dict[str, Any] | None, str]:
    """Write the recipe in mergekit's words, or None and why mergekit has none for it."""
    base = sources.base
    adapters = [name for name, expert in sources.experts.items() if expert.is_adapter]
    try:
        document = to_mergekit(recipe, base.names, out_dtype=recipe.dtype or float_dtype(base), adapters=adapters)
    except SpaceError as error:
        return None, str(error)
    if any(expert.is_matched for expert in sources.experts.values()):
        document["tokenizer_source"] = "base"  # it then drops rows without a token, also the base's own
    return document, ""


def float_dtype(checkpoint: Checkpoint) -> str:
    """Return the dtype of all floating tensors, such as `bfloat16`; empty where they differ."""
    found = {checkpoint.dtype(name) for name in checkpoint.names}
    names = sorted(str(dtype).removeprefix("torch.") for dtype in found if dtype.is_floating_point)
    return names[0] if len(names) == 1 else ""


def say_dtype(file: Path, dtype: str) -> None:
    """Have a config.json name the dtype of its weights, which transformers loads them in."""
    config = json.loads(file.read_text(encoding="utf-8"))
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            part["torch_dtype" if "torch_dtype" in part and "dtype" not in part else "dtype"] = dtype
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def copy_files(source: Path, folder: Path) -> None:
    """Copy config, tokenizer, templates and licences byte for byte."""
    for pattern in COPIED:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
    if (source / TEMPLATE_FOLDER).is_dir():
        shutil.copytree(source / TEMPLATE_FOLDER, folder / TEMPLATE_FOLDER)
