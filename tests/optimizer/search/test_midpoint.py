"""The largest gap of a front is halved: by parameters where both neighbours have them, else by weights."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from optimizer.runs.path import blend
from optimizer.runs.trial import TrialKind
from optimizer.search.midpoint import front_midpoint
from search_spaces.recipe import Recipe, Setting
from search_spaces.space import Shape
from tests.optimizer.fakes import space_of

SPACE = space_of(("clinical",), Shape("uniform"), "task_arithmetic")


def everywhere(weight: float) -> dict[str, float]:
    return dict.fromkeys(SPACE.distributions(), weight)


def recipe_of(weight: float, name: str = "clinical", method: str = "task_arithmetic") -> str:
    return Recipe(
        method, "/models/base", ((name, f"/models/{name}"),), (Setting("weight", name, "", weight),)
    ).to_json()


def ledger_of(
    values: list[tuple[float, float]],
    params: list[dict[str, float]],
    *,
    limit: float = 9.0,
    recipes: list[str] | None = None,
    learned: tuple[int, ...] = (),
    beaten: tuple[int, ...] = (),
) -> Any:
    """Trials on a front, of which some have no params, and what is told of a limit on forgetting."""
    trials = [SimpleNamespace(number=i, params=given) for i, given in enumerate(params)]
    return SimpleNamespace(
        trials=lambda: trials,
        front=lambda: set(range(len(values))) - {*beaten},
        kinds={n: TrialKind("learned p=0.60" if n in learned else "search") for n in range(len(values))},
        stopped=set(),
        is_kept_off=lambda number: False,
        values=dict(enumerate(values)),
        seen=set(),
        recipes=dict(enumerate(recipes or [recipe_of(0.5)] * len(values))),
        constraints=lambda number: {"max_forgetting": values[number][-1] - limit},
    )


def test_between_points_without_params_lies_the_mean_of_their_weights() -> None:
    values = [(0.1, 0.0), (0.3, 0.1), (1.0, 0.5)]
    recipes = [recipe_of(0.0), recipe_of(1.0, "clinical_fisher_60"), recipe_of(1.0)]
    found = front_midpoint(ledger_of(values, [everywhere(0.0), {}, everywhere(1.0)], recipes=recipes), SPACE)
    assert found is not None
    assert found.params is None
    assert found.trials == (1, 2)  # the rectangle between them is the largest
    assert dict(found.recipe.experts) == {name: f"/models/{name}" for name in ("clinical", "clinical_fisher_60")}
    assert {s.value for s in found.recipe.settings} == {0.5}


def test_a_gap_that_a_learned_point_seems_to_fill_is_halved_too() -> None:
    values = [(0.0, 0.0), (0.8, 0.1), (1.05, 0.2), (1.0, 0.6)]  # the third was learned, and beats the expert
    recipes = [recipe_of(0.0), recipe_of(1.0, "fisher"), recipe_of(1.0, "learned"), recipe_of(1.0)]
    ledger = ledger_of(values, [{}] * 4, recipes=recipes, learned=(2,), beaten=(3,))
    found = front_midpoint(ledger, SPACE)
    assert found is not None
    assert found.trials == (1, 3)


def test_an_expert_that_counts_nothing_is_left_out_of_a_midpoint() -> None:
    recipes = [recipe_of(0.0), recipe_of(1.0, "derived")]
    found = front_midpoint(ledger_of([(0.0, 0.0), (1.0, 0.5)], [{}, {}], recipes=recipes), SPACE)
    assert found is not None
    assert [name for name, _ in found.recipe.experts] == ["derived"]


def test_what_does_not_mix_has_no_midpoint() -> None:
    ties = recipe_of(0.5, method="ties")
    assert front_midpoint(ledger_of([(0.0, 0.0), (1.0, 0.5)], [{}, {}], recipes=[recipe_of(1.0), ties]), SPACE) is None
    assert front_midpoint(ledger_of([(0.0, 0.0)], [{}]), SPACE) is None
    half = Recipe.from_json(recipe_of(0.5))
    tensor = Setting("weight", "clinical", "model.norm.weight", 0.3)
    for settings in ((*half.settings, Setting("lambda", "", "", 0.5)), (*half.settings, tensor)):
        odd = replace(half, settings=settings).to_json()  # a scale beside the weights, or a number of one tensor alone
        ledger = ledger_of([(0.0, 0.0), (1.0, 0.5)], [{}, {}], recipes=[recipe_of(1.0), odd])
        assert front_midpoint(ledger, SPACE) is None
    many = [recipe_of(1.0, f"derived_{i}") for i in range(5)]
    crowd = recipe_of(0.2)
    for i in range(4):
        crowd = blend(Recipe.from_json(crowd), Recipe.from_json(many[i]), 0.5).to_json()
    assert front_midpoint(ledger_of([(0.0, 0.0), (1.0, 0.5)], [{}, {}], recipes=[crowd, many[4]]), SPACE) is None


def test_the_midpoint_lies_between_the_neighbours_that_leave_the_largest_gap() -> None:
    values = [(0.1, 0.0), (0.2, 0.1), (0.9, 0.5)]
    ledger = ledger_of(values, [everywhere(0.0), everywhere(0.25), everywhere(0.75)])
    found = front_midpoint(ledger, SPACE)
    assert found is not None
    assert found.params == everywhere(0.5)
    assert found.recipe == SPACE.recipe(everywhere(0.5))


def test_with_a_limit_only_the_gaps_up_to_it_are_filled() -> None:
    values, params = [(0.0, 0.0), (0.3, 0.04), (0.4, 0.06), (1.0, 0.5)], [everywhere(w) for w in (0.0, 0.3, 0.4, 1.0)]
    free = front_midpoint(ledger_of(values, params), SPACE)
    limited = front_midpoint(ledger_of(values, params, limit=0.05), SPACE)
    assert free is not None
    assert limited is not None
    assert free.params == pytest.approx(everywhere(0.7))
    assert limited.params == pytest.approx(everywhere(0.15))
