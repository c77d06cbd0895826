"""Recipes from mergekit's YAML documents, as plain dicts; reading the YAML is the caller's.

Read in: `models:` or `slices:` that are the whole model, with scalars, gradients over the layers and substring filters.
Anything else is refused by name.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from search_spaces.dtypes import stored_dtype
from search_spaces.errors import SpaceError
from search_spaces.groups import group_tensors, layer_count, split_name
from search_spaces.kinds import Kinds, checked_kinds, place_tensors
from search_spaces.mergekit.settings import (
    OWN_KEY,
    SWITCHES,
    Document,
    folder_name,
    interpolate,
    mapping,
    matching,
    only,
    present_mapping,
    text,
    without_remarks,
)
from search_spaces.mergekit.slices import flattened
from search_spaces.parameters import MethodSpec, Parameter, to_float
from search_spaces.recipe import Recipe, Setting, method_spec

# What mergekit takes and a recipe has no word for: read where it is set to what the recipe does anyway.
_FIXED: dict[str, dict[str, float]] = {
    "task_arithmetic": {"rescale": 0.0},
}
# Methods for which base_model may be left out: the first model is the base, and is merged as one of the models.
_BASELESS = ("linear", "nuslerp", "multislerp", "karcher", "passthrough")
_MASKED = ("task_arithmetic", "ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs",
           "breadcrumbs_ties", "sce")  # fmt: skip
_TOP_KEYS = ("merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype", "tokenizer_source",
             "tokenizer", OWN_KEY)  # fmt: skip
_ROUNDING = 1e-12  # how far weights that sum to 1 may miss it in float64


def from_mergekit(
    document: Mapping[str, object],
    tensor_names: Iterable[str],
    *,
    base_dtype: str,
    expert_names: Mapping[str, str] | None = None,
) -> Recipe:
    """Read a mergekit document as a recipe.

    It is computed in float32 whatever the document says, and stored in its `out_dtype`, else its `dtype`.

    Args:
        document: what the YAML holds.
        tensor_names: the base checkpoint's tensor names; filters and gradients are resolved on them.
        base_dtype: dtype of all the base's floating tensors, such as `bfloat16`; empty where they differ.
        expert_names: source -> name; a source not named here has the name beside it, else its folder's.

    Raises:
        SpaceError: the document asks for something a recipe cannot hold.
    """
    names = tuple(tensor_names)
    kinds = _own_kinds(document)
    flat = flattened(document, group_tensors(names))
    recipe = _Reader(flat, place_tensors(names, kinds), expert_names or {}, kinds).recipe()
    return replace(recipe, dtype=stored_dtype(document, base_dtype))


@dataclass(frozen=True, slots=True)
class _Model:
    """An entry of `models:`: where it stands, its source, the name beside it and its parameters."""

    where: str
    source: str
    name: str
    parameters: Mapping[str, object]


class _Reader:
    """One document on one checkpoint's groups."""

    def __init__(
        self,
        document: Mapping[str, object],
        groups: Mapping[str, tuple[str, ...]],
        expert_names: Mapping[str, str],
        kinds: Kinds,
    ) -> None:
        document = without_remarks(present_mapping(document, "the document"))
        _only_of_recipe(document, _TOP_KEYS, "the document")
        self.document, self.groups, self.expert_names, self.kinds = document, groups, expert_names, kinds
        self.layers = layer_count(groups)
        self.spec = _known_method(document.get("merge_method"))
        self.baseless = document.get("base_model") is None and self.spec.name in _BASELESS
        self.base = "" if self.baseless else self._source(document.get("base_model"), "base_model")
        self.shared = mapping(document.get("parameters"), "parameters")
        self.models = self._read_models(document.get("models"))
        if self.baseless:
            self.base = self.models[0].source

    def recipe(self) -> Recipe:
        """Resolve every parameter for every tensor, and gather the values that groups share."""
        self._check_surroundings()
        experts: dict[str, _Model] = self._experts()
        settings: list[Setting] = []
        if self.spec.name == "multislerp" and not self.baseless:
            settings.append(Setting("deltas", "", "", 1.0))
        for parameter in self.spec.parameters:
            for name, model in experts.items() if parameter.scope == "expert" else [("", None)]:
                scopes = (self.shared, model.parameters) if model else (self.shared,)
                needed = parameter.required or parameter.name in (self.spec.scale, "sum")
                if needed or any(parameter.name in scope for scope in scopes):
                    values = self._values(parameter, model)
                    if parameter.name != "sum" or set(values.values()) != {parameter.default}:
                        settings += self._compact(parameter, name, values)
        sources = tuple((name, model.source) for name, model in experts.items())
        recipe = Recipe(self.spec.name, self.base, sources, tuple(settings), kinds=self.kinds)
        seed = self._seed()
        return recipe if seed in ("", recipe.mask_seed) else replace(recipe, seed=seed)

    def _seed(self) -> str:
        own = _own(self.document)
        return text(own["seed"], f"{OWN_KEY}.seed") if "seed" in own else ""

    def _read_models(self, entries: object) -> list[_Model]:
        if not isinstance(entries, list) or not entries:
            raise SpaceError("models is a list of model and parameters", given=entries, where="models")
        models = []
        for i, entry in enumerate(entries):
            where = f"models[{i}]"
            _only_of_recipe(present_mapping(entry, where), ("model", "name", "parameters"), where)
            parameters = mapping(entry.get("parameters"), f"{where}.parameters")
            name = text(entry.get("name", ""), f"{where}.name")
            models.append(_Model(where, self._source(entry.get("model"), f"{where}.model"), name, parameters))
        sources = [model.source for model in models]
        if len(set(sources)) != len(sources):
            raise SpaceError("a model is listed once", given=", ".join(sources), where="models")
        return models

    def _source(self, reference: object, where: str) -> str:
        """Read a model reference: a path, a dict with a path, or an adapter on the base (its own path then)."""
        if isinstance(reference, str) and reference and "@" not in reference:
            path, plus, lora = reference.partition("+")
        elif isinstance(reference, Mapping) and set(reference) <= {"model", "lora"}:
            path, lora = _path(reference.get("model"), where), _path(reference.get("lora", ""), where)
            plus = lora
        else:
            mend = "write the folder of each checkpoint, and the base as base_model"
            raise SpaceError(
                "a model is a folder or hub id without a revision", given=reference, where=where, mend=mend
            )
        if plus and (where == "base_model" or path != self.base or not lora):
            raise SpaceError("an adapter stands on the base", given=reference, where=where)
        return lora or path

    def _experts(self) -> dict[str, _Model]:
        """Name the models that are not the base."""
        named: dict[str, _Model] = {}
        for model in self.models:
            if model.source != self.base:
                name = self.expert_names.get(model.source) or model.name or folder_name(model.source)
                if name in named:
                    mend = "write a name of its own beside each model"
                    raise SpaceError("experts have different names", given=name, where=model.where, mend=mend)
                named[name] = model
        return named

    def _check_surroundings(self) -> None:
        """Refuse what would change the model and has no place in a recipe."""
        tokenizer = mapping(self.document.get("tokenizer"), "tokenizer")
        only(tokenizer, ("source",), "tokenizer", rule="a merge keeps the base's tokenizer as it is")
        for where, given in (
            ("tokenizer_source", self.document.get("tokenizer_source")), ("tokenizer.source", tokenizer.get("source"))
        ):  # fmt: skip
            if given not in (None, "base", self.document.get("base_model", self.base)):
                mend = "experts with other tokens are matched to the base's by token; a union of tokens is not made"
                raise SpaceError("a merge keeps the base's tokenizer", given=given, where=where, mend=mend)
        others = sum(model.source != self.base for model in self.models)
        exact = {"nuslerp": 1 if self.baseless else 2, "passthrough": 0}.get(self.spec.name, others)
        if others != exact:
            besides = "without base_model" if self.baseless else "with base_model"
            rule = (
                f"{self.spec.name} {besides} merges {exact or 'no'} model{'' if exact == 1 else 's'} besides its base"
            )
            raise SpaceError(rule, given=others, where="models")
        scopes = {parameter.name: parameter.scope for parameter in self.spec.parameters if not parameter.ours}
        extras = {**_FIXED.get(self.spec.name, {}), **({"normalize": 1.0} if self.spec.name == "linear" else {})}
        masks = ("int8_mask",) if self.spec.name in _MASKED else ()  # saves memory, changes no number
        _only_of_recipe(self.shared, (*scopes, *extras, *masks), "parameters", method=self.spec.name)
        for model in self.models:
            own = [name for name, scope in scopes.items() if scope == "expert" or name == "scale"]
            _only_of_recipe(model.parameters, own, f"{model.where}.parameters", method=self.spec.name)
        for name, value in _FIXED.get(self.spec.name, {}).items():
            fixed = Parameter(name, value, value, value, "recipe", "", "switch")
            if set(self._values(fixed, None).values()) != {value}:
                raise SpaceError(f"{self.spec.name} has {name} off here", given=self.shared[name], where=name)

    def _values(self, parameter: Parameter, model: _Model | None) -> dict[str, float]:
        """Resolve a parameter for each group; as a share of the weights' sum where the base is one of the models."""
        if parameter.name == "weight" and self.spec.name == "karcher":
            return dict.fromkeys(self.groups, 1 / (1 + len(self._experts())))
        if parameter.name == "weight" and (self.spec.name == "linear" or self.baseless):
            return self._by_group(lambda tensor: self._share(model, tensor))
        if parameter.name == "scale":
            model = self.models[0]
        if parameter.name == "sum":
            return self._by_group(self._sum)
        return self._by_group(lambda tensor: self._one(parameter, model, tensor))

    def _by_group(self, value_of: Callable[[str], float]) -> dict[str, float]:
        """Give each group the value most of its tensors have, and the others theirs by their names."""
        found: dict[str, float] = {}
        for group, tensors in self.groups.items():
            values = {tensor: value_of(tensor) for tensor in tensors}
            found[group] = Counter(values.values()).most_common(1)[0][0]
            found |= {tensor: value for tensor, value in values.items() if value != found[group]}
        return found

    def _sum(self, tensor: str) -> float:
        """Return what a linear merge's weights add up to: 1 where they are divided by their sum."""
        if self._one(_switch("normalize"), None, tensor) == 1.0:
            return 1.0
        total = math.fsum(self._one(self.spec.parameters[0], listed, tensor) for listed in self.models)
        return 1.0 if abs(total - 1.0) <= 1e-6 else total

    def _share(self, model: _Model | None, tensor: str) -> float:
        """Return the weight of a model in a merge in which base and experts make 1."""
        weight, method = self.spec.parameters[0], self.spec.name
        switch = {"linear": "normalize", "multislerp": "normalize_weights"}.get(method)
        if all(listed.source != self.base for listed in self.models):
            raise SpaceError("a linear merge lists its base with a weight", given=self.base, where="models")
        weights = {listed.source: self._one(weight, listed, tensor) for listed in self.models}
        total = math.fsum(weights.values())
        divide = switch is None or self._one(_switch(switch), None, tensor) == 1.0
        own = weights[model.source] if model else 0.0
        if method == "nuslerp" and abs(total) < 1e-6:
            return 0.5
        if total == 0.0 if divide else abs(total - 1.0) > 1e-6 and method != "linear":
            rule = f"the weights of a {method} merge, the base's included, sum to 1"
            raise SpaceError(rule, given=total, where=tensor, mend=f"{switch}: true divides by their sum")
        is_whole = abs(total - 1.0) < _ROUNDING  # then a division would only move the last bit
        return own / total if divide and not is_whole else own

    def _one(self, parameter: Parameter, model: _Model | None, tensor: str) -> float:
        """Resolve a parameter for one tensor as mergekit does: the model's own, then the shared, then the default."""
        scopes = [(model.parameters, f"{model.where}.parameters")] if model else []
        for scope, where in [*scopes, (self.shared, "parameters")]:
            if parameter.name in scope:
                value = self._setting(scope[parameter.name], parameter, tensor, f"{where}.{parameter.name}")
                if value is not None:
                    return value
        if parameter.required:
            where = f"{model.where if model else 'parameters'}, {tensor}"
            raise SpaceError(f"{self.spec.name} needs {parameter.name} for every tensor", given="none", where=where)
        return parameter.default

    def _setting(self, setting: object, parameter: Parameter, tensor: str, where: str) -> float | None:
        """Evaluate a setting at a tensor; None where no filter fits it."""
        found = matching(setting, tensor, where)
        if found is None:
            return None
        value, there = found
        if isinstance(value, list):
            return self._along([_number(entry, parameter, there) for entry in value], tensor, there)
        return _number(value, parameter, there)

    def _along(self, gradient: list[float], tensor: str, where: str) -> float:
        """Read a gradient at a tensor's layer; tensors outside the layers read its first entry."""
        if not gradient:
            raise SpaceError("a gradient has at least one number", given="[]", where=where)
        layer = split_name(tensor)[1]
        if layer is None:
            return gradient[0]
        if self.layers == 1:
            return gradient[-1]
        if len(gradient) == self.layers:
            return gradient[layer]  # what mergekit's interpolation gives but for its rounding
        return interpolate(gradient, layer / (self.layers - 1))

    def _compact(self, parameter: Parameter, expert: str, values: Mapping[str, float]) -> list[Setting]:
        """Turn values by group into settings: one for all groups where a parameter other than the scale allows it."""
        if parameter.name == self.spec.scale:
            return [Setting(parameter.name, expert, group, value) for group, value in values.items()]
        if len(set(values.values())) == 1:
            return [Setting(parameter.name, expert, "", next(iter(values.values())))]
        if parameter.scope == "recipe":
            rule = f"{parameter.name} has one value for all groups"
            raise SpaceError(rule, given=self.shared[parameter.name], where=f"parameters.{parameter.name}")
        return [Setting(parameter.name, expert, group, value) for group, value in values.items()]


