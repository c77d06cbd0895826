"""A choice among merge methods: a space for each, and a sampled word that says which of them a trial is in.

Stands between `space` and the search where a study names several methods. A trial has the parameters of its method and
no others. How much of an expert each layer takes means the same in all methods that call it by the same name, so those
parameters are shared, and what is learned of them with one method serves the next; all others are a method's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import Trial

from search_spaces.errors import SpaceError
from search_spaces.kinds import Kinds
from search_spaces.recipe import Recipe
from search_spaces.shape import Shape
from search_spaces.space import Anchor, Params, Space

METHOD = "method"


@dataclass(frozen=True)
class Choice:
    """Spaces that differ in the merge method only; the first one gives the anchors.

    Raises:
        SpaceError: fewer than two spaces, or two of the same method.
    """

    spaces: tuple[Space, ...]

    def __post_init__(self) -> None:
        if len(self.spaces) < 2 or len(set(self.methods)) < len(self.spaces):
            raise SpaceError("a choice is between different methods", given=", ".join(self.methods), where="method")

    @property
    def methods(self) -> tuple[str, ...]:
        """The merge methods, in the study's order."""
        return tuple(space.method for space in self.spaces)

    @property
    def experts(self) -> tuple[tuple[str, str], ...]:
        """Name and source of each expert."""
        return self.spaces[0].experts

    @property
    def shape(self) -> Shape:
        """How weights run along the layers, in all of them."""
        return self.spaces[0].shape

    @property
    def modules(self) -> tuple[str, ...]:
        """Kinds of groups with weights of their own."""
        return self.spaces[0].modules

    @property
    def kinds(self) -> Kinds:
        """Kinds of modules that are finer than groups."""
        return self.spaces[0].kinds

    @property
    def groups(self) -> tuple[str, ...]:
        """All layer groups of the checkpoint."""
        return self.spaces[0].groups

    @property
    def size(self) -> int:
        """Number of dimensions: the method, and every parameter of every method."""
        return len(self.distributions())

    @property
    def is_conditional(self) -> bool:
        """Whether there are parameters that only some of the methods have."""
        own = [set(names.values()) for names in self._names.values()]
        return any(names != own[0] for names in own)

    def distributions(self) -> dict[str, BaseDistribution]:
        """Give every distribution by parameter name: `method`, and those of all methods."""
        found: dict[str, BaseDistribution] = {METHOD: CategoricalDistribution(self.methods)}
        for space in self.spaces:
            names = self._names[space.method]
            found |= {names[name]: part for name, part in space.distributions().items()}
        return found

    def suggest(self, trial: Trial) -> Params:
        """Have Optuna choose a method, and then the parameters of that method."""
        space = self._space(trial.suggest_categorical(METHOD, self.methods))
        return {METHOD: space.method, **space.suggest(trial, self._names[space.method])}

    def recipe(self, params: Params) -> Recipe:
        """Turn sampled parameters into a recipe of the method among them.

        Raises:
            SpaceError: a parameter is missing, of another method, or outside its range.
        """
        space = self._space(params.get(METHOD))
        names = self._names[space.method]
        for name in sorted({METHOD, *names.values()} ^ set(params)):
            rule = "is missing" if name in names.values() else f"is not one of {space.method}"
            raise SpaceError(f"a parameter {rule}", given=repr(name), mend=f"they are {', '.join(names.values())}")
        return space.recipe({name: params[shown] for name, shown in names.items()})

    def anchors(self) -> list[Anchor]:
        """Give the points every study scores first, by the first method: base and experts are the same in all.

        A point that a method's space starts from comes last.
        """
        starts = [(space, space.start) for space in self.spaces[1:] if space.start]
        found = [*((self.spaces[0], anchor) for anchor in self.spaces[0].anchors()), *starts]
        return [Anchor(anchor.name, self._shown(space, anchor.params)) for space, anchor in found]

    def _shown(self, space: Space, params: Params) -> Params:
        """Give a space's parameters by their names in the study, and its method."""
        names = self._names[space.method]
        return {METHOD: space.method, **{names[name]: value for name, value in params.items()}}

    def _space(self, method: object) -> Space:
        found = next((space for space in self.spaces if space.method == method), None)
        if found is None:
            raise SpaceError("a trial's method is one of the study's", given=method, mend=", ".join(self.methods))
        return found

    @cached_property
    def _names(self) -> Mapping[str, Mapping[str, str]]:
        """Give, by method, the name in the study of each of its space's parameters: `density` is `ties.density`."""
        ranges: dict[str, list[BaseDistribution]] = {}
        for space in self.spaces:
            for name, distribution in space.distributions().items():
                ranges.setdefault(name, []).append(distribution)

        def shared(space: Space, name: str) -> bool:
            return name in space.scale_names and all(other == ranges[name][0] for other in ranges[name])

        return {
            space.method: {
                name: name if shared(space, name) else f"{space.method}.{name}" for name in space.distributions()
            }
            for space in self.spaces
        }
