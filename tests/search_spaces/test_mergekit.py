from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search_spaces import METHODS, Recipe, Setting, SpaceError, group_tensors
from search_spaces.mergekit.reader import from_mergekit
from search_spaces.mergekit.stack import is_stack, stack_of, stack_sources
from search_spaces.mergekit.writer import to_mergekit
from search_spaces.space import Space
from tests.search_spaces.names import ALL, llama
from tests.search_spaces.strategies import GROUPS, JUNK, TENSORS, recipes, spaces
from tests.search_spaces.test_slices import DOCUMENT

NAMES = {"runs/clinical": "clinical", "org/law": "law"}
TIES = {
    "merge_method": "ties",
    "base_model": "base",
    "models": [{"model": "runs/clinical", "parameters": {"weight": 0.5, "density": 0.25}}],
    "parameters": {"normalize": False, "lambda": 1.0},
    "dtype": "float32",
}


def read(document: Mapping[str, object], names: Mapping[str, object] = llama(4)) -> Recipe:
    return from_mergekit(document, names, base_dtype="bfloat16", expert_names=NAMES)


def with_weight(weight: object) -> dict[str, object]:
    document = copy.deepcopy(TIES)
    document["models"][0]["parameters"]["weight"] = weight  # type: ignore[index]
    return document


def weight_of(recipe: Recipe, group: str) -> float:
    return recipe.value("weight", expert="clinical", group=group)


def assert_same_numbers(one: Recipe, other: Recipe, groups: tuple[str, ...] = TENSORS) -> None:
    assert (one.method, one.base, one.experts) == (other.method, other.base, other.experts)
    for parameter in METHODS[one.method].parameters:
        experts = [name for name, _ in one.experts] if parameter.scope == "expert" else [""]
        for expert in experts:
            for group in groups if parameter.scope != "recipe" else [""]:
                key = {"expert": expert, "group": group}
                exact = other.value(parameter.name, **key)  # a sum is written as the base's weight
                wanted = pytest.approx(exact, rel=1e-12, abs=1e-12) if parameter.name == "sum" else exact
                assert one.value(parameter.name, **key) == wanted, (parameter.name, key)


def written(recipe: Recipe) -> dict[str, object] | None:
    """The recipe's document; None where it is refused, which is for what mergekit has no word for."""
    try:
        return json.loads(json.dumps(to_mergekit(recipe, TENSORS, out_dtype="bfloat16")))
    except SpaceError as error:
        words = METHODS[recipe.method].parameters
        if "mergekit's" not in str(error) or not any(p.ours or p.name == "epsilon" for p in words):
            raise
        return None


@given(recipes())
def test_a_recipe_comes_back_from_mergekit(recipe: Recipe) -> None:
    document = written(recipe)
    if document and recipe.method != "passthrough":
        assert_same_numbers(recipe, read(document, TENSORS))


@given(spaces())
def test_recipes_of_a_space_keep_their_digest(space: Space) -> None:
    for anchor in space.anchors():
        recipe = space.recipe(anchor.params)
        document = written(recipe)
        if document is None:
            continue
        again = read(document)
        assert_same_numbers(again, recipe)
        if recipe.method not in ("nuslerp", "multislerp", "karcher"):  # 1 - (1 - w) is not always w
            assert again.digest == recipe.digest


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("sce", (Setting("weight", "clinical", "head", 0.5),), "mergekit's sce has no weight, which is 1 there.*head"),
        ("karcher", (Setting("weight", "", "", 0.5),), "equal shares, here 0.333"),
        ("della", (Setting("density", "", "", 0.9),), "density \\+ epsilon below 1.*density 0.9, epsilon 0.15"),
        ("multislerp", (Setting("deltas", "", "", 1.0),), ""),
    ],
)
def test_what_mergekit_has_no_word_for_is_refused(method: str, settings: tuple[Setting, ...], message: str) -> None:
    recipe = Recipe(method, "base", (("clinical", "runs/clinical"), ("law", "org/law")), settings)
    if not message:
        assert to_mergekit(recipe, TENSORS, out_dtype="float32")["base_model"] == "base"
        return
    with pytest.raises(SpaceError, match=message):
        to_mergekit(recipe, TENSORS, out_dtype="float32")


