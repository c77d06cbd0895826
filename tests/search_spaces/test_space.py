from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import FloatDistribution

from search_spaces import METHODS, SpaceError, group_tensors
from search_spaces.shape import Shape
from search_spaces.space import Space
from tests.search_spaces.names import ALL, depth_of, llama
from tests.search_spaces.strategies import GROUPS, LAYERS, spaces

ONE = {"clinical": "a/clinical"}
TWO = {**ONE, "law": "a/law"}


def build(
    method: str = "task_arithmetic",
    *,
    experts: Mapping[str, str] = ONE,
    shape: str | dict[str, int] | Shape = "layers",
    modules: tuple[str, ...] = (),
    ranges: Mapping[str, tuple[float, float]] | None = None,
    layers: int = LAYERS,
) -> Space:
    return Space.build(
        method, "a/base", experts=experts, tensors=llama(layers), shape=shape, modules=modules, ranges=ranges or {}
    )


def weights(space: Space, params: Mapping[str, float], expert: str = "clinical") -> dict[str, float]:
    recipe, scale = space.recipe(params), METHODS[space.method].scale
    owner = expert if scale == "weight" else ""
    return {group: recipe.value(scale, expert=owner, group=group) for group in space.groups}


@given(spaces())
def test_every_anchor_lies_in_the_space_and_makes_a_recipe(space: Space) -> None:
    distributions = space.distributions()
    anchors = space.anchors()
    for anchor in anchors:
        assert list(anchor.params) == list(distributions)
        assert all(distributions[name]._contains(value) for name, value in anchor.params.items())
        assert {group for _, group in _explicit(space, anchor.params)} == set(space.groups)
    names = [anchor.name for anchor in anchors]
    assert names[: 1 + len(space.experts)] == ["base", *(f"expert:{name}" for name, _ in space.experts)]
    assert len({space.recipe(anchor.params).digest for anchor in anchors}) == len(set(names)) == len(anchors)


def _explicit(space: Space, params: Mapping[str, float]) -> set[tuple[str, str]]:
    scale = METHODS[space.method].scale
    return {(s.expert, s.group) for s in space.recipe(params).settings if s.parameter == scale}


@given(spaces(), st.sampled_from([0.0, 1.0, 0.25, 0.3]))
def test_a_level_profile_gives_its_value_everywhere_exactly(space: Space, level: float) -> None:
    params = space.profile_params(lambda depth: level)
    for name, _ in space.experts:
        assert set(weights(space, params, name).values()) == {level}


@given(spaces())
def test_base_and_expert_anchors_are_base_and_expert(space: Space) -> None:
    base, *anchors = space.anchors()
    for name, _ in space.experts:
        assert set(weights(space, base.params, name).values()) == {0.0}
        for other, anchor in zip(space.experts, anchors, strict=False):
            assert set(weights(space, anchor.params, name).values()) == {float(name == other[0])}
    recipe = space.recipe(base.params)
    for parameter in METHODS[space.method].parameters:
        if parameter.name != space.spec.scale:
            wanted = dict(space.spec.fixed_in_search).get(parameter.name, parameter.default)
            assert recipe.value(parameter.name) == wanted


@given(spaces(), st.data())
def test_any_point_of_the_box_makes_a_recipe_whose_weights_lie_in_the_range(space: Space, data: st.DataObject) -> None:
    params = {}
    for name, distribution in space.distributions().items():
        assert isinstance(distribution, FloatDistribution)
        params[name] = data.draw(st.floats(distribution.low, distribution.high), label=name)
    low, high = space.ranges[METHODS[space.method].scale]
    for name, _ in space.experts:
        assert all(low - 1e-12 <= weight <= high + 1e-12 for weight in weights(space, params, name).values())
    assert space.size == len(params)
    assert space.recipe(params) == space.recipe(dict(reversed(params.items())))


@given(
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(2, 9),
    st.sampled_from([("attn", "mlp"), (), ("embed",), ("head", "mlp")]),
)
def test_slope_curve_and_layers_agree_on_a_straight_profile(
    first: float, last: float, layers: int, modules: tuple[str, ...]
) -> None:
    met = []
    for shape in ("slope", "layers", {"curve": min(layers, 3)}, {"blocks": layers}):
        space = build(shape=shape, modules=modules, layers=layers)
        params = space.profile_params(lambda depth: first + depth * (last - first))
        met.append(weights(space, params))
    for other in met[1:]:
        assert met[0] == pytest.approx(other, abs=1e-12)
    expected = {group: first + depth_of(group, layers) * (last - first) for group in met[0]}
    assert met[0] == pytest.approx(expected, abs=1e-12)


def test_lines_of_the_lines_method_are_met() -> None:
    """Equation of LiNeS, arXiv 2410.17146: lambda_l = alpha + beta (l - 1)/(L - 1)."""
    anchors = {anchor.name: anchor for anchor in build("linear").anchors(slopes=[(0.2, 0.9)])}
    found = weights(build("linear"), anchors["slope 0.20->0.90"].params)
    for layer in range(1, LAYERS + 1):
        assert found[f"layer.{layer - 1:02d}.mlp"] == pytest.approx(0.2 + 0.7 * (layer - 1) / (LAYERS - 1))