def _own(document: Document) -> Document:
    """Return what only we read of a document."""
    own = present_mapping(document.get(OWN_KEY, {}), OWN_KEY)
    _only_of_recipe(own, ("seed", "kinds"), OWN_KEY)
    return own


def _own_kinds(document: Document) -> Kinds:
    where = f"{OWN_KEY}.kinds"
    listed = mapping(_own(document).get("kinds"), where).items()
    for name, patterns in listed:
        if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
            raise SpaceError("a kind is a list of parts of tensor names", given=patterns, where=f"{where}.{name}")
    return checked_kinds((text(name, where), patterns) for name, patterns in listed)  # type: ignore[misc]


def filters_of(document: Document) -> list[str]:
    """List the filters of a document's parameters, in the order they stand, each once."""
    found: dict[str, None] = {}
    waiting: list[object] = [document]
    while waiting:
        part = waiting.pop()
        if isinstance(part, Mapping):
            word = part.get("filter")
            if isinstance(word, str) and word not in ("", "*"):
                found[word] = None
            waiting += reversed(list(part.values()))
        elif isinstance(part, list):
            waiting += reversed(part)
    return list(found)


def _only_of_recipe(value: Document, known: Collection[str], where: str, *, method: str = "") -> None:
    only(value, known, where, rule=f"a recipe{f' of {method}' if method else ''} has no place for this")


def _switch(name: str) -> Parameter:
    return Parameter(name, 1.0, 0.0, 1.0, "recipe", "", "switch")


def _known_method(name: object) -> MethodSpec:
    return method_spec(text(name, "merge_method"))


def _path(value: object, where: str) -> str:
    if isinstance(value, Mapping):
        _only_of_recipe(value, ("path",), where)
        value = value.get("path")
    return text(value, where)


def _number(value: object, parameter: Parameter, where: str) -> float:
    """Read a number; YAML leaves `1e-3` a string, and mergekit reads it as a number too."""
    if isinstance(value, bool) and parameter.domain != "switch":
        raise SpaceError(f"{parameter.name} is a number", given=value, where=where)
    if parameter.domain == "switch" and isinstance(value, str) and value.lower() in SWITCHES:
        value = SWITCHES[value.lower()]
    try:
        number = to_float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise SpaceError(f"{parameter.name} is a number", given=repr(value), where=where) from error
    if not parameter.allows(number):
        raise SpaceError(f"{parameter.name} takes no such value", given=number, where=where)
    return number