def models(*sources: str, **parameters: float) -> list[dict[str, object]]:
    return [{"model": source, "parameters": dict(parameters)} for source in sources]


def test_without_base_model_the_first_model_is_the_base_and_one_of_the_models() -> None:
    three = {"models": models("a", "runs/clinical", "org/law", weight=0.5)}
    spherical = read({"merge_method": "multislerp"} | three)
    assert (spherical.base, spherical.value("deltas")) == ("a", 0.0)
    assert spherical.value("weight", expert="law", group="head") == pytest.approx(1 / 3)
    around = read({"merge_method": "multislerp", "base_model": "base"} | three)
    assert (around.value("deltas"), around.value("weight", expert="law", group="head")) == (1.0, 0.5)
    bare = {"merge_method": "karcher", "models": models("a", "runs/clinical", "org/law")}
    for document in (bare, bare | {"base_model": "a"}):
        mean = read(document)
        assert (mean.base, len(mean.experts)) == ("a", 2)
        assert mean.value("weight", expert="law", group="head") == 1 / 3
    alone = read({"merge_method": "passthrough", "models": models("a", scale=0.5)})
    assert (alone.base, alone.experts, alone.value("scale", group="embed")) == ("a", (), 0.5)
    arc = read({"merge_method": "nuslerp", "models": models("a", "runs/clinical", weight=3)})
    assert arc.value("weight", expert="clinical", group="head") == 0.5
    with pytest.raises(SpaceError, match="nuslerp without base_model merges 1 model besides its base; given: 2"):
        read({"merge_method": "nuslerp"} | three)
    with pytest.raises(SpaceError, match="nuslerp with base_model merges 2 models besides its base; given: 1"):
        read({"merge_method": "nuslerp", "base_model": "a", "models": models("a", "b", weight=1)})
    with pytest.raises(SpaceError, match="passthrough with base_model merges no models besides its base"):
        read({"merge_method": "passthrough", "base_model": "a", "models": models("b")})


def test_parameters_of_every_method_are_read() -> None:
    expert = {"weight": 0.5, "density": 0.4, "gamma": 0.05}
    crumbs = read({"merge_method": "breadcrumbs", "base_model": "base", "models": models("runs/clinical", **expert),
                   "parameters": {"rescale": True, "lambda": [1, 2]}})  # fmt: skip
    assert [crumbs.value(name, expert="clinical") for name in ("density", "gamma")] == [0.4, 0.05]
    assert (crumbs.value("rescale"), crumbs.value("lambda", group="layer.03.mlp")) == (1.0, 2.0)
    two = {"base_model": "base", "models": models("runs/clinical", "org/law")}
    plus = read({"merge_method": "ramplus_tl", "parameters": {"r": 0.3, "alpha": 0.4, "epsilon": "1e-6"}} | two)
    assert [plus.value(name) for name in ("r", "alpha", "epsilon")] == [0.3, 0.4, 1e-6]
    assert read({"merge_method": "sce", "parameters": {"select_topk": 0.2}} | two).value("select_topk") == 0.2
    assert read({"merge_method": "model_stock", "parameters": {"filter_wise": True}} | two).value("filter_wise") == 1.0
    one = {"base_model": "base", "models": models("runs/clinical")}
    assert read({"merge_method": "nearswap", "parameters": {"t": 0.001}} | one).value("t") == 0.001
    with pytest.raises(SpaceError, match="nearswap needs t for every tensor"):
        read({"merge_method": "nearswap"} | one)
    with pytest.raises(SpaceError, match="'weight'"):
        read({"merge_method": "sce", "base_model": "base", "models": models("runs/clinical", weight=1)})