def test_blocks_split_the_layers_evenly() -> None:
    space = build(shape={"blocks": 3}, layers=7)
    found = weights(space, {f"clinical.weight.block.{b}": b / 10 for b in range(3)})
    assert [found[f"layer.{i:02d}.attn"] for i in range(7)] == [0.0, 0.0, 0.0, 0.1, 0.1, 0.2, 0.2]
    assert (found["embed"], found["head"]) == (0.0, 0.2)


def test_a_curve_is_straight_between_its_knots() -> None:
    space = build(shape={"curve": 3}, layers=5)
    found = weights(space, {f"clinical.weight.curve.{i}": value for i, value in enumerate((0.0, 1.0, 0.5))})
    assert [found[f"layer.{i:02d}.mlp"] for i in range(5)] == pytest.approx([0.0, 0.5, 1.0, 0.75, 0.5])


def test_embed_and_head_follow_the_edge_layers_unless_they_are_named() -> None:
    params = {"clinical.weight.attn": 0.2, "clinical.weight.mlp": 0.6}
    found = weights(build(shape="uniform", modules=("attn",)), params)
    assert (found["embed"], found["head"]) == pytest.approx((0.4, 0.4))
    own = build(shape="uniform", modules=("mlp", "embed", "head"))
    found = weights(own, params | {"clinical.weight.embed": 0.0, "clinical.weight.head": 1.0})
    assert (found["embed"], found["layer.01.attn"], found["layer.01.mlp"], found["head"]) == (0.0, 0.2, 0.6, 1.0)


@pytest.mark.parametrize(
    ("shape", "modules", "expected"),
    [
        ("uniform", (), ["weight"]),
        ("uniform", ("attn",), ["weight.attn", "weight.mlp"]),
        ("slope", (), ["weight.slope.0", "weight.slope.1"]),
        ({"curve": 2}, ("head",), ["weight.curve.0", "weight.curve.1", "weight.head"]),
        ({"blocks": 1}, ("attn", "mlp"), ["weight.attn.block.0", "weight.mlp.block.0"]),
        ("layers", (), [f"weight.layer.{i:02d}" for i in range(LAYERS)]),
        ("layers", ("mlp",), [f"weight.layer.{i:02d}.{kind}" for kind in ("attn", "mlp") for i in range(LAYERS)]),
    ],
)
def test_parameters_have_readable_names(
    shape: str | dict[str, int], modules: tuple[str, ...], expected: list[str]
) -> None:
    assert list(build(shape=shape, modules=modules).distributions()) == [f"clinical.{name}" for name in expected]


def test_names_beside_the_weight() -> None:
    space = build("dare_ties", experts=TWO, shape="uniform", ranges={"lambda": (0.5, 2.0)})
    assert list(space.distributions()) == [
        "clinical.weight",
        "law.weight",
        "clinical.density",
        "law.density",
        "lambda",
    ]
    assert list(build("slerp", shape="slope").distributions()) == ["t.slope.0", "t.slope.1"]


def test_a_fixed_range_is_set_and_not_searched() -> None:
    space = build("ties", shape="uniform", ranges={"density": (1.0, 1.0)})
    assert list(space.distributions()) == ["clinical.weight"]
    assert space.recipe({"clinical.weight": 0.5}).value("density", expert="clinical") == 1.0


def test_a_weight_is_a_scale_in_ties_with_one_expert() -> None:
    space = build("ties", shape="uniform")
    assert space.recipe({"clinical.weight": 0.5, "clinical.density": 1.0}).value("normalize") == 0.0


def test_several_experts_share_the_uniform_line_and_may_have_profiles_of_their_own() -> None:
    space = build(experts=TWO)
    anchors = {anchor.name: anchor.params for anchor in space.anchors()}
    assert set(weights(space, anchors["uniform a=0.50"], "law").values()) == {0.25}
    params = space.profile_params({"clinical": lambda depth: depth, "law": lambda depth: 1 - depth})
    assert weights(space, params, "clinical")["head"] == weights(space, params, "law")["embed"] == 1.0
    with pytest.raises(SpaceError, match="every expert has a profile"):
        space.profile_params({"law": lambda depth: 0.0})


def test_a_shape_with_one_weight_has_no_slope() -> None:
    assert [anchor.name for anchor in build(shape="uniform").anchors(alphas=[0.5])] == [
        "base",
        "expert:clinical",
        "uniform a=0.50",
    ]
    assert "slope 0.00->1.00" in [anchor.name for anchor in build(shape="slope").anchors()]


def test_a_point_is_an_anchor_once() -> None:
    names = [anchor.name for anchor in build().anchors(alphas=[0.0, 0.5, 1.0, 0.5], slopes=[(0.5, 0.5)])]
    assert names == ["base", "expert:clinical", "uniform a=0.50"]


