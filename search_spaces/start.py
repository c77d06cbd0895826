"""A space around a recipe: what may vary is what its numbers need, and the recipe is one of the points scored first.

Rule: a range reaches from what changes nothing (the base's 0 and the expert's 1 for weights, a method's default for the
rest) as far as the recipe's numbers go, and is at least what the method searches by itself. The shape is the simplest
that holds the numbers exactly: one weight, a slope, a curve of few points, or a weight for each layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from search_spaces.errors import SpaceError
from search_spaces.groups import kind_of, layer_count
from search_spaces.kinds import Kinds, checked_kinds, place_tensors
from search_spaces.parameters import Parameter
from search_spaces.ranges import Range
from search_spaces.recipe import Recipe, Setting, method_spec
from search_spaces.shape import Shape
from search_spaces.space import Anchor, Space

POINTS = range(3, 9)  # of the curves that are tried
MODULES = ((), ("attn", "mlp"), ("attn", "mlp", "embed", "head"))


def space_around(
    recipe: Recipe,
    *,
    name: str,
    tensors: Iterable[str],
    shape: Shape | None,
    modules: tuple[str, ...] | None,
    ranges: Mapping[str, Range],
) -> Space:
    """Build a space that holds a recipe, with the recipe as its last anchor.

    Args:
        name: of the anchor.
        tensors: the base checkpoint's tensor names.
        shape, modules: a person's choice, or None for the simplest that holds the recipe.
        ranges: a person's choice for some parameters.

    Raises:
        SpaceError: the recipe has numbers no space can hold, or not the one that was chosen.
    """
    names = tuple(tensors)
    groups = tuple(place_tensors(names, recipe.kinds))
    recipe.require_places(names)
    _require_plain(recipe)
    bounds = _ranges(recipe, groups) | dict(ranges)
    curves = [Shape("curve", n) for n in POINTS if n < layer_count(groups)]
    for tried in [shape] if shape else [Shape("uniform"), Shape("slope"), *curves, Shape("layers")]:
        for chosen in _module_choices(groups, recipe) if modules is None else [modules]:
            space = Space(recipe.method, recipe.base, recipe.experts, groups, tried, chosen, bounds, recipe.kinds)
            params = space.params_of(recipe)
            if params is not None:
                return replace(space, start=Anchor(name, params))
    raise SpaceError(
        "the space holds the recipe it starts from, exactly",
        given=recipe.short(),
        where="space.from",
        mend="leave shape and modules out, or write shape: layers and modules: [attn, mlp, embed, head]",
    )


def regrouped(recipe: Recipe, kinds: Kinds, tensors: Iterable[str]) -> Recipe:
    """Write a recipe by the places of other kinds; a tensor whose number differs from its place's keeps its own."""
    names, settings = place_tensors(tensors, kinds), []
    for parameter in method_spec(recipe.method).parameters:
        for expert in ["", *(name for name, _ in recipe.experts)] if parameter.scope == "expert" else [""]:
            own = [s for s in recipe.settings if (s.parameter, s.expert) == (parameter.name, expert)]
            settings += [setting for setting in own if not setting.group]
            if all(not setting.group for setting in own):
                continue
            for place, inside in names.items():
                values = {name: recipe.value(parameter.name, expert=expert, group=name) for name in inside}
                usual = Counter(values.values()).most_common(1)[0][0]
                settings.append(Setting(parameter.name, expert, place, usual))
                settings += [Setting(parameter.name, expert, n, v) for n, v in values.items() if v != usual]
    return Recipe(
        recipe.method, recipe.base, recipe.experts, tuple(settings), recipe.dtype, recipe.seed, checked_kinds(kinds)
    )


def _module_choices(groups: Iterable[str], recipe: Recipe) -> list[tuple[str, ...]]:
    """Give the sets of modules with weights of their own that are tried, of those the model has: always its kinds."""
    present, own = {kind_of(group) for group in groups}, tuple(name for name, _ in recipe.kinds)
    return list(dict.fromkeys((*own, *(kind for kind in kinds if kind in present)) for kinds in MODULES))


def _require_plain(recipe: Recipe) -> None:
    spec = method_spec(recipe.method)
    if recipe.tensors:
        rule = "a space goes by groups of tensors, and the recipe has numbers for single ones"
        raise SpaceError(rule, given=min(recipe.tensors), where="space.from")
    fixed = dict(spec.fixed_in_search)
    for parameter in spec.parameters:
        kept = fixed.get(parameter.name, parameter.default)
        if parameter.domain == "switch" and recipe.value(parameter.name) != kept:
            given = f"{parameter.name} {recipe.value(parameter.name):g}"
            raise SpaceError(
                f"a search of {spec.name} has {parameter.name} {kept:g}",
                given=given,
                where="space.from",
                mend=f"write {parameter.name}: {'true' if kept else 'false'} in the recipe",
            )


def _ranges(recipe: Recipe, groups: tuple[str, ...]) -> dict[str, Range]:
    spec, found = method_spec(recipe.method), {}
    for parameter in spec.parameters:
        numbers = list(_numbers(recipe, parameter, groups))
        if parameter.name == spec.scale:
            found[parameter.name] = min(0.0, *numbers), max(1.0, *numbers)
            continue
        searched = parameter.is_searched(len(recipe.experts))
        own = (parameter.low, parameter.high) if searched else ()
        if parameter.domain != "switch" and (searched or set(numbers) != {parameter.default}):
            found[parameter.name] = min(parameter.default, *own, *numbers), max(parameter.default, *own, *numbers)
    return found


def _numbers(recipe: Recipe, parameter: Parameter, groups: tuple[str, ...]) -> Iterator[float]:
    """Give a parameter's numbers; one for each expert at most, unless it is the scale."""
    for expert in [name for name, _ in recipe.experts] if parameter.scope == "expert" else [""]:
        places = groups if parameter.scope != "recipe" else ("",)
        values = {recipe.value(parameter.name, expert=expert, group=place) for place in places}
        if len(values) > 1 and parameter.name != method_spec(recipe.method).scale:
            rule = f"a space has one {parameter.name} for all groups"
            raise SpaceError(rule, given=", ".join(f"{value:g}" for value in sorted(values)), where="space.from")
        yield from values
