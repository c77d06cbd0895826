"""A choice among methods: every trial has its own method's parameters, and no others."""

from __future__ import annotations

import optuna
import pytest

from search_spaces import SpaceError
from search_spaces.choice import Choice
from search_spaces.space import Space
from tests.search_spaces.strategies import EXPERTS, TENSORS


def space(method: str, *, count: int = 1, **ranges: tuple[float, float]) -> Space:
    return Space.build(
        method,
        "org/base",
        experts=dict(EXPERTS[:count]),
        tensors=TENSORS,
        shape="slope",
        modules=[],
        ranges=ranges,
    )


def choice() -> Choice:
    return Choice((space("task_arithmetic"), space("ties"), space("dare_ties")))


WEIGHTS = ["clinical.weight.slope.0", "clinical.weight.slope.1"]


def test_weights_are_shared_and_everything_else_belongs_to_a_method() -> None:
    assert list(choice().distributions()) == [
        "method",
        *WEIGHTS,
        "ties.clinical.density",
        "dare_ties.clinical.density",
    ]


def test_weights_of_another_range_or_name_are_a_methods_own() -> None:
    names = Choice((space("linear"), space("ties", weight=(0.0, 2.0), density=(1.0, 1.0)), space("slerp")))
    assert list(names.distributions()) == [
        "method",
        *(f"linear.{name}" for name in WEIGHTS),
        *(f"ties.{name}" for name in WEIGHTS),
        "t.slope.0",
        "t.slope.1",
    ]


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_trial_has_the_parameters_of_its_method_only(sampler: str) -> None:
    samplers = {
        "random": optuna.samplers.RandomSampler(seed=0),
        "tpe": optuna.samplers.TPESampler(n_startup_trials=6, seed=0),
    }
    own = {"task_arithmetic": set(), "ties": {"ties.clinical.density"}, "dare_ties": {"dare_ties.clinical.density"}}
    chosen = choice()
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=samplers[sampler])
    for anchor in chosen.anchors():
        study.enqueue_trial(anchor.params)
    methods = set()
    for _ in range(25):
        trial = study.ask()
        params = chosen.suggest(trial)
        assert params == trial.params
        recipe = chosen.recipe(params)
        assert recipe.method == params["method"]
        assert set(params) == {"method", *WEIGHTS, *own[recipe.method]}
        study.tell(trial, [recipe.value("weight", expert="clinical", group="layer.00.mlp"), len(methods)])
        methods.add(recipe.method)
    assert methods == set(own)


def test_a_recipe_is_that_of_the_methods_own_space() -> None:
    numbers = dict.fromkeys(WEIGHTS, 0.25)
    found = choice().recipe({"method": "ties", **numbers, "ties.clinical.density": 0.5})
    assert found == space("ties").recipe({**numbers, "clinical.density": 0.5})


def test_anchors_come_once_from_the_first_method() -> None:
    anchors = choice().anchors()
    assert [anchor.name for anchor in anchors] == [anchor.name for anchor in space("task_arithmetic").anchors()]
    assert {choice().recipe(anchor.params).method for anchor in anchors} == {"task_arithmetic"}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"method": "slerp"}, "one of the study's"),
        ({}, "one of the study's"),
        ({"method": "ties", **dict.fromkeys(WEIGHTS, 0.5)}, "missing"),
        ({"method": "ties", **dict.fromkeys(WEIGHTS, 0.5), "dare_ties.clinical.density": 1}, "is not one of"),
        ({"method": "linear", **dict.fromkeys(WEIGHTS, 0.5)}, "one of the study's"),
        ({"method": "task_arithmetic", **dict.fromkeys(WEIGHTS, 0.5), "ties.clinical.density": 1}, "is not one of"),
        ({"method": "task_arithmetic", **dict.fromkeys(WEIGHTS, 5.0)}, "lies in its range"),
        ({"method": "task_arithmetic", **dict.fromkeys(WEIGHTS, "much")}, "lies in its range"),
    ],
)
def test_other_parameters_are_refused(params: dict[str, float | str], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        choice().recipe(params)


def test_a_choice_is_between_different_methods() -> None:
    for spaces in ((space("ties"),), (space("ties"), space("ties", density=(0.5, 1.0)))):
        with pytest.raises(SpaceError, match="different methods"):
            Choice(spaces)


def test_parameters_of_only_some_methods_make_it_conditional() -> None:
    assert choice().is_conditional
    assert not Choice((space("task_arithmetic"), space("linear"))).is_conditional
    assert not Choice((space("task_arithmetic"), space("ties", density=(1.0, 1.0)))).is_conditional