def test_a_profile_outside_the_range_is_refused() -> None:
    with pytest.raises(SpaceError, match=r"in its range.*1.5.*clinical.weight.layer.03 in \[0.0, 1.0\]"):
        build().profile_params(lambda depth: 1.5 * depth)
    assert build(ranges={"weight": (0, 1.5)}).profile_params(lambda depth: 1.5 * depth)


@pytest.mark.parametrize("names", ALL.values(), ids=ALL.keys())
def test_every_architecture_has_a_space(names: Callable[[], dict[str, str]]) -> None:
    space = Space.build("linear", "b", experts=ONE, tensors=names(), shape="layers", modules=("mlp",), ranges={})
    assert space.groups == tuple(group_tensors(names()))
    assert space.size == 6


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "missing.*clinical.weight"),
        ({"clinical.weight": 0.5, "law.weight": 0.5}, "no such parameter.*law.weight.*are clinical.weight"),
        ({"clinical.weight": math.nan}, "in its range.*nan"),
        ({"clinical.weight": -0.1}, r"in its range.*-0.1.*\[0.0, 1.0\]"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(params: dict[str, float], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        build(shape="uniform").recipe(params)


@pytest.mark.parametrize(
    ("method", "ranges", "message"),
    [
        ("linear", {"weight": (0.1, 1)}, "weight holds 0 and 1.*points of every space"),
        ("linear", {"weight": (0, 0.9)}, "weight holds 0 and 1"),
        ("ties", {"density": (0.1, 0.9)}, "density holds 1"),
        ("ties", {"density": (0, 1)}, r"above 0, at most 1.*space.density"),
        ("ties", {"lambda": (0.1, 0.9)}, "lambda holds 1"),
        ("ties", {"normalize": (0, 1)}, "switch"),
        ("linear", {"density": (0.1, 1)}, "linear has no such parameter.*density.*one of weight"),
        ("linear", {"weight": (1, 0)}, "low to high"),
        ("linear", {"weight": (0, 1, 2)}, "two numbers"),
        ("linear", {"weight": (False, True)}, "two numbers"),
        ("linear", {"weight": "01"}, "two numbers"),
        ("linear", {"weight": (0, math.inf)}, "finite"),
        ("slerp", {"t": (0, 1.5)}, "from 0 to 1"),
        ("slerp", {"weight": (0, 1)}, "slerp has no such parameter.*one of t"),
    ],
)
def test_a_wrong_range_is_refused(method: str, ranges: dict[str, tuple[float, float]], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        build(method, ranges=ranges)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("wavy", "not known.*wavy.*one of uniform"),
        ("curve", "at least 2.*given: 0.*curve: 4"),
        ({"curve": 1}, "at least 2"),
        ({"blocks": 0}, "at least 1"),
        ({"blocks": True}, "whole number"),
        ({"blocks": LAYERS + 1}, "no more numbers than the model has layers, 4"),
        ({"uniform": 2}, "takes no number"),
        ({"curve": 2, "blocks": 3}, "one word with a number"),
    ],
)
def test_a_wrong_shape_is_refused(shape: str | dict[str, int], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        build(shape=shape)


def test_wrong_modules_experts_and_methods_are_refused() -> None:
    with pytest.raises(SpaceError, match=r"different ones of embed, attn, mlp, head.*norm"):
        build(modules=("norm",))
    with pytest.raises(SpaceError, match="different ones"):
        build(modules=("mlp", "mlp"))
    with pytest.raises(SpaceError, match="slerp merges 1 expert"):
        build("slerp", experts=TWO)
    with pytest.raises(SpaceError, match="not known"):
        build("tise")
    with pytest.raises(SpaceError, match="linear searches weight"):
        Space("linear", "b", (("a", "x"),), GROUPS, Shape("uniform"), (), {})


def test_what_compares_experts_is_searched_from_two_on() -> None:
    assert "select_topk" not in build("sce").distributions()
    assert "select_topk" in build("sce", experts=TWO).distributions()


@pytest.mark.parametrize("shape", ["uniform", "slope", "layers", {"blocks": 1}])
def test_a_model_of_one_layer_has_every_shape_but_a_curve(shape: str | dict[str, int]) -> None:
    space = build(shape=shape, layers=1)
    assert set(weights(space, space.profile_params(lambda depth: 1.0)).values()) == {1.0}


def test_a_model_of_one_layer_has_no_curve() -> None:
    with pytest.raises(SpaceError, match="no more numbers than the model has layers, 1; given: 2"):
        build(shape={"curve": 2}, layers=1)


@pytest.mark.parametrize(
    ("module", "absent"),
    [("search_spaces", ["optuna", "torch"]), ("search_spaces.space", ["torch", "ray", "pydantic"])],
)
def test_imports_bring_no_heavy_library(module: str, absent: list[str]) -> None:
    code = f"import sys, {module}; print([name for name in {absent} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
