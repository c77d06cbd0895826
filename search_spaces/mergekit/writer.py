"""Recipes to mergekit's YAML documents, as plain dicts; writing the YAML is the caller's.

What is exported gives the same model in mergekit 0.1.5, up to float32 rounding (DARE and DELLA: up to randomness), and
the same bytes here: experts' names and the seed of random masks stand under keys that mergekit passes over.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

from search_spaces.errors import SpaceError
from search_spaces.groups import PASSED, group_of, kind_of, layer_count, layer_of, split_name
from search_spaces.kinds import Kinds, place_tensors
from search_spaces.mergekit.settings import OWN_KEY, folder_name
from search_spaces.parameters import Parameter
from search_spaces.recipe import Recipe, method_spec

# What mergekit says in its own way: by the presence of base_model, and by the base's weight.
_SAID = (("multislerp", "deltas"), ("linear", "sum"))


def to_mergekit(
    recipe: Recipe, tensor_names: Iterable[str], *, out_dtype: str, adapters: Collection[str] = ()
) -> dict[str, object]:
    """Write a recipe as a mergekit document.

    Args:
        recipe: any recipe.
        tensor_names: the base checkpoint's tensor names; they decide the filters.
        out_dtype: dtype the merge is stored in, such as `bfloat16`, while mergekit computes in float32; empty where
            tensors differ: mergekit then computes and stores each in the dtype it comes in.
        adapters: names of experts whose source is a LoRA adapter on the base.

    Returns:
        A dict of plain types, ready for YAML.

    Raises:
        SpaceError: no substring of their names tells two groups apart, or some are passed through.
    """
    names = list(tensor_names)
    if passed := [name for name in names if group_of(name) == PASSED]:
        raise SpaceError("mergekit has no words for tensors that stay the base's", given=f"{len(passed)}: {passed[0]}")
    groups = place_tensors(names, recipe.kinds)
    shared: dict[str, object] = {}
    for parameter in _parameters_written(recipe):
        if parameter.scope == "group":
            shared[parameter.name] = _written(
                {p: recipe.value(parameter.name, group=p) for p in _places(recipe, groups)}, groups, recipe.kinds
            )
        elif parameter.scope == "recipe":
            value = recipe.value(parameter.name)
            shared[parameter.name] = bool(value) if parameter.domain == "switch" else value
    _require_words(recipe, groups)
    models = [_model_written(recipe, name, source, groups, name in adapters) for name, source in recipe.experts]
    document: dict[str, object] = {"merge_method": recipe.method, "base_model": _reference(recipe.base)}
    if _base_is_a_model(recipe):
        models.insert(0, _base_written(recipe, groups))
        if recipe.method == "linear":
            shared = {"normalize": False}
        else:
            del document["base_model"]
    if recipe.method == "passthrough":
        del document["base_model"]
        models = models or [{"model": _reference(recipe.base)}]
    document["models"] = models
    document |= {"parameters": shared} if shared else {}
    document |= {"dtype": "float32", "out_dtype": out_dtype} if out_dtype else {}
    own: dict[str, object] = {"seed": recipe.mask_seed} if method_spec(recipe.method).random else {}
    own |= {"kinds": {name: list(patterns) for name, patterns in recipe.kinds}} if recipe.kinds else {}
    return document | ({OWN_KEY: own} if own else {})


def _parameters_written(recipe: Recipe) -> list[Parameter]:
    """Give what the recipe sets, and what has no default in mergekit; other defaults are the same there."""
    spec, named = method_spec(recipe.method), {setting.parameter for setting in recipe.settings}
    return [p for p in spec.parameters if not p.ours and (p.required or p.name in named)]


def _require_words(recipe: Recipe, groups: Iterable[str]) -> None:
    """Refuse numbers for which mergekit has no word."""
    spec = method_spec(recipe.method)
    equal = 1 / (1 + len(recipe.experts))
    for parameter in spec.parameters:
        for expert in [name for name, _ in recipe.experts] if parameter.scope == "expert" else [""]:
            for group in _places(recipe, groups) if parameter.scope != "recipe" else [""]:
                value = recipe.value(parameter.name, expert=expert, group=group)
                where = " of ".join(filter(None, [parameter.name, expert])) + (f" in {group}" if group else "")
                if recipe.method == "karcher" and parameter.name == "weight":
                    if abs(value - equal) > 1e-9:
                        rule = f"mergekit's karcher gives base and experts equal shares, here {equal:g}"
                        raise SpaceError(rule, given=value, where=where)
                elif parameter.ours and value != parameter.default and (recipe.method, parameter.name) not in _SAID:
                    rule = f"mergekit's {recipe.method} has no {parameter.name}, which is {parameter.default:g} there"
                    raise SpaceError(rule, given=value, where=where, mend="export the model, not its mergekit document")
                if parameter.name == "epsilon" and parameter.scope == "expert":
                    density = recipe.value("density", expert=expert, group=group)
                    if density < 1 and not value < density < 1 - value:
                        rule = (
                            f"mergekit's {recipe.method} wants density - epsilon above 0 and density + epsilon below 1"
                        )
                        raise SpaceError(rule, given=f"density {density:g}, epsilon {value:g}", where=where)


def _base_is_a_model(recipe: Recipe) -> bool:
    """Tell whether the base has a weight of its own, which is what the experts leave of 1."""
    if recipe.method == "multislerp":
        return recipe.value("deltas") == 0.0
    return recipe.method == "linear" or (recipe.method == "nuslerp" and len(recipe.experts) == 1)


def _base_written(recipe: Recipe, groups: Mapping[str, tuple[str, ...]]) -> dict[str, object]:
    names, places = [name for name, _ in recipe.experts], _places(recipe, groups)
    left = {}
    for place in places:
        total = recipe.value("sum", group=place) if recipe.method == "linear" else 1.0
        left[place] = total - math.fsum(recipe.value("weight", expert=e, group=place) for e in names)
    return {"model": _reference(recipe.base), "parameters": {"weight": _written(left, groups, recipe.kinds)}}


def _model_written(
    recipe: Recipe, name: str, source: str, groups: Mapping[str, tuple[str, ...]], adapter: bool
) -> dict[str, object]:
    reference = {"model": {"path": recipe.base}, "lora": {"path": source}} if adapter else _reference(source)
    parameters = {
        parameter.name: _written(
            {p: recipe.value(parameter.name, expert=name, group=p) for p in _places(recipe, groups)},
            groups,
            recipe.kinds,
        )
        for parameter in _parameters_written(recipe)
        if parameter.scope == "expert"
    }
    own_name = {"name": name} if name != folder_name(source) else {}
    return {"model": reference} | own_name | ({"parameters": parameters} if parameters else {})


def _places(recipe: Recipe, groups: Iterable[str]) -> list[str]:
    """Give all groups, and the tensors with numbers of their own."""
    return [*groups, *sorted(recipe.tensors)]


def _reference(source: str) -> object:
    """Write a source so that mergekit reads no revision (`@`) and no adapter (`+`) into it."""
    return {"model": {"path": source}} if "@" in source or "+" in source else source


def _written(values: Mapping[str, float], groups: Mapping[str, tuple[str, ...]], kinds: Kinds) -> object:
    """Write values as a number, or as filters (tensors, kinds, outer groups, attention) with gradients over layers.

    The first filter that fits a tensor holds, in mergekit as among kinds.
    """
    if len(set(values.values())) == 1:
        return next(iter(values.values()))
    rules: list[dict[str, object]] = [{"filter": name, "value": values[name]} for name in values if name not in groups]
    values = {group: value for group, value in values.items() if group in groups}
    for name, patterns in kinds:
        rules += _kind_written(name, patterns, values, groups)
    for group in ("embed", "head"):
        others = [name for other, names in groups.items() if other != group for name in names]
        for word in sorted({_outer_filter(name, others) for name in groups.get(group, ())}):
            rules.append({"filter": word, "value": values[group]})
    attn, mlp = _gradient(values, "attn"), _gradient(values, "mlp")
    if attn is not None and mlp is not None and attn != mlp:
        rules += [{"filter": word, "value": attn} for word in _attn_filters(groups)]
    rest = attn if mlp is None else mlp
    return [*rules, *([] if rest is None else [{"value": rest}])]


def _kind_written(
    kind: str, patterns: Sequence[str], values: Mapping[str, float], groups: Mapping[str, tuple[str, ...]]
) -> list[dict[str, object]]:
    """Write a kind's values as its patterns; what it has outside the layers would read a gradient's first number."""
    gradient = _gradient(values, kind)
    outer = [group for group in groups if layer_of(group) is None and kind_of(group) == kind]
    if gradient is None and len({values[group] for group in outer}) == 1:
        gradient = values[outer[0]]
    first = gradient[0] if isinstance(gradient, list) else gradient
    rules: list[dict[str, object]] = [
        {"filter": name, "value": values[group]} for group in outer if values[group] != first for name in groups[group]
    ]
    if gradient is not None:
        rules += [{"filter": pattern, "value": gradient} for pattern in patterns]
    return rules


def _gradient(values: Mapping[str, float], kind: str) -> float | list[float] | None:
    """Give a kind's values, first layer to last: a number where they are equal, None where no layer has the kind."""
    by_layer = {layer_of(group): value for group, value in values.items() if kind_of(group) == kind}
    if not by_layer:
        return None
    spare = next(iter(by_layer.values()))  # a layer without the kind has no tensor that would read it
    line = [by_layer.get(layer, spare) for layer in range(layer_count(values))]
    return line[0] if len(set(line)) == 1 else line


def _outer_filter(name: str, others: Iterable[str]) -> str:
    """Find the shortest end of a tensor's name that occurs in no other group: prefixes differ between checkpoints."""
    parts = name.split(".")
    ends = [".".join(parts[-n:]) for n in range(min(2, len(parts)), len(parts) + 1)]
    return _apart(ends, list(others), name)


def _attn_filters(groups: Mapping[str, tuple[str, ...]]) -> list[str]:
    def modules(kind: str) -> list[str]:
        return sorted(
            {split_name(n)[2].split(".")[0] for g, names in groups.items() if kind_of(g) == kind for n in names}
        )

    feed_forward = [name for group, names in groups.items() if kind_of(group) == "mlp" for name in names]
    return [_apart([f".{module}."], feed_forward, module) for module in modules("attn")]


def _apart(words: Iterable[str], others: Collection[str], name: str) -> str:
    for word in words:
        if not any(word in other for other in others):
            return word
    raise SpaceError("mergekit tells groups apart by parts of their names, and here none is its own", given=name)