@pytest.mark.parametrize("names", ALL.values(), ids=ALL.keys())
def test_filters_fit_every_architecture(names: Callable[[int], dict[str, str]]) -> None:
    tensors = names(12)
    groups = tuple(group_tensors(tensors))
    settings = tuple(Setting("weight", "clinical", group, i / 100) for i, group in enumerate(groups))
    recipe = Recipe("task_arithmetic", "base", (("clinical", "runs/clinical"),), settings)
    assert_same_numbers(recipe, read(to_mergekit(recipe, tensors, out_dtype="float32"), tensors), groups)


def test_what_is_exported_is_what_a_person_would_write() -> None:
    settings = [Setting("weight", "clinical", group, 0.5) for group in GROUPS]
    recipe = Recipe("ties", "base", (("clinical", "runs/clinical"),), (*settings, Setting("density", "", "", 0.25)))
    expected = {key: value for key, value in TIES.items() if key != "parameters"} | {"out_dtype": "bfloat16"}
    assert to_mergekit(recipe, TENSORS, out_dtype="bfloat16") == expected
    steep = [Setting("weight", "clinical", f"layer.{i:02d}.attn", i / 4) for i in range(4)]
    shape = [Setting("weight", "clinical", "embed", 0.5), *steep, Setting("weight", "clinical", "", 1.0)]
    models = to_mergekit(Recipe("linear", "base", recipe.experts, tuple(shape)), TENSORS, out_dtype="bfloat16")[
        "models"
    ]
    assert models[1]["parameters"]["weight"] == [  # type: ignore[index]
        {"filter": "embed_tokens.weight", "value": 0.5},
        {"filter": "model.norm.weight", "value": 1.0},
        {"filter": ".input_layernorm.", "value": [0.0, 0.25, 0.5, 0.75]},
        {"filter": ".self_attn.", "value": [0.0, 0.25, 0.5, 0.75]},
        {"value": 1.0},
    ]
    assert models[0]["model"] == "base"  # type: ignore[index]
    assert models[0]["parameters"]["weight"][-1] == {"value": 0.0}  # type: ignore[index]


def test_scalars_gradients_and_filters_are_read() -> None:
    assert weight_of(read(with_weight("1e-1")), "embed") == 0.1
    level = read(TIES)
    assert [weight_of(level, group) for group in GROUPS] == [0.5] * len(GROUPS)
    assert level.value("density", expert="clinical", group="head") == 0.25
    assert level.value("normalize") == 0.0
    slope = read(with_weight([0, 1]))
    assert [weight_of(slope, f"layer.{i:02d}.mlp") for i in range(4)] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert weight_of(slope, "embed") == weight_of(slope, "head") == 0.0  # as mergekit reads it
    filters = [{"filter": "mlp", "value": [1, 2]}, {"filter": "post_attention", "value": [1, 2]}, {"value": 0.3}]
    split = read(with_weight(filters))
    assert (weight_of(split, "layer.03.mlp"), weight_of(split, "layer.03.attn")) == (2.0, 0.3)
    starred = read(with_weight([{"filter": "*", "value": 0.7}, {"value": 0.3}]))
    assert weight_of(starred, "head") == 0.7
    assert weight_of(read(with_weight({"value": 0.2})), "head") == 0.2


def test_filters_may_cut_through_groups() -> None:
    recipe = read(
        with_weight([{"filter": "self_attn", "value": 0.9}, {"filter": "up_proj", "value": 0.5}, {"value": 0.1}])
    )
    assert weight_of(recipe, "model.layers.1.self_attn.q_proj.weight") == weight_of(recipe, "layer.01.attn") == 0.9
    assert weight_of(recipe, "model.layers.1.input_layernorm.weight") == 0.1
    assert weight_of(recipe, "model.layers.2.mlp.up_proj.weight") == 0.5
    assert weight_of(recipe, "model.layers.2.mlp.down_proj.weight") == weight_of(recipe, "layer.02.mlp") == 0.1
    own = {"input_layernorm", "up_proj"}
    assert recipe.tensors == {name for name in TENSORS if any(word in name for word in own)}
    assert_same_numbers(recipe, read(to_mergekit(recipe, TENSORS, out_dtype="float32")))


