"""Recipes, shapes and spaces for hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

from search_spaces import METHODS, MethodSpec, Parameter, Recipe, Setting, group_tensors
from search_spaces.shape import Shape
from search_spaces.space import Space
from tests.search_spaces.names import llama

LAYERS = 4
TENSORS = tuple(llama(LAYERS))
GROUPS = tuple(group_tensors(TENSORS))
OWN = tuple(name for name in TENSORS if "layers.1.mlp" in name or name == "model.norm.weight")  # have numbers too
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)  # what no key expects
EXPERTS = (("clinical", "runs/clinical"), ("law", "org/law"), ("b-3_x", "somewhere/b-3_x"))


def values(parameter: Parameter) -> st.SearchStrategy[float]:
    """Give values a parameter allows, the whole domain over."""
    return {
        "real": st.floats(-2.0, 2.0),
        "unit": st.floats(0.0, 1.0),
        "share": st.floats(0.0, 1.0, exclude_min=True),
        "switch": st.sampled_from([0.0, 1.0]),
        "size": st.floats(0.0, 2.0),
        "count": st.integers(0, 20).map(float),
    }[parameter.domain]


def _counts(spec: MethodSpec) -> st.SearchStrategy[int]:
    return st.integers(spec.min_experts, min(spec.max_experts or len(EXPERTS), len(EXPERTS)))


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Give any recipe: every method, settings at every level of detail."""
    spec = METHODS[draw(st.sampled_from(sorted(METHODS)))]
    experts = EXPERTS[: draw(_counts(spec))]
    settings = []
    for parameter in spec.parameters:
        owners = ["", *(name for name, _ in experts)] if parameter.scope == "expert" else [""]
        groups = ["", *GROUPS, *OWN] if parameter.scope != "recipe" else [""]
        for owner in owners:
            for group in draw(st.lists(st.sampled_from(groups), unique=True)):
                settings.append(Setting(parameter.name, owner, group, draw(values(parameter))))
    return Recipe(spec.name, "org/base", experts, tuple(draw(st.permutations(settings))))


shapes = st.one_of(
    st.sampled_from([Shape("uniform"), Shape("slope"), Shape("layers")]),
    st.integers(2, LAYERS).map(lambda n: Shape("curve", n)),
    st.integers(1, LAYERS).map(lambda n: Shape("blocks", n)),
)


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    """Give any space over a small Llama."""
    spec = METHODS[draw(st.sampled_from(sorted(name for name in METHODS if not METHODS[name].unsearchable)))]
    count = draw(_counts(spec))
    ranges = {} if spec.scale == "t" else {"weight": draw(st.sampled_from([(0.0, 1.0), (-0.5, 1.5)]))}
    if spec.parameter("density"):
        ranges["density"] = draw(st.sampled_from([(0.2, 1.0), (1.0, 1.0)]))
    if spec.parameter("lambda") and draw(st.booleans()):
        ranges["lambda"] = (0.5, 1.5)
    modules = draw(st.lists(st.sampled_from(["embed", "attn", "mlp", "head"]), unique=True))
    return Space.build(
        spec.name,
        "org/base",
        experts=dict(EXPERTS[:count]),
        tensors=TENSORS,
        shape=draw(shapes),
        modules=modules,
        ranges=ranges,
    )
