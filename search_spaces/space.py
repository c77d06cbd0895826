"""A search space: which weights may vary, and the map from sampled parameters to a recipe.

Tensor groups -> Space -> Optuna distributions -> sampled parameters -> Recipe. Everything between parameters and
weights is linear: a weight is the interpolation of at most two sampled numbers (knots) along the model's depth.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

from optuna.distributions import FloatDistribution
from optuna.trial import Trial

from search_spaces.errors import SpaceError
from search_spaces.groups import KINDS, kind_of, layer_count, layer_of
from search_spaces.kinds import Kinds, checked_kinds, kinds_for, place_tensors
from search_spaces.parameters import MethodSpec, Parameter
from search_spaces.profiles import Knot, Profile, fit_knots, knots_of, live_knots, straight, weight_at
from search_spaces.ranges import Range, read_range, require_range
from search_spaces.recipe import Recipe, Setting, check_experts, method_spec
from search_spaces.shape import Shape

Params = Mapping[str, float | str]  # what Optuna sampled; the only word is the method, where a study has several

ALPHAS = (0.25, 0.5, 0.75)
SLOPES = ((0.0, 1.0), (0.25, 1.0), (0.5, 1.0))


@dataclass(frozen=True, slots=True)
class Anchor:
    """A point every study scores first, with the name it goes by in reports."""

    name: str
    params: Params


@dataclass(frozen=True)
class Space:
    """What may vary in a merge.

    Args:
        method: a key of METHODS.
        base: source of the base checkpoint.
        experts: (name, source) of each expert.
        groups: all layer groups of the checkpoint, and the places of the kinds, as place_tensors names them.
        shape: how weights run along the layers.
        modules: kinds of groups (attn, mlp, embed, head) and of `kinds` with weights of their own. Of those not listed,
            attn and mlp share a profile along the layers; embed follows the first layer, head the last (the mean of
            attn and mlp). What a kind has outside the layers follows its own first or last layer.
        ranges: (low, high) of each searched parameter; low = high fixes it. Weights run from the base's 0 to the
            expert's 1, so their range holds both; any other parameter's range holds its default.
        kinds: kinds of modules whose tensors leave their groups: experts, router, shared_expert, or a study's own.
        start: a point of a person's own, scored with the anchors.

    Raises:
        SpaceError: a name, range or shape that does not fit the method or the model.
    """

    method: str
    base: str
    experts: tuple[tuple[str, str], ...]
    groups: tuple[str, ...]
    shape: Shape
    modules: tuple[str, ...]
    ranges: Mapping[str, Range]
    kinds: Kinds = ()
    start: Anchor | None = None

    def __post_init__(self) -> None:
        if self.spec.unsearchable:
            rule = f"{self.method} cannot be searched: {self.spec.unsearchable}"
            raise SpaceError(rule, given=self.method, where="space.method")
        check_experts(self.spec, self.experts)
        if self.shape.n > self._layers:
            rule = f"a shape has no more numbers than the model has layers, {self._layers}"
            raise SpaceError(rule, given=self.shape.n, where="shape")
        checked_kinds(self.kinds)
        known = [*self._own_kinds, *(kind for kind in KINDS if kind in self._layers_of or kind in self.groups)]
        for module in self.modules:
            if module not in known or self.modules.count(module) > 1:
                rule = f"modules are different ones of {', '.join(known)}"
                raise SpaceError(rule, given=repr(module), where="space.modules")
        if self.spec.scale not in self.ranges:
            raise SpaceError(f"{self.method} searches {self.spec.scale}", given=", ".join(self.ranges) or "no range")
        for name, given in self.ranges.items():
            require_range(self.spec, name, given)

    @classmethod
    def build(
        cls,
        method: str,
        base: str,
        *,
        experts: Mapping[str, str],
        tensors: Iterable[str],
        shape: Shape | str | Mapping[str, int],
        modules: Iterable[str],
        ranges: Mapping[str, Iterable[float]],
        patterns: Mapping[str, Sequence[str]] | None = None,
    ) -> Space:
        """Build a space from plain values, as a study file and a checkpoint's header give them.

        Args:
            experts: name -> source.
            tensors: the base checkpoint's tensor names.
            modules: kinds with weights of their own; where two fit a tensor, the first counts.
            patterns: parts of tensor names, for each of the modules that is a kind of the study's own.
            ranges: overrides; what the method searches by itself and is not named here gets its own range.
        """
        own = {
            parameter.name: (parameter.low, parameter.high)
            for parameter in method_spec(method).parameters
            if parameter.is_searched(len(experts))
        }
        given = {name: read_range(name, span) for name, span in ranges.items()}
        names, modules = tuple(tensors), tuple(modules)
        kinds = kinds_for(modules, patterns or {}, names)
        return cls(
            method,
            base,
            tuple(experts.items()),
            tuple(place_tensors(names, kinds)),
            shape if isinstance(shape, Shape) else Shape.read(shape),
            modules,
            {**own, **given},
            kinds,
        )

    @property
    def spec(self) -> MethodSpec:
        """What the merge method takes."""
        return method_spec(self.method)

    @property
    def size(self) -> int:
        """Number of dimensions."""
        return len(self._dimensions)

    def distributions(self) -> dict[str, FloatDistribution]:
        """Give the distributions Optuna samples, by parameter name such as `clinical.weight.attn.block.0`."""
        others = {name: parameter.log for name, parameter in self._others()}
        return {
            name: FloatDistribution(low, high, log=others.get(name, False))
            for name, (low, high) in self._dimensions.items()
        }

    @property
    def methods(self) -> tuple[str, ...]:
        """The merge method, as the only one of its kind."""
        return (self.method,)

    @property
    def is_conditional(self) -> bool:
        """Whether some trials have parameters that others lack: no."""
        return False

    @property
    def scale_names(self) -> list[str]:
        """Names of the parameters that say how much of an expert the layers take."""
        return [name for expert in self._names for name in self._scale_depths(expert)]

    def suggest(self, trial: Trial, names: Mapping[str, str] | None = None) -> Params:
        """Have Optuna sample every parameter for a trial.

        Args:
            names: the name in the study of each of this space's parameters, where it has another there.
        """
        params = {}
        for name, part in self.distributions().items():
            shown = (names or {}).get(name, name)
            params[shown] = trial.suggest_float(shown, part.low, part.high, log=part.log)
        return params

    def recipe(self, params: Params) -> Recipe:
        """Turn sampled parameters into a recipe with an explicit weight for every expert and group.

        Raises:
            SpaceError: a parameter is missing, unknown or outside its range.
        """
        numbers = self._checked(params)
        settings = [
            Setting(self.spec.scale, self._owner(expert), group, self._scale_value(expert, group, numbers))
            for expert in self._names
            for group in self.groups
        ]
        for name, parameter in self._others():
            expert = name.split(".")[0] if parameter.scope == "expert" else ""
            value = numbers[name] if self._varies(parameter) else self.ranges[parameter.name][0]
            settings.append(Setting(parameter.name, expert, "", value))
        settings += [Setting(name, "", "", value) for name, value in self.spec.fixed_in_search]
        return Recipe(self.method, self.base, self.experts, tuple(settings), kinds=self.kinds)

    def params_of(self, recipe: Recipe) -> dict[str, float] | None:
        """Give the parameters of a recipe of this method and these experts; None where the space does not hold it.

        Weights are linear in the knots, so the knots are those whose weights come nearest, if they come exactly.
        """
        params = dict.fromkeys(self.scale_names, 0.0)
        for expert in self._names:
            for place in self._outer:
                value = recipe.value(self.spec.scale, expert=self._owner(expert), group=place)
                params[self._name(expert, module=place, suffix="")] = value
            for profile in self._profiles:
                params |= self._knots_of(recipe, expert, profile)
        for name, parameter in self._others():
            owner = name.split(".")[0] if parameter.scope == "expert" else ""
            if self._varies(parameter):
                place = "" if parameter.scope == "recipe" else self.groups[0]
                params[name] = recipe.value(parameter.name, expert=owner, group=place)
        if any(not low <= params[name] <= high for name, (low, high) in self._dimensions.items()):
            return None
        made = self.recipe(params)
        scale = [(self._owner(expert), group) for expert in self._names for group in self.groups]
        gaps = (
            made.value(self.spec.scale, expert=owner, group=group)
            - recipe.value(self.spec.scale, expert=owner, group=group)
            for owner, group in scale
        )
        return params if all(abs(gap) < 1e-9 for gap in gaps) else None

    def _knots_of(self, recipe: Recipe, expert: str, profile: str) -> dict[str, float]:
        kinds = [profile] if profile else [kind for kind in ("mlp", "attn") if kind in self._layers_of]
        owner = self._owner(expert)
        weights = {
            i: recipe.value(self.spec.scale, expert=owner, group=f"layer.{i:02d}.{kind}")
            for kind in kinds
            for i in self._layers_of[kind]
        }
        found = fit_knots(self.shape, weights, self._layers)
        return {self._name(expert, module=profile, suffix=self._knots[k].suffix): found[k] for k in self._live(profile)}

    def profile_params(self, profile: Profile | Mapping[str, Profile]) -> dict[str, float]:
        """Give the parameters whose weights follow a function of depth; all others stay at what changes nothing.

        Args:
            profile: depth in [0, 1] -> weight, for all experts or by expert's name. Knots take the profile's value at
                their depth (a block at its middle), so a straight profile is met exactly by slope, curve and layers.

        Raises:
            SpaceError: the profile leaves the weight's range, or an expert has none.
        """
        profiles = profile if isinstance(profile, Mapping) else dict.fromkeys(self._names, profile)
        if set(profiles) != set(self._names):
            raise SpaceError("every expert has a profile", given=", ".join(profiles), where=", ".join(self._names))
        params = {
            name: float(profiles[expert](depth))
            for expert in self._names
            for name, depth in self._scale_depths(expert).items()
        }
        params |= {name: parameter.default for name, parameter in self._others() if self._varies(parameter)}
        self._checked(params)
        return params

    def anchors(self, alphas: Iterable[float] = ALPHAS, slopes: Iterable[tuple[float, float]] = SLOPES) -> list[Anchor]:
        """Give the points every study scores first; a point this space cannot tell from an earlier one is left out.

        Args:
            alphas: weights of the uniform line, shared evenly by the experts (WiSE-FT, arXiv 2109.01903).
            slopes: weights of the first and the last layer, shared evenly by the experts: lambda_l = alpha +
                beta (l - 1)/(L - 1) of LiNeS, arXiv 2410.17146. None where the shape has a single weight.
        """
        share = 1.0 / len(self._names)
        anchors = [Anchor("base", self.profile_params(straight(0.0, 0.0)))]
        for chosen in self._names:
            profiles = {name: straight(*(2 * [float(name == chosen)])) for name in self._names}
            anchors.append(Anchor(f"expert:{chosen}", self.profile_params(profiles)))
        for a in alphas:
            anchors.append(Anchor(f"uniform a={a:.2f}", self.profile_params(straight(a * share, a * share))))
        for a, b in slopes if len(self._knots) > 1 else ():
            name = f"slope {a:.2f}->{b:.2f}"
            anchors.append(Anchor(name, self.profile_params(straight(a * share, b * share))))
        anchors += [self.start] if self.start else []
        return [anchor for i, anchor in enumerate(anchors) if all(anchor.params != a.params for a in anchors[:i])]

    @property
    def _names(self) -> list[str]:
        return [name for name, _ in self.experts]

    @cached_property
    def _layers(self) -> int:
        return layer_count(self.groups)

    @cached_property
    def _dimensions(self) -> dict[str, Range]:
        """Range of every sampled parameter."""
        scales = dict.fromkeys(self.scale_names, self.ranges[self.spec.scale])
        others = {name: self.ranges[parameter.name] for name, parameter in self._others() if self._varies(parameter)}
        return scales | others

    @cached_property
    def _profiles(self) -> list[str]:
        """Kinds that have a profile along the layers of their own; "" is one that attention and feed-forward share."""
        own = [kind for kind in ("attn", "mlp") if kind in self._layers_of]
        shared = own if set(own) & set(self.modules) else [""] if own else []
        return [*shared, *(kind for kind in self._own_kinds if kind in self._layers_of)]

    @cached_property
    def _own_kinds(self) -> list[str]:
        return [name for name, _ in self.kinds]

    @cached_property
    def _layers_of(self) -> dict[str, list[int]]:
        """The layers that each kind is in."""
        found: dict[str, list[int]] = {}
        for group in self.groups:
            if (layer := layer_of(group)) is not None:
                found.setdefault(kind_of(group), []).append(layer)
        return found

    @cached_property
    def _outer(self) -> list[str]:
        """Places outside the layers with a weight of their own: embeddings and head, and kinds that no layer has."""
        lone = [kind for kind in self._own_kinds if kind not in self._layers_of]
        return [group for group in self.groups if layer_of(group) is None
                and (group in self.modules or kind_of(group) in lone)]  # fmt: skip

    def _live(self, profile: str) -> list[int]:
        """Give the numbers of a profile's knots; a kind that some layers lack has none there."""
        if profile not in self._own_kinds:
            return list(range(len(self._knots)))
        return live_knots(self.shape, self._layers_of[profile], self._layers)

    @cached_property
    def _knots(self) -> list[Knot]:
        """Knots of one profile, first layer to last."""
        return knots_of(self.shape, self._layers)

    def _owner(self, expert: str) -> str:
        """Give the expert a weight belongs to: none where the method has one weight for its only expert."""
        scale = self.spec.parameter(self.spec.scale)
        return expert if scale and scale.scope == "expert" else ""

    def _name(self, expert: str, *, module: str, suffix: str) -> str:
        """Join a parameter's name: `clinical.weight.attn.block.0`; a layer's own is `clinical.weight.layer.07.attn`."""
        parts = [suffix, module] if suffix.startswith("layer.") else [module, suffix]
        return ".".join(filter(None, [self._owner(expert), self.spec.scale, *parts]))

    def _scale_depths(self, expert: str) -> dict[str, float]:
        """Name an expert's weights and the depth each stands for."""
        knots = [(profile, self._knots[number]) for profile in self._profiles for number in self._live(profile)]
        inner = [(profile, knot.suffix, knot.depth) for profile, knot in knots]
        outer = [(place, "", 0.0 if place.startswith("embed") else 1.0) for place in self._outer]
        return {self._name(expert, module=module, suffix=suffix): depth for module, suffix, depth in inner + outer}

    def _scale_value(self, expert: str, group: str, params: Mapping[str, float]) -> float:
        kind, layer = kind_of(group), layer_of(group)
        if layer is not None:
            return self._at(expert, kind if kind in self._profiles else "", layer, params)
        if group in self._outer:
            return params[self._name(expert, module=group, suffix="")]
        first = group.startswith("embed")
        if kind in self._profiles:  # what a kind has outside the layers
            return self._at(expert, kind, self._layers_of[kind][0 if first else -1], params)
        shared = [profile for profile in self._profiles if profile not in self._own_kinds] or self._profiles
        return fmean(self._at_edge(expert, profile, first, params) for profile in shared)

    def _at_edge(self, expert: str, profile: str, first: bool, params: Mapping[str, float]) -> float:
        layers = self._layers_of[profile] if profile in self._own_kinds else range(self._layers)
        return self._at(expert, profile, layers[0 if first else -1], params)

    def _at(self, expert: str, profile: str, layer: int, params: Mapping[str, float]) -> float:
        """Return the value of a profile at a layer: its block's, or on the line between two knots."""

        def value(knot: int) -> float:  # one that is not sampled has no part in this layer
            return params.get(self._name(expert, module=profile, suffix=self._knots[knot].suffix), 0.0)

        return weight_at(self.shape, layer, self._layers, value)

    def _others(self) -> Iterator[tuple[str, Parameter]]:
        """Name the parameters with a range that are not the scale: one value per expert, or one in all."""
        for parameter in self.spec.parameters:
            if parameter.name in self.ranges and parameter.name != self.spec.scale:
                owners = [f"{name}." for name in self._names] if parameter.scope == "expert" else [""]
                yield from ((owner + parameter.name, parameter) for owner in owners)

    def _varies(self, parameter: Parameter) -> bool:
        low, high = self.ranges[parameter.name]
        return low < high

    def _checked(self, params: Params) -> dict[str, float]:
        known, numbers = self._dimensions, {}
        for name in sorted(set(known) ^ set(params)):
            rule = "a parameter of the space is missing" if name in known else "the space has no such parameter"
            raise SpaceError(rule, given=repr(name), mend=f"the parameters are {', '.join(known)}")
        for name, (low, high) in known.items():
            value = params[name]
            if isinstance(value, str) or not low <= value <= high:
                raise SpaceError("a parameter lies in its range", given=value, where=f"{name} in [{low}, {high}]")
            numbers[name] = value
        return numbers