def test_a_models_own_number_comes_before_the_shared_and_the_shared_before_the_default() -> None:
    own = with_weight([{"filter": "layers", "value": 0.9}])
    own["parameters"] = {"weight": 0.1}
    recipe = read(own)
    assert (weight_of(recipe, "layer.00.mlp"), weight_of(recipe, "head")) == (0.9, 0.1)
    assert recipe.value("normalize") == 1.0


def test_one_layer_reads_the_last_entry() -> None:
    recipe = read(with_weight([0.2, 0.8]), llama(1))
    assert (weight_of(recipe, "layer.00.mlp"), weight_of(recipe, "embed")) == (0.8, 0.2)


def test_linear_weights_are_shares() -> None:
    models = [{"model": "base", "parameters": {"weight": 3}}, {"model": "runs/clinical", "parameters": {"weight": 1}}]
    document: dict[str, object] = {"merge_method": "linear", "base_model": "base", "models": models}
    assert weight_of(read(document), "head") == 0.25
    whole = read(document | {"parameters": {"normalize": False}})
    assert (weight_of(whole, "head"), whole.value("sum", group="head")) == (1.0, 4.0)
    again = to_mergekit(whole, TENSORS, out_dtype="")
    assert [entry["parameters"]["weight"] for entry in again["models"]] == [3.0, 1.0]  # type: ignore[attr-defined]
    assert read(document).settings == read(document | {"parameters": {"normalize": "yes"}}).settings
    multislerp = document | {"merge_method": "multislerp", "parameters": {"normalize_weights": False}}
    del multislerp["base_model"]
    with pytest.raises(SpaceError, match=r"sum to 1.*4\.0.*normalize_weights: true"):
        read(multislerp)
    with pytest.raises(SpaceError, match="lists its base with a weight"):
        read(document | {"models": models[1:]})
    with pytest.raises(SpaceError, match=r"linear needs weight for every tensor.*model"):
        read(document | {"models": [{"model": "base"}, models[1]]})


def test_slerp_reads_t_from_the_top() -> None:
    document = {
        "merge_method": "slerp",
        "base_model": "base",
        "models": [{"model": "base"}, {"model": "runs/clinical"}],
    }
    assert read(document | {"parameters": {"t": [0, 1]}}).value("t", group="layer.03.attn") == 1.0
    with pytest.raises(SpaceError, match="slerp needs t"):
        read(document)
    inner = [{"model": "runs/clinical", "parameters": {"t": 0.5}}]
    with pytest.raises(SpaceError, match=r"'t'.*models\[0\].parameters.*nothing is read here"):
        read(document | {"models": inner, "parameters": {"t": 0.5}})


@pytest.mark.parametrize(
    ("word", "value"), [("True", 1), ("yes", 1), ("on", 1), ("true", 1), ("no", 0), ("False", 0), ("OFF", 0)]
)
def test_switches_are_the_words_of_mergekits_yaml(word: str, value: float) -> None:
    assert read(TIES | {"parameters": {"normalize": word}}).value("normalize") == value
    with pytest.raises(SpaceError, match=r"normalize is a number.*'si'"):
        read(TIES | {"parameters": {"normalize": "si"}})


def test_what_mergekit_passes_over_may_stand() -> None:
    base = {"model": "base", "name": "it", "parameters": {"weight": [0.3, 1], "density": 0.1}}
    said = {"name": "mine", "description": "a merge", "metadata": {"by": "me"}, "x-holder": {"weight": 3}}
    plain = TIES | {"models": [{"model": "base"}, *models("runs/clinical", weight=0.5)]}
    noisy = said | plain | {"models": [base, *plain["models"][1:]], "tokenizer": {"source": "base"}}  # type: ignore[index]
    assert read(noisy) == read(plain)


