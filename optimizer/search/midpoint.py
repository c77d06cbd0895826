"""The point halfway between the neighbours on the front that leave the largest gap.

Samplers leave gaps in a front, and so do anchors, where a person may want a point; and what lies between two good
merges is mostly good.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from optimizer.runs.front import gaps
from optimizer.runs.path import blend
from optimizer.runs.trial import fitted
from optimizer.search.judge import front_of
from optimizer.search.ledger import Ledger
from search_spaces.choice import Choice
from search_spaces.parameters import METHODS
from search_spaces.recipe import Recipe
from search_spaces.space import Space

EVERY = 2  # trials, once midpoints are due
METHOD = "task_arithmetic"  # of recipes that mix by their weights
LEAST = 1 / 400  # of the front's rectangle: a gap as of twenty points at even distances is none
MOST_EXPERTS = 4  # of a mixed recipe, derived ones too: a merge reads each of them


@dataclass(frozen=True, slots=True)
class Midpoint:
    """What lies halfway between two trials.

    Args:
        trials: the two.
        recipe: the mean of their weights.
        params: the mean of their parameters; None where one of them has none.
    """

    trials: tuple[int, int]
    recipe: Recipe
    params: dict[str, float | str] | None


def due_midpoint(asked: int, budget: int, ledger: Ledger, space: Space | Choice) -> Midpoint | None:
    """Give the midpoint that is the next trial, where one is due.

    Every other trial is, in the second half of the budget, or as soon as a point without parameters is on the front:
    what a sampler then proposes starts from points that are beaten.
    """
    if asked % EVERY:
        return None
    is_late = 2 * asked >= budget
    is_due = is_late or not all(ledger.kinds[number].has_params for number in ledger.front())
    return front_midpoint(ledger, space) if is_due else None


def front_midpoint(ledger: Ledger, space: Space | Choice) -> Midpoint | None:
    """Give the midpoint of the largest gap whose recipe is not known yet; None where there is none.

    A learned point seems to fill gaps that it does not, so those of the front without such points count too.
    """
    params = {trial.number: trial.params for trial in ledger.trials() if trial.params}
    found = dict([*_gaps(ledger.front(), ledger), *_gaps(_front_of_unfitted(ledger), ledger)])
    for pair in sorted(found, key=lambda pair: (-found[pair], pair)):
        between = _halfway(params.get(pair[0], {}), params.get(pair[1], {}))
        recipe = space.recipe(between) if between else _mixed(*(Recipe.from_json(ledger.recipes[n]) for n in pair))
        if recipe is not None and recipe.digest not in ledger.seen:
            return Midpoint(pair, recipe, between)
    return None


def _front_of_unfitted(ledger: Ledger) -> list[int]:
    """Give the front that there would be without fitted points; empty where there are none of them."""
    hidden = fitted(ledger.kinds)
    values = {n: told for n, told in ledger.values.items() if n not in hidden and n not in ledger.stopped}
    return front_of(values, ledger.is_kept_off) if hidden else []


def _gaps(front: Collection[int], ledger: Ledger) -> list[tuple[tuple[int, int], float]]:
    """Give the neighbours on a front between which a point could add something, and how much at most."""
    numbers = _within_limits(sorted(front, key=lambda n: ledger.values[n][-1]), ledger)
    if len(numbers) < 2:
        return []
    wide = gaps([ledger.values[number] for number in numbers], least=LEAST)
    return [((numbers[i], numbers[i + 1]), area) for i, area in wide]


def _within_limits(front: list[int], ledger: Ledger) -> list[int]:
    """Leave those of a front that keep the study's limits, and the first beyond them: the limit lies in that gap."""
    beyond = [n for n in front if max(ledger.constraints(n).values(), default=0.0) > 0]
    return [n for n in front if n not in beyond[1:]]


def _halfway(one: Mapping[str, float | str], other: Mapping[str, float | str]) -> dict[str, float | str] | None:
    """Return params halfway between two trials'; None where they are of different methods, or one has none."""
    if not one or one.keys() != other.keys():
        return None
    between: dict[str, float | str] = {}
    for name, value in one.items():
        partner = other[name]
        if isinstance(value, str) or isinstance(partner, str):
            if value != partner:
                return None
            between[name] = value
        else:
            between[name] = (value + partner) / 2
    return between


def _mixed(one: Recipe, other: Recipe) -> Recipe | None:
    """Return the mean of two recipes' weights, without experts that count nothing; None where they do not mix."""
    tensors = one.tensors | other.tensors
    if not (_is_weights(one) and _is_weights(other)) or (one.kinds != other.kinds and not tensors):
        return None
    mixed = blend(one, other, 0.5)
    used = {setting.expert for setting in mixed.settings if setting.value}
    if len(used) > MOST_EXPERTS:
        return None
    experts = tuple((name, source) for name, source in mixed.experts if name in used)
    return replace(mixed, experts=experts, settings=tuple(s for s in mixed.settings if s.expert in used))


def _is_weights(recipe: Recipe) -> bool:
    """Tell whether a recipe is task arithmetic by nothing but weights: of groups, or of every tensor."""
    spec, weights = METHODS[METHOD], [s for s in recipe.settings if s.parameter == "weight"]
    others = [s for s in recipe.settings if s.parameter != "weight"]
    return (
        recipe.method == METHOD
        and all((known := spec.parameter(s.parameter)) and s.value == known.default for s in others)
        and len({s.group in recipe.tensors for s in weights}) < 2
    )
