"""The model card of a merge or a stack: front matter, the models, what was merged how, and the scores."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from optimizer.checkpoints.checkpoint import Checkpoint
from optimizer.checkpoints.hub import HUB_ID
from optimizer.merging.merge import Sources
from optimizer.strict_yaml import dump_yaml
from search_spaces import METHODS, Recipe
from search_spaces.kinds import place_tensors
from search_spaces.mergekit.stack import Stack


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
        about += f"`recipe.json` holds all that is needed to make it again. For mergekit: {plain(unsaid)}."
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
    parts = [_head(models.values(), title), about, card.strip()]
    parts += ["## Models", table(["", "model", "fingerprint"], model_rows)]
    parts += ["## Recipe", _recipe_table(recipe, sources.base.names)]
    if scores:
        columns = list(dict.fromkeys(column for row in scores.values() for column in row))
        rows = [[task, *(_number(row.get(column)) for column in columns)] for task, row in scores.items()]
        parts += ["## Scores", table(["", *columns], rows)]
    return "\n\n".join(part for part in parts if part) + "\n"


def stack_card(stack: Stack, models: Mapping[str, Checkpoint], title: str) -> str:
    """Return the README.md of a stack: front matter, the layers, and the tensors that a factor scales."""
    about = (
        f"A stack of {len(stack.layers)} layers of other models, `{stack.digest}`. `recipe.json` and `mergekit.yaml` "
        "hold all that is needed to make it again."
    )
    rows = [[str(i), public_name(models[name]), str(layer)] for i, (name, layer) in enumerate(stack.layers)]
    parts = [_head(models.values(), title), about, table(["layer", "model", "its layer"], rows)]
    if stack.scales:
        parts.append(table(["tensor", "factor"], [[tensor, f"{scale:g}"] for tensor, scale in stack.scales]))
    return "\n\n".join(parts) + "\n"


def _head(models: Iterable[Checkpoint], title: str) -> str:
    """Return a card's front matter and title."""
    front = {
        "base_model": [public_name(model) for model in models],
        "library_name": "transformers",
        "tags": ["merge", "mergefront"],
    }
    return f"---\n{dump_yaml(front)}---\n\n# {plain(title)}"


def public_name(checkpoint: Checkpoint) -> str:
    """Return a hub id, or the name of a local folder without the path to it."""
    if HUB_ID.fullmatch(checkpoint.source) and not Path(checkpoint.source).exists():
        return checkpoint.source
    return re.sub(r"[^\w.-]+", "-", Path(checkpoint.source).expanduser().resolve().name).strip("-.") or "model"


def _recipe_table(recipe: Recipe, names: Iterable[str]) -> str:
    """Write a row per layer group (or tensor with numbers of its own), a column per number that differs."""
    places, own = place_tensors(names, recipe.kinds), set(recipe.tensors)
    groups = [place for place, tensors in places.items() if not own.issuperset(tensors)]
    groups += [name for tensors in places.values() for name in tensors if name in own]
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
    return "\n".join("| " + " | ".join(plain(cell) for cell in line) + " |" for line in lines)


def plain(text: str) -> str:
    """Make a name inert in Markdown and HTML: one line, no cell border, no tag."""
    inert = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return inert.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("|", "&#124;")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