def test_what_changes_no_number_may_stand() -> None:
    extra = {"int8_mask": True, "rescale": False, "normalize": False}
    document = TIES | {"parameters": extra, "out_dtype": "bfloat16", "tokenizer_source": "base"}
    assert_same_numbers(read(document), read(TIES | {"parameters": {"normalize": 0}}))
    plain = TIES | {"merge_method": "task_arithmetic", "models": models("runs/clinical", weight=0.5)}
    assert_same_numbers(read(plain | {"parameters": {"rescale": False}}), read(plain | {"parameters": {}}))
    with pytest.raises(SpaceError, match=r"task_arithmetic has rescale off here.*True"):
        read(plain | {"parameters": {"rescale": True}})


def test_sources_with_mergekits_own_signs_are_written_apart() -> None:
    recipe = Recipe("linear", "a+b", (("clinical", "c@d"),), ())
    document = to_mergekit(recipe, TENSORS, out_dtype="float32")
    assert document["base_model"] == {"model": {"path": "a+b"}}
    assert from_mergekit(document, TENSORS, base_dtype="bfloat16").base == "a+b"
    assert from_mergekit(document, TENSORS, base_dtype="bfloat16").experts == recipe.experts


def test_an_adapter_stands_on_the_base() -> None:
    recipe = Recipe("task_arithmetic", "base", (("clinical", "runs/clinical"),), (Setting("weight", "", "", 0.5),))
    document = to_mergekit(recipe, TENSORS, out_dtype="float32", adapters={"clinical"})
    assert document["models"][0]["model"] == {"model": {"path": "base"}, "lora": {"path": "runs/clinical"}}  # type: ignore[index]
    assert_same_numbers(recipe, read(document))
    written = [{"model": "base+runs/clinical", "parameters": {"weight": 0.5}}]
    assert_same_numbers(recipe, read(document | {"models": written}))
    with pytest.raises(SpaceError, match=r"an adapter stands on the base.*other"):
        read(document | {"models": [{"model": "other+runs/clinical"}]})


def test_experts_are_named_after_their_folders() -> None:
    models = [{"model": "/a/Clinical v1.5/", "parameters": {"weight": 1}}]
    assert from_mergekit(TIES | {"models": models}, TENSORS, base_dtype="bfloat16").experts == (
        ("Clinical-v1-5", "/a/Clinical v1.5/"),
    )
    named = [models[0] | {"name": "law"}]
    assert from_mergekit(TIES | {"models": named}, TENSORS, base_dtype="float32").experts == (
        ("law", "/a/Clinical v1.5/"),
    )
    two = [{"model": f"{folder}/final", "parameters": {"weight": 1}} for folder in "ab"]
    with pytest.raises(SpaceError, match=r"different names.*final.*models\[1\]"):
        from_mergekit(TIES | {"models": two}, TENSORS, base_dtype="bfloat16")


@given(recipes())
def test_names_and_random_masks_come_back_from_mergekit(recipe: Recipe) -> None:
    renamed = replace(recipe, experts=tuple((name, f"{name}/final") for name, _ in recipe.experts))
    document = written(renamed)
    if document is None or recipe.method == "passthrough":
        return
    again = from_mergekit(document, TENSORS, base_dtype="bfloat16")
    assert_same_numbers(renamed, again)
    assert again.mask_seed == recipe.mask_seed or not METHODS[recipe.method].random
    assert again.dtype == ""
    assert Recipe.from_json(again.to_json()) == again
    third = from_mergekit(written(again) or {}, TENSORS, base_dtype="bfloat16")
    assert third.mask_seed == again.mask_seed or any(setting.parameter == "sum" for setting in again.settings)


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ({}, ""),
        ({"dtype": "bfloat16"}, ""),
        ({"dtype": "float32"}, "float32"),
        ({"dtype": "float32", "out_dtype": "bfloat16"}, ""),
        ({"dtype": "float32", "out_dtype": "torch.float16"}, "float16"),
        ({"dtype": "bfloat16", "out_dtype": "float32"}, "float32"),
    ],
)
def test_a_recipe_is_stored_in_the_documents_out_dtype_or_else_its_dtype(given: dict[str, str], stored: str) -> None:
    plain = {key: value for key, value in TIES.items() if key != "dtype"}
    recipe = read(plain | given)
    assert recipe.dtype == stored
    assert (recipe.digest == read(plain).digest) is (stored == "")
    out = recipe.dtype or "bfloat16"
    assert read(to_mergekit(recipe, TENSORS, out_dtype=out)) == recipe


