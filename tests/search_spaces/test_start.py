"""A space around a recipe holds it, as simply as can be, and scores it with the anchors."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search_spaces import Recipe, Setting, SpaceError
from search_spaces.choice import Choice
from search_spaces.shape import Shape
from search_spaces.space import Space
from search_spaces.start import space_around
from tests.search_spaces.names import depth_of
from tests.search_spaces.strategies import EXPERTS, GROUPS, LAYERS, TENSORS, spaces


def around(
    recipe: Recipe, shape: Shape | None = None, modules: tuple[str, ...] | None = None, **ranges: object
) -> Space:
    return space_around(recipe, name="from it", tensors=TENSORS, shape=shape, modules=modules, ranges=ranges)  # type: ignore[arg-type]


def ties(weights: dict[str, float], **others: float) -> Recipe:
    settings = [Setting("weight", "clinical", group, value) for group, value in weights.items()]
    others = {"normalize": 0.0, **others}
    return Recipe("ties", "org/base", EXPERTS[:1], (*settings, *(Setting(p, "", "", v) for p, v in others.items())))


def by_depth(first: float, last: float) -> dict[str, float]:
    return {group: first + depth_of(group, LAYERS) * (last - first) for group in GROUPS}


ATTN = {group: 0.3 if "attn" in group else 0.6 for group in GROUPS} | {"embed": 0.45, "head": 0.45}
ZIGZAG = {group: 0.1 + 0.2 * (i % 3) for i, group in enumerate(GROUPS)}


@pytest.mark.parametrize(
    ("weights", "shape", "modules"),
    [
        (dict.fromkeys(GROUPS, 0.4), Shape("uniform"), ()),
        (by_depth(0.2, 0.8), Shape("slope"), ()),
        (ATTN, Shape("uniform"), ("attn", "mlp")),
        (dict.fromkeys(GROUPS, 0.4) | {"embed": 0.0}, Shape("uniform"), ("attn", "mlp", "embed", "head")),
        (ZIGZAG, Shape("layers"), ("attn", "mlp", "embed", "head")),
    ],
)
def test_the_shape_is_the_simplest_that_holds_the_numbers(
    weights: dict[str, float], shape: Shape, modules: tuple[str, ...]
) -> None:
    space = around(ties(weights, density=0.5))
    assert (space.shape, space.modules) == (shape, modules)
    *_, last = space.anchors()
    assert last.name == "from it"
    made = space.recipe(last.params)
    for group in GROUPS:
        assert made.value("weight", expert="clinical", group=group) == pytest.approx(weights[group], abs=1e-9)
    assert made.value("density", expert="clinical") == 0.5


@given(spaces(), st.data())
def test_a_point_of_any_space_is_found_again(space: Space, data: st.DataObject) -> None:
    params = {n: data.draw(st.floats(d.low, d.high)) for n, d in space.distributions().items()}
    recipe = space.recipe(params)
    assert space.params_of(recipe) is not None
    again = around(recipe, space.shape, space.modules, **dict(space.ranges))
    assert again.distributions() == space.distributions()


def test_ranges_reach_as_far_as_the_numbers() -> None:
    weights = dict.fromkeys(GROUPS, 1.4)
    assert around(ties(weights, density=0.05)).ranges == {"weight": (0.0, 1.4), "density": (0.05, 1.0)}
    wider = around(ties(dict.fromkeys(GROUPS, -0.2), **{"lambda": 0.7}), weight=(-1.0, 1.0))
    assert wider.ranges == {"weight": (-1.0, 1.0), "density": (0.1, 1.0), "lambda": (0.7, 1.0)}


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (ties({"embed": 0.5}, normalize=1.0), "search of ties has normalize 0.*write normalize: false"),
        (ties({"model.norm.weight": 0.5}), "numbers for single ones.*model.norm.weight"),
        (ties({"embed": 0.5, "layer.99.attn": 0.5}), "part of the base; given: layer.99.attn"),
        (Recipe("arcee_fusion", "org/base", EXPERTS[:1], ()), "arcee_fusion cannot be searched"),
    ],
)
def test_what_no_space_holds_is_refused(recipe: Recipe, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        around(recipe)


def test_a_shape_or_range_of_ones_own_must_hold_the_recipe() -> None:
    with pytest.raises(SpaceError, match=r"holds the recipe.*leave shape and modules out"):
        around(ties(ZIGZAG), Shape("slope"))
    with pytest.raises(SpaceError, match="holds the recipe"):
        around(ties(dict.fromkeys(GROUPS, 1.4)), weight=(0.0, 1.0))


def test_among_several_methods_the_start_is_of_its_own() -> None:
    start = around(ties(by_depth(0.2, 0.8), density=0.5))
    plain = Space("linear", start.base, start.experts, start.groups, start.shape, start.modules, {"weight": (0.0, 1.0)})
    choice = Choice((plain, start))
    assert choice.anchors()[-1].name == "from it"
    assert choice.anchors()[-1].params["method"] == "ties"
    assert choice.recipe(choice.anchors()[-1].params).value("density", expert="clinical") == 0.5
