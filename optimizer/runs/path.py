"""The path of a run: from the base over its learned anchors, in the order of what the domain counts, to the expert.

Each of them is a recipe that was scored; what lies between two is the mean of their weights by its distance to both.
"""

from __future__ import annotations

from bisect import bisect_right

from evals.outcomes import SEARCH
from optimizer.errors import RunError
from optimizer.runs.recorded import RecordedRun
from search_spaces.groups import KINDS, kind_of
from search_spaces.recipe import Recipe, Setting


def path_of(run: RecordedRun) -> list[tuple[float, int]]:
    """Give the trials of the path: knob in [0, 1] and number; base 0, learned anchors at their p, expert 1.

    Raises:
        RunError: the run has several experts, or base and expert are not scored.
    """
    if run.references is None or len(run.experts) != 1:
        raise RunError(f"run {run.name} has no path: one leads from a base to one expert, and both must be scored")
    base, experts = run.references
    scored, preferences = set(run.outcomes(SEARCH)["trial"]), run.lessons()["preference"]
    learned = [
        (float(preferences[n]), n) for n in map(int, preferences.index) if n in scored and 0 < preferences[n] < 1
    ]
    (expert,) = experts.values()
    return [(0.0, base), *sorted(learned), (1.0, expert)]


def recipe_at(run: RecordedRun, knob: float) -> tuple[Recipe, int | None]:
    """Give the recipe at a place of the path, and the trial that it is; None where it lies between two.

    Raises:
        RunError: the run has no path, no learned anchor, or the knob is not between 0 and 1.
    """
    if not 0 <= knob <= 1:
        raise RunError(f"a knob is between 0, the base, and 1, the expert; given {knob:g}")
    path = path_of(run)
    if len(path) == 2:
        raise RunError(f"run {run.name} has no learned anchors: write search.learned: 5 and search again")
    right = min(bisect_right([place for place, _ in path], knob), len(path) - 1)
    (low, left), (high, other) = path[right - 1], path[right]
    for place, trial in (path[right - 1], path[right]):
        if abs(place - knob) < 1e-9:
            return run.recipe(trial), trial
    return blend(run.recipe(left), run.recipe(other), (knob - low) / (high - low)), None


def blend(left: Recipe, right: Recipe, share: float) -> Recipe:
    """Give the recipe whose weights lie between those of two, as task arithmetic over the experts of both.

    Args:
        left, right: recipes of one method with a weight for each expert, of the same base.
        share: of the way from left to right.
    """
    experts = tuple(sorted({**dict(left.experts), **dict(right.experts)}.items()))
    weights = [s for recipe in (left, right) for s in recipe.settings if s.parameter == "weight"]
    places = sorted({s.group for s in weights if s.group}) or [""]
    tensors = left.tensors | right.tensors
    kinds = left.kinds if left.kinds == right.kinds else ()
    if tensors:  # a number of a whole group would stand beside its tensors' own
        places = [place for place in places if place in tensors]
    elif (
        left.kinds != right.kinds
    ):  # what was learned by groups knows no kinds; base and expert are the same everywhere
        places = [place for place in places if kind_of(place) in KINDS]

    def weight(recipe: Recipe, expert: str, place: str) -> float:
        if expert not in dict(recipe.experts):
            return 0.0
        values = {s.value for s in recipe.settings if s.parameter == "weight" and s.expert in ("", expert)}
        return values.pop() if len(values) == 1 else recipe.value("weight", expert=expert, group=place)

    settings = tuple(
        Setting("weight", name, place, (1 - share) * weight(left, name, place) + share * weight(right, name, place))
        for name, _ in experts
        for place in places
    )
    return Recipe("task_arithmetic", right.base, experts, settings, kinds=kinds)