def test_what_mergekit_itself_does_not_know_it_passes_over() -> None:
    config = pytest.importorskip("mergekit.config", reason="mergekit is not installed")
    recipe = Recipe("dare_ties", "base", (("law", "a"), ("code", "b")), (Setting("density", "", "", 0.5),))
    document = to_mergekit(recipe, TENSORS, out_dtype="float32")
    assert document["mergefront"] == {"seed": recipe.digest}
    assert [entry["name"] for entry in document["models"]] == ["code", "law"]  # type: ignore[attr-defined]
    understood = config.MergeConfiguration.model_validate(document)
    assert [str(entry.model.model.path) for entry in understood.models] == ["b", "a"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge_method": "crumbs"}, "crumbs.*one of linear"),
        ({"merge_method": None}, "merge_method"),
        ({"base_model": None}, "base_model"),
        ({"slices": []}, "models or slices"),
        ({"modules": {}}, "'modules'"),
        (
            {"tokenizer": {"source": "union"}},
            "base's tokenizer; given: union; where: tokenizer.source.*union of tokens",
        ),
        ({"tokenizer": {"source": "base", "tokens": {}}}, "base's tokenizer as it is; given: 'tokens'"),
        ({"chat_template": "auto"}, "'chat_template'"),
        ({"tokenizer_source": "union"}, "base's tokenizer.*union"),
        ({"dtype": "int8"}, "dtype is one of.*int8"),
        (
            {"dtype": "float64"},
            "dtype is one of float32, bfloat16, float16: a merge is computed.*float64; where: dtype",
        ),
        ({"out_dtype": ["float32"]}, r"out_dtype is one of.*\['float32'\]; where: out_dtype; mend: write out_dtype"),
        ({"mergefront": {"seed": 7}}, "a word stands here.*7.*mergefront.seed"),
        ({"mergefront": {"seed": "7"}}, "ties draws no random masks; given: the seed 7"),
        ({"mergefront": ["seed"]}, "mapping of keys.*mergefront"),
        ({"mergefront": {"mask": "7"}}, "'mask'.*mergefront.*only seed"),
        ({"models": [{"model": "a", "name": 3}]}, r"a word stands here.*models\[0\].name"),
        ({"models": [{"model": "a", "name": "b/c", "parameters": {"weight": 1}}]}, "name is made of.*'b/c'"),
        ({"parameters": 0}, "mapping of keys.*0.*parameters"),
        ({"models": None}, "models is a list"),
        ({"models": [7]}, r"models\[0\]"),
        ({"models": [{"model": "a", "layer_range": [0, 2]}]}, r"'layer_range'.*models\[0\]"),
        ({"models": [{"model": "a@main"}]}, r"without a revision.*a@main.*models\[0\].model"),
        ({"models": [{"model": {"model": {"path": "a", "revision": "b"}}}]}, "'revision'"),
        ({"models": [{"model": {"model": {"path": "a"}, "override_architecture": "x"}}]}, "override_architecture"),
        ({"models": [{"model": "a"}, {"model": "a"}]}, "listed once"),
        ({"models": [{"model": "base", "parameters": {"wait": 1}}]}, "'wait'.*only weight, density are read here"),
        ({"models": [{"model": "a", "parameters": {"weight": 1, "gamma": 1}}]}, r"'gamma'.*models\[0\].parameters"),
        ({"models": [{"model": "a", "parameters": {"density": 1}}]}, "ties needs weight for every tensor"),
        ({"models": [{"model": "a", "parameters": [1]}]}, r"mapping of keys.*models\[0\].parameters"),
        ({"parameters": {"epsilon": 0.1}}, "recipe of ties.*'epsilon'"),
        ({"parameters": {"normalize": [{"filter": "mlp", "value": True}, {"value": False}]}}, "normalize has one"),
        ({"parameters": {"rescale": [0, 1]}}, "rescale has one value for all groups"),
    ],
)
def test_what_a_recipe_cannot_hold_is_refused_by_name(change: dict[str, object], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        read(TIES | change)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ("half", r"weight is a number.*half.*models\[0\].parameters.weight"),
        (True, "weight is a number.*True"),
        (None, "weight is a number"),
        (float("nan"), "weight takes no such value.*nan"),
        (10**400, "weight takes no such value.*inf"),
        ([0, -(10**400)], "weight takes no such value.*-inf"),
        ("9" * 5000, "weight takes no such value.*inf"),
        ([], "at least one number"),
        ([{"filter": "mlp", "value": 1}, 2], "weight is a number"),
        ([{"filter": 3, "value": 1}], "a word stands here.*filter"),
        ([{"filter": "mlp", "value": 1, "t": 2}], "'t'"),
        ([{"filter": "mlp", "value": 1}], "ties needs weight for every tensor"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_place(weight: object, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        read(with_weight(weight))


def test_groups_no_substring_tells_apart_are_refused() -> None:
    recipe = Recipe("linear", "b", (("a", "x"),), (Setting("weight", "", "head", 0.5),))
    shadowed = ["norm.weight", "layers.0.attn.norm.weight", "layers.0.mlp.w"]
    with pytest.raises(SpaceError, match=r"none is its own.*norm.weight"):
        to_mergekit(recipe, shadowed, out_dtype="float32")


def places(document: object) -> list[tuple[object, ...]]:
    """Each place of a document, as the keys that lead there."""
    inner = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    return [(), *((key, *rest) for key, part in inner for rest in places(part))]


def with_at(document: object, place: tuple[object, ...], junk: object) -> object:
    if not place:
        return junk
    changed = copy.copy(document)
    changed[place[0]] = with_at(changed[place[0]], place[1:], junk)  # type: ignore[index]
    return changed


SLICED = {
    "merge_method": "passthrough",
    "slices": [
        {"sources": [{"model": "a", "layer_range": [0, 2], "parameters": {"scale": [0.5, 1]}}]},
        {"sources": [{"model": {"model": {"path": "a"}}, "layer_range": [1, 4]}], "parameters": {"scale": 2}},
    ],
    "parameters": {"scale": [{"filter": "mlp", "value": 0.5}]},
    "dtype": "float32",
}
WHOLE = {
    "merge_method": "dare_ties",
    "base_model": "base",
    "models": [
        {
            "model": "runs/clinical",
            "name": "law",
            "parameters": {"weight": [{"filter": "mlp", "value": [0, 1]}, {"value": 1}]},
        },
        {"model": {"model": {"path": "base"}, "lora": {"path": "b"}}, "parameters": {"weight": 1, "density": 0.5}},
    ],
    "parameters": {"normalize": True},
    "out_dtype": "float32",
    "mergefront": {"seed": "1"},
}


@given(st.sampled_from([WHOLE, DOCUMENT, SLICED]), JUNK, st.data())
def test_what_stands_anywhere_in_a_document_is_read_or_refused(
    document: dict[str, object], junk: object, data: st.DataObject
) -> None:
    hostile = with_at(document, data.draw(st.sampled_from(places(document))), junk)
    if not isinstance(hostile, dict):  # what reads YAML refuses it
        return
    with contextlib.suppress(SpaceError):
        if is_stack(hostile):
            stack_of(hostile, dict.fromkeys(stack_sources(hostile), TENSORS), base_dtype="bfloat16")
        else:
            read(hostile)


def test_the_documents_that_are_spoilt_are_sound() -> None:
    assert read(WHOLE).seed == "1"
    assert len(stack_of(SLICED, {"a": TENSORS}, base_dtype="bfloat16").layers) == 5
