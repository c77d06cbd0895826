"""The search space that a study asks for, on a base with given tensor names: by its keys, or around a recipe."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evals.documents import read_text
from optimizer.errors import StudyFileError
from optimizer.strict_yaml import LARGEST_FILE, read_yaml
from optimizer.study.schema import Study
from search_spaces.parameters import METHODS

if TYPE_CHECKING:
    from search_spaces.choice import Choice
    from search_spaces.recipe import Recipe
    from search_spaces.space import Space


def space_of(study: Study, tensors: Iterable[str]) -> Space | Choice:
    """Build the study's search space on a base with these tensor names."""
    from search_spaces.choice import Choice  # brings optuna, as does the next
    from search_spaces.shape import Shape
    from search_spaces.space import Space

    section, names = study.space, list(tensors)
    if section.from_ is not None and section.takes_method_from_recipe:
        return _space_from(study, names)

    def space(method: str) -> Space:
        return Space.build(
            method,
            study.models.base,
            experts=study.models.experts,
            tensors=names,
            shape=Shape(section.shape.kind, section.shape.n),
            modules=section.modules,
            ranges={name: ends for name, ends in section.ranges.items() if METHODS[method].parameter(name)},
        )

    spaces = [space(method) for method in section.methods]
    if section.from_ is not None:
        start = _space_from(study, names)
        if start.method not in section.methods:
            rule = "space.method must hold the method of the recipe that space.from names"
            raise StudyFileError(f"{rule}; given {', '.join(section.methods)}, needed {start.method}")
        spaces = [start if space.method == start.method else space for space in spaces]
    return Choice(tuple(spaces)) if len(spaces) > 1 else spaces[0]


def _space_from(study: Study, tensors: Sequence[str]) -> Space:
    """Build the space around the recipe that space.from names."""
    from search_spaces.recipe import Recipe
    from search_spaces.shape import Shape
    from search_spaces.start import space_around

    section, path = study.space, Path(study.space.from_ or "")
    recipe = _recipe_in(path, study, tensors)
    experts = tuple(study.models.experts.items())
    merged, known = [", ".join(sorted(names)) for names in (dict(recipe.experts), study.models.experts)]
    if merged != known:
        raise StudyFileError(f"{path}: must merge the experts of the study, {known}; given {merged}")
    given_by_hand = section.model_fields_set
    return space_around(
        Recipe(recipe.method, study.models.base, experts, recipe.settings),
        name=f"from {path.name}",
        tensors=tensors,
        shape=Shape(section.shape.kind, section.shape.n) if "shape" in given_by_hand else None,
        modules=section.modules if "modules" in given_by_hand else None,
        ranges={name: ends for name, ends in section.ranges.items() if METHODS[recipe.method].parameter(name)},
    )


def _recipe_in(path: Path, study: Study, tensors: Sequence[str]) -> Recipe:
    """Read a recipe of ours, whose experts go by their names, or a mergekit document's, where they go by sources."""
    from search_spaces.mergekit.reader import from_mergekit
    from search_spaces.recipe import Recipe

    if path.suffix == ".json":
        return Recipe.from_json(read_text(path, limit=LARGEST_FILE, error=StudyFileError))
    document = read_yaml(path)
    names = {source: name for name, source in study.models.experts.items()}
    names |= {os.path.relpath(source): name for source, name in names.items() if os.path.isabs(source)}
    names |= {os.path.relpath(source, path.parent): name for source, name in names.items() if os.path.isabs(source)}
    return from_mergekit(document, tensors, base_dtype="", expert_names=names)
