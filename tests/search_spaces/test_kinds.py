"""Kinds of modules finer than groups: what they cover, their weights, and their filters in mergekit's documents."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from search_spaces import Recipe, Setting, SpaceError, group_of
from search_spaces.kinds import KNOWN, Kinds, kind_name, kinds_for, place_of, place_tensors
from search_spaces.mergekit.reader import from_mergekit
from search_spaces.mergekit.writer import to_mergekit
from search_spaces.shape import Shape
from search_spaces.space import Space
from search_spaces.start import regrouped, space_around
from tests.search_spaces.names import llama, mixtral

QK: Kinds = (("qk", ("q_proj", "k_proj")),)
LLAMA = tuple(llama(4, tied=False))
LAYER = "model.layers.{i}."
MIXTURES = {  # what each kind covers in one layer, as families write it
    "deepseek_v3": {
        "experts": ["mlp.experts.3.gate_proj.weight", "mlp.experts.0.down_proj.weight"],
        "router": ["mlp.gate.weight", "mlp.gate.e_score_correction_bias"],
        "shared_expert": ["mlp.shared_experts.gate_proj.weight"],
    },
    "gpt_oss": {
        "experts": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj_bias"],
        "router": ["mlp.router.weight", "mlp.router.bias"],
    },
    "granitemoehybrid": {
        "experts": ["block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"],
        "router": ["block_sparse_moe.router.layer.weight"],
        "shared_expert": ["shared_mlp.input_linear.weight"],
    },
    "lfm2_moe": {"experts": ["feed_forward.experts.0.w1.weight"], "router": ["feed_forward.expert_bias"]},
    "llama4_text": {
        "experts": ["feed_forward.experts.gate_up_proj"],
        "router": ["feed_forward.router.weight"],
        "shared_expert": ["feed_forward.shared_expert.up_proj.weight"],
    },
    "qwen2_moe": {
        "experts": ["mlp.experts.0.up_proj.weight"],
        "router": ["mlp.gate.weight"],
        "shared_expert": ["mlp.shared_expert.up_proj.weight", "mlp.shared_expert_gate.weight"],
    },
}


def build(modules: Mapping[str, tuple[str, ...]] | tuple[str, ...], shape: str | dict[str, int] = "layers",
          tensors: tuple[str, ...] = LLAMA) -> Space:  # fmt: skip
    patterns = {name: given for name, given in modules.items() if given} if isinstance(modules, Mapping) else {}
    return Space.build(
        "task_arithmetic", "a/base", experts={"law": "a/law"}, tensors=tensors, shape=shape, modules=modules,
        ranges={}, patterns=patterns,
    )  # fmt: skip


@pytest.mark.parametrize("family", MIXTURES)
def test_the_kinds_of_a_mixture_are_told_apart(family: str) -> None:
    parts = {f"{LAYER.format(i=1)}{name}": kind for kind, names in MIXTURES[family].items() for name in names}
    others = [f"model.layers.{i}.{name}.weight" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.gate_proj")]
    kinds = kinds_for(tuple(MIXTURES[family]), {}, [*parts, *others])
    assert {name: place_of(name, kinds) for name in parts} == {name: f"layer.01.{kind}" for name, kind in parts.items()}
    assert [place_of(name, kinds) for name in others] == [group_of(name) for name in others]


def test_kinds_take_their_tensors_out_of_groups_and_leave_all_others() -> None:
    places, groups = place_tensors(LLAMA, QK), place_tensors(LLAMA)
    assert sorted(name for names in places.values() for name in names) == sorted(LLAMA)
    assert places["layer.02.qk"] == ("model.layers.2.self_attn.k_proj.weight", "model.layers.2.self_attn.q_proj.weight")
    assert set(places["layer.02.attn"]) | set(places["layer.02.qk"]) == set(groups["layer.02.attn"])
    assert places["layer.02.mlp"] == groups["layer.02.mlp"]
    assert list(place_tensors(["lm_head.weight", *LLAMA], (("out", ("lm_head",)),)))[-2:] == ["head", "head.out"]


def test_a_recipe_with_kinds_is_told_from_one_without_and_reads_back() -> None:
    settings = (Setting("weight", "law", "", 0.2), Setting("weight", "law", "layer.01.qk", 0.7))
    recipe = Recipe("linear", "b", (("law", "l"),), settings, kinds=QK)
    assert Recipe.from_json(recipe.to_json()) == recipe
    values = {name: recipe.value("weight", expert="law", group=f"model.layers.{n}.self_attn.{name}.weight")
              for n, name in ((1, "q_proj"), (1, "v_proj"), (0, "k_proj"))}  # fmt: skip
    assert values == {"q_proj": 0.7, "v_proj": 0.2, "k_proj": 0.2}
    assert recipe.tensors == frozenset()
    recipe.require_places(LLAMA)
    other = Recipe("linear", "b", (("law", "l"),), settings, kinds=(("qk", ("v_proj",)),))
    assert other.digest != recipe.digest
    with pytest.raises(SpaceError, match=r"layer.NN.mlp.*given.*'layer.01.qk'"):
        Recipe("linear", "b", (("law", "l"),), settings)


@pytest.mark.parametrize(
    ("modules", "shape", "names"),
    [
        ({"qk": ("q_proj", "k_proj")}, "uniform", ["weight", "weight.qk"]),
        ({"qk": ("q_proj",), "attn": (), "mlp": ()}, "uniform", ["weight.attn", "weight.mlp", "weight.qk"]),
        ({"qk": ("q_proj",), "ends": ("embed_tokens", "lm_head")}, "uniform",
         ["weight", "weight.qk", "weight.embed.ends", "weight.head.ends"]),
        ({"qk": ("q_proj",)}, "slope", [f"weight.{part}slope.{i}" for part in ("", "qk.") for i in (0, 1)]),
    ],
)  # fmt: skip
def test_each_kind_has_weights_of_its_own(modules: dict[str, tuple[str, ...]], shape: str, names: list[str]) -> None:
    space = build(modules, shape)
    assert list(space.distributions()) == [f"law.{name}" for name in names]
    for level in (0.0, 0.3, 1.0):
        recipe = space.recipe(space.profile_params(lambda depth, level=level: level))
        assert {recipe.value("weight", expert="law", group=name) for name in LLAMA} == {level}
    params = {name: 0.1 * i for i, name in enumerate(space.distributions())}
    assert space.params_of(space.recipe(params)) == pytest.approx(params)


def test_experts_of_some_layers_only_have_no_weights_elsewhere() -> None:
    names = [name for name in mixtral(4) if "layers.0.block_sparse_moe" not in name]
    space = build(("experts", "router"), "layers", (*names, "model.layers.0.mlp.up_proj.weight"))
    own = [name for name in space.distributions() if name.endswith(("experts", "router"))]
    assert own == [f"law.weight.layer.{i:02d}.{kind}" for kind in ("experts", "router") for i in (1, 2, 3)]
    params = {name: 0.01 * i for i, name in enumerate(space.distributions())}
    assert space.params_of(space.recipe(params)) == pytest.approx(params)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"qk": ("q_prj",)}, r"some tensor's name.*'q_prj'.*space.modules.qk.*near it are q_proj"),
        ({"a": ("q_proj",), "b": ("self_attn.q_proj", "k_proj")}, "no kind before it takes.*space.modules.b"),
        ({"experts": ()}, r"no experts that is known here.*give parts"),
        ({"mlp2": ("mlp",), "mlp": ()}, None),
        ({"all": ("layers",), "mlp": ()}, "modules are different ones of all, embed, head.*'mlp'"),
        ({"embed": ("embed_tokens",)}, "embed, attn, mlp, head, layer, passed, weight, bias are taken"),
        ({"Q": ("q_proj",)}, "name of its own"),
    ],
)  # fmt: skip
def test_kinds_that_cover_nothing_are_refused_by_name(modules: dict[str, tuple[str, ...]], message: str | None) -> None:
    if message is None:
        assert build(modules).size == 12  # post_attention_layernorm is left of mlp
        return
    with pytest.raises(SpaceError, match=message):
        build(modules)


def zigzag(space: Space) -> Recipe:
    return space.recipe({name: (i % 7) / 10 for i, name in enumerate(space.distributions())})


@pytest.mark.parametrize(
    ("modules", "tensors", "filters"),
    [
        ({"qk": ("q_proj", "k_proj"), "attn": (), "mlp": ()}, LLAMA, ["q_proj", "k_proj", ".self_attn."]),
        (("attn", "mlp", "experts", "router"), tuple(mixtral(4)), [".experts.", ".gate."]),
        ({"ends": ("embed_tokens", "lm_head"), "up": ("mlp.up",)}, LLAMA, ["mlp.up"]),
        ({"proj": ("_proj", "embed"), "norms": ("norm",)}, LLAMA, ["_proj", "embed", "norm"]),
    ],
)
def test_kinds_are_filters_in_mergekits_document_and_read_back(
    modules: dict[str, tuple[str, ...]], tensors: tuple[str, ...], filters: list[str]
) -> None:
    recipe = zigzag(build(modules, tensors=tensors))
    document = to_mergekit(recipe, tensors, out_dtype="float32")
    rules = document["models"][0]["parameters"]["weight"]  # type: ignore[index]
    assert set(filters) <= {rule.get("filter") for rule in rules}
    assert len(rules) < 12
    assert from_mergekit(document, tensors, base_dtype="float32") == Recipe(
        recipe.method, recipe.base, recipe.experts, recipe.settings, kinds=recipe.kinds
    )
    plain = {key: value for key, value in document.items() if key != "mergefront"}  # as any other document
    again = from_mergekit(plain, tensors, base_dtype="float32")
    for name in tensors:
        assert again.value("weight", expert="law", group=name) == recipe.value("weight", expert="law", group=name)


def test_a_recipe_may_be_written_by_other_kinds() -> None:
    recipe = zigzag(build(("attn", "mlp", "embed", "head")))
    again = regrouped(recipe, (*QK, ("odd", ("layers.1.self_attn.v_proj", "layers.2.mlp"))), LLAMA)
    for name in LLAMA:
        assert again.value("weight", expert="law", group=name) == recipe.value("weight", expert="law", group=name)
    assert regrouped(again, (), LLAMA).settings == recipe.settings
    space = space_around(again, name="it", tensors=LLAMA, shape=None, modules=None, ranges={})
    assert space.shape == Shape("layers")
    assert space.kinds == again.kinds


def test_a_kind_is_named_after_its_pattern() -> None:
    patterns = ("self_attn", "mlp", ".mlp.up_proj", "layers.1.", "1", "Wqkv", "...")
    names = [kind_name(pattern) for pattern in patterns]
    assert names == ["self_attn", "mlp_only", "mlp_up_proj", "layers_1", "kind_1", "wqkv", "kind"]
    assert all(name not in ("", *KNOWN) for name in names)
