"""The path from base over learned anchors to the expert."""

from __future__ import annotations

from pathlib import Path

import pytest

from optimizer.errors import RunError
from optimizer.run import open_run
from optimizer.runs.path import blend, path_of, recipe_at
from search_spaces.recipe import Recipe, Setting
from tests.optimizer.fakes import GROUPS, Bench

pytestmark = pytest.mark.slow  # whole studies are run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    bench = Bench(tmp_path_factory.mktemp("path") / "toy", learned=2)
    bench.search(trials=10, sampler="random")
    return bench.folder


def test_the_path_leads_from_base_to_expert_over_what_was_learned(folder: Path) -> None:
    run = open_run(folder)
    assert [(round(place, 3), run.kinds[trial].stored) for place, trial in path_of(run)] == [
        (0.0, "base"),
        (0.425, "learned p=0.42"),
        (0.775, "learned p=0.77"),
        (1.0, "expert:clinical"),
    ]


def test_a_place_of_a_trial_is_that_trial_and_one_between_two_has_the_weights_between_theirs(folder: Path) -> None:
    run = open_run(folder)
    _, (low, left), (high, right), _ = path_of(run)
    assert recipe_at(run, low) == (run.recipe(left), left)
    recipe, trial = recipe_at(run, low + 0.25 * (high - low))
    assert trial is None
    for group in GROUPS:
        ends = [run.recipe(number).value("weight", expert="clinical", group=group) for number in (left, right)]
        assert recipe.value("weight", expert="clinical", group=group) == pytest.approx(0.75 * ends[0] + 0.25 * ends[1])
    below, _ = recipe_at(run, low / 2)
    assert below.value("weight", expert="clinical", group="head") == pytest.approx(
        run.recipe(left).value("weight", expert="clinical", group="head") / 2
    )


def test_recipes_of_different_experts_are_blended_over_both() -> None:
    def recipe(expert: str, tensor: str) -> Recipe:
        settings = (Setting("weight", expert, "", 0.5), Setting("weight", expert, tensor, 0.8))
        return Recipe("task_arithmetic", "/base", ((expert, f"/{expert}"),), settings)

    one, other = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
    blended = blend(recipe("a", one), recipe("b", other), 0.25)
    assert dict(blended.experts) == {"a": "/a", "b": "/b"}
    found = {(e, t): blended.value("weight", expert=e, group=t) for e in "ab" for t in (one, other)}
    assert found == {("a", one): 0.75 * 0.8, ("a", other): 0.75 * 0.5, ("b", one): 0.125, ("b", other): 0.2}


def test_ends_with_kinds_are_blended_with_weights_learned_by_groups() -> None:
    places, kinds = ("embed", "layer.00.attn", "layer.00.qk", "head"), (("qk", ("q_proj",)),)

    def whole(value: float) -> Recipe:
        settings = tuple(Setting("weight", "a", place, value) for place in places)
        return Recipe("task_arithmetic", "/base", (("a", "/a"),), settings, kinds=kinds)

    learned = tuple(Setting("weight", "a", group, 0.6) for group in ("embed", "layer.00.attn", "layer.00.mlp", "head"))
    blended = blend(whole(0.0), Recipe("task_arithmetic", "/base", (("a", "/a"),), learned), 0.5)
    assert blended.kinds == ()
    assert {setting.group: setting.value for setting in blended.settings} == {s.group: 0.3 for s in learned}
    between = blend(whole(0.0), whole(1.0), 0.25)
    assert between.kinds == kinds
    assert {setting.value for setting in between.settings} == {0.25}
    assert len(between.settings) == len(places)


@pytest.mark.parametrize("knob", [-0.1, 1.5])
def test_a_knob_outside_its_range_is_refused(folder: Path, knob: float) -> None:
    with pytest.raises(RunError, match=r"between 0, the base, and 1, the expert; given"):
        recipe_at(open_run(folder), knob)


def test_a_run_without_learned_anchors_or_with_several_experts_has_no_path(tmp_path: Path) -> None:
    plain, two = Bench(tmp_path / "plain"), Bench(tmp_path / "two", experts=("clinical", "legal"), learned=1)
    plain.search(trials=8, sampler="random")
    two.search(trials=10, sampler="random")
    with pytest.raises(RunError, match="has no learned anchors"):
        recipe_at(open_run(plain.folder), 0.5)
    with pytest.raises(RunError, match="one leads from a base to one expert"):
        recipe_at(open_run(two.folder), 0.5)
