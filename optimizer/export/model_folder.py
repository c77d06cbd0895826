"""A finished merge as a Hugging Face folder that a person can load, publish and rebuild.

Last step of the flow: weights from `merge`, config and tokenizer of the base byte for byte, and the recipe three times:
as recipe.json for us, as mergekit.yaml for mergekit, and in words in the model card.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from optimizer.checkpoints.checkpoint import Checkpoint
from optimizer.checkpoints.new_folder import new_folder
from optimizer.checkpoints.opening import HUB_ID
from optimizer.merging.merge import Sources, write_shards
from search_spaces import METHODS, Recipe, SpaceError, group_tensors
from search_spaces.mergekit.writer import to_mergekit

COPIED = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json", "LICENSE*", "NOTICE*",
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
        MergeError: the folder exists or cannot be written, or the merge is not finite.
    """
    from optimizer.strict_yaml import dump_yaml

    base = sources.base
    with new_folder(out) as folder:
        write_shards(sources, recipe, folder, shard_bytes=SHARD_BYTES)
        copy_files(base.folder, folder)
        (folder / "recipe.json").write_text(recipe.to_json() + "\n", encoding="utf-8")
        adapters = [name for name, expert in sources.experts.items() if expert.is_adapter]
        if recipe.dtype:
            say_dtype(folder / "config.json", recipe.dtype)
        unsaid = ""
        try:
            mergekit = to_mergekit(recipe, base.names, out_dtype=recipe.dtype or float_dtype(base), adapters=adapters)
            if any(expert.is_matched for expert in sources.experts.values()):
                mergekit["tokenizer_source"] = "base"  # it then drops rows without a token, also the base's own
            (folder / "mergekit.yaml").write_text(dump_yaml(mergekit), encoding="utf-8")
        except SpaceError as error:
            unsaid = str(error)
        text = model_card(recipe, sources, title=out.name, scores=scores or {}, card=card, unsaid=unsaid)
        (folder / "README.md").write_text(text, encoding="utf-8")
    return out


def model_card(
    recipe: Recipe,
    sources: Sources,
    *,
    title: str,
    scores: Mapping[str, Mapping[str, float]],
    card: str,
    unsaid: str = "",
) -> str:
    """Return the README.md of a merge: front matter, the models, the numbers by layer group, and the scores.

    Args:
        unsaid: why there is no mergekit document beside it; empty where there is one.
        title, scores, card: as in `export_model`.
    """
    models = {"base": sources.base, **{name: sources.experts[name] for name, _ in recipe.experts}}
    about = (
        f"A merge of {len(models)} models by {recipe.method} ({METHODS[recipe.method].source}), "
        f"recipe `{recipe.digest}`. "
    )
    if unsaid:
        about += f"`recipe.json` holds all that is needed to make it again. For mergekit: {_plain(unsaid)}."
    else:
        about += (
            "`recipe.json` and `mergekit.yaml` hold all that `mergefront merge` needs to make it again, to the bit."
        )
        if METHODS[recipe.method].random:
            about += " mergekit draws random masks of its own: from the same document it makes another model."
    model_rows = [[name, public_name(model), f"`{model.fingerprint}`"] for name, model in models.items()]
    about += " The tokenizer and the vocabulary are the base's."
    matched = [f"{name} ({model.left_out} left out)" for name, model in models.items() if model.is_matched]
    if matched:
        about += f" Rows of other tokens were matched to it by token: {', '.join(matched)}."
    parts = [card_head(models.values(), title), about, card.strip()]
    parts += ["## Models", table(["", "model", "fingerprint"], model_rows)]
    parts += ["## Recipe", _recipe_table(recipe, sources.base.names)]
    if scores:
        columns = list(dict.fromkeys(column for row in scores.values() for column in row))
        rows = [[task, *(_number(row.get(column)) for column in columns)] for task, row in scores.items()]
        parts += ["## Scores", table(["", *columns], rows)]
    return "\n\n".join(part for part in parts if part) + "\n"


def card_head(models: Iterable[Checkpoint], title: str) -> str:
    """Return a card's front matter and title."""
    from optimizer.strict_yaml import dump_yaml

    front = {
        "base_model": [public_name(model) for model in models],
        "library_name": "transformers",
        "tags": ["merge", "mergefront"],
    }
    return f"---\n{dump_yaml(front)}---\n\n# {_plain(title)}"


def public_name(checkpoint: Checkpoint) -> str:
    """Return a hub id, or the name of a local folder without the path to it."""
    if HUB_ID.fullmatch(checkpoint.source) and not Path(checkpoint.source).exists():
        return checkpoint.source
    return re.sub(r"[^\w.-]+", "-", Path(checkpoint.source).expanduser().resolve().name).strip("-.") or "model"


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


def _recipe_table(recipe: Recipe, names: Iterable[str]) -> str:
    """One row per layer group (or tensor with numbers of its own), one column per number that differs between them."""
    groups = [*group_tensors(names), *sorted(recipe.tensors)]
    columns: dict[str, list[float]] = {}
    for parameter in METHODS[recipe.method].parameters:
        for expert in [name for name, _ in recipe.experts] if parameter.scope == "expert" else [""]:
            inside = groups if parameter.scope != "recipe" else [""] * len(groups)
            column = [recipe.value(parameter.name, expert=expert, group=group) for group in inside]
            columns[f"{expert} {parameter.name}".strip()] = column
    constant = [f"{name} {_number(column[0])}" for name, column in columns.items() if len(set(column)) == 1]
    varied = {name: column for name, column in columns.items() if len(set(column)) > 1}
    line = f"In every group: {', '.join(constant)}." if constant else ""
    rows = [[group, *(_number(column[i]) for column in varied.values())] for i, group in enumerate(groups)]
    grid = table(["group", *varied], rows) if varied else ""
    return "\n\n".join(part for part in (line, grid) if part)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table whose cells show as they stand."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_plain(cell) for cell in line) + " |" for line in lines)


def _plain(text: str) -> str:
    """Make a name inert in Markdown and HTML: one line, no cell border, no tag."""
    inert = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return inert.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("|", "&#124;")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
