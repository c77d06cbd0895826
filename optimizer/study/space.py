"""The search space that a study asks for, on a base with given tensor names: by its keys, or around a recipe."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evals.documents import read_text
from optimizer.errors import StudyFileError
from optimizer.strict_yaml import LARGEST_FILE, read_yaml
from optimizer.study.schema import SpaceSection, Study
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
    modules, patterns = module_kinds(section)
    if section.from_ is not None and section.takes_method_from_recipe:
        return _space_from(study, names)

    def space(method: str) -> Space:
        return Space.build(
            method,
            study.models.base,
            experts=study.models.experts,
            tensors=names,
            shape=Shape(section.shape.kind, section.shape.n),
            modules=modules,
            ranges={name: ends for name, ends in section.ranges.items() if METHODS[method].parameter(name)},
            patterns=patterns,
        )

    spaces = [space(method) for method in section.methods]
    if section.from_ is not None:
        start = _space_from(study, names)
        if start.method not in section.methods:
            rule = "space.method must hold the method of the recipe that space.from names"
            raise StudyFileError(f"{rule}; given {', '.join(section.methods)}, needed {start.method}")
        spaces = [start if space.method == start.method else space for space in spaces]
    return Choice(tuple(spaces)) if len(spaces) > 1 else spaces[0]


def module_kinds(section: SpaceSection) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """Return the kinds of modules with weights of their own, in order, and the patterns of the study's own kinds."""
    modules = section.modules
    if not isinstance(modules, dict):
        return tuple(modules), {}
    return tuple(modules), {name: patterns for name, patterns in modules.items() if patterns}


def _space_from(study: Study, tensors: Sequence[str]) -> Space:
    """Build the space around the recipe that space.from names."""
    from search_spaces.kinds import kinds_for
    from search_spaces.recipe import Recipe
    from search_spaces.shape import Shape
    from search_spaces.start import regrouped, space_around

    section, path = study.space, Path(study.space.from_ or "")
    recipe = _recipe_in(path, study, tensors)
    experts = tuple(study.models.experts.items())
    merged, known = [", ".join(sorted(names)) for names in (dict(recipe.experts), study.models.experts)]
    if merged != known:
        raise StudyFileError(f"{path}: must merge the experts of the study, {known}; given {merged}")
    given_by_hand = section.model_fields_set
    recipe = Recipe(recipe.method, study.models.base, experts, recipe.settings, kinds=recipe.kinds)
    modules, patterns = module_kinds(section)
    if "modules" in given_by_hand and (kinds := kinds_for(modules, patterns, tensors)) != recipe.kinds:
        recipe = regrouped(recipe, kinds, tensors)
    elif "modules" not in given_by_hand and recipe.tensors and not recipe.kinds:
        recipe = _by_filters(recipe, path, tensors)
    return space_around(
        recipe,
        name=f"from {path.name}",
        tensors=tensors,
        shape=Shape(section.shape.kind, section.shape.n) if "shape" in given_by_hand else None,
        modules=modules if "modules" in given_by_hand else None,
        ranges={name: ends for name, ends in section.ranges.items() if METHODS[recipe.method].parameter(name)},
    )


def _by_filters(recipe: Recipe, path: Path, tensors: Sequence[str]) -> Recipe:
    """Write a recipe by kinds that are its mergekit document's filters, which may tell tensors of a group apart."""
    from search_spaces.groups import group_tensors
    from search_spaces.kinds import kind_name
    from search_spaces.mergekit.reader import filters_of
    from search_spaces.start import regrouped

    if path.suffix == ".json":
        return recipe
    kinds: list[tuple[str, tuple[str, ...]]] = []
    free = [name for names in group_tensors(tensors).values() for name in names]
    for word in filters_of(read_yaml(path, anchors=True)):
        taken = [name for name in free if word in name]
        name = kind_name(word)
        if taken and name not in dict(kinds):
            kinds.append((name, (word,)))
            free = [name for name in free if name not in set(taken)]
    return regrouped(recipe, tuple(kinds), tensors)


def _recipe_in(path: Path, study: Study, tensors: Sequence[str]) -> Recipe:
    """Read a recipe of ours, whose experts go by their names, or a mergekit document's, where they go by sources."""
    from search_spaces.mergekit.reader import from_mergekit
    from search_spaces.recipe import Recipe

    if path.suffix == ".json":
        return Recipe.from_json(read_text(path, limit=LARGEST_FILE, error=StudyFileError))
    document = read_yaml(path, anchors=True)
    names = {source: name for name, source in study.models.experts.items()}
    names |= {os.path.relpath(source): name for source, name in names.items() if os.path.isabs(source)}
    names |= {os.path.relpath(source, path.parent): name for source, name in names.items() if os.path.isabs(source)}
    return from_mergekit(document, tensors, base_dtype="", expert_names=names)
