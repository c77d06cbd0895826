from __future__ import annotations

import contextlib
import dataclasses
import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search_spaces import METHODS, Recipe, Setting, SpaceError
from tests.search_spaces.strategies import GROUPS, JUNK, TENSORS, recipes

ONE = (("clinical", "a/clinical"),)
TWO = (*ONE, ("law", "a/law"))


def ties(*settings: Setting, experts: tuple[tuple[str, str], ...] = TWO) -> Recipe:
    return Recipe("ties", "a/base", experts, settings)


@given(recipes())
def test_a_recipe_comes_back_from_json_and_pickle(recipe: Recipe) -> None:
    again = Recipe.from_json(recipe.to_json())
    assert again == recipe
    assert again.digest == recipe.digest
    assert again.to_json() == recipe.to_json()
    assert hash(again) == hash(recipe)
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    assert Recipe.from_json(json.dumps(json.loads(recipe.to_json()), indent=2)) == recipe


@given(recipes(), st.randoms())
def test_order_of_settings_and_experts_does_not_matter(recipe: Recipe, random: object) -> None:
    settings, experts = list(recipe.settings), list(recipe.experts)
    random.shuffle(settings)  # type: ignore[attr-defined]
    random.shuffle(experts)  # type: ignore[attr-defined]
    assert Recipe(recipe.method, recipe.base, tuple(experts), tuple(settings)) == recipe


@given(recipes())
def test_the_digest_names_the_numbers_and_not_the_paths(recipe: Recipe) -> None:
    moved = dataclasses.replace(recipe, base="x", experts=tuple((name, "y") for name, _ in recipe.experts))
    assert moved.digest == recipe.digest
    scale = METHODS[recipe.method].scale
    other = Setting(scale, "", "", 0.25 if recipe.value(scale) != 0.25 else 0.75)
    kept = [s for s in recipe.settings if (s.parameter, s.expert, s.group) != (scale, "", "")]
    assert dataclasses.replace(recipe, settings=(*kept, other)).digest != recipe.digest


@given(recipes())
def test_short_fits_a_line(recipe: Recipe) -> None:
    assert recipe.short().startswith(f"{recipe.method} {recipe.digest}")
    assert "\n" not in recipe.short()


def test_the_most_specific_setting_wins() -> None:
    group = GROUPS[1]
    settings = [
        Setting("weight", "law", group, 0.1),
        Setting("weight", "law", "", 0.2),
        Setting("weight", "", group, 0.3),
        Setting("weight", "", "", 0.4),
    ]
    for left in range(4):
        expected = settings[left].value
        assert ties(*settings[left:]).value("weight", expert="law", group=group) == expected
    assert ties().value("weight", expert="law", group=group) == 1.0
    assert ties(*settings).value("weight", expert="clinical", group="head") == 0.4
    assert ties().value("normalize") == 1.0


def test_a_tensors_own_number_comes_before_its_groups() -> None:
    tensor, other = "model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.down_proj.weight"
    settings = [Setting("weight", "", place, i / 10) for i, place in enumerate(("", "layer.03.mlp", tensor))]
    recipe = ties(*settings)
    assert recipe.tensors == {tensor}
    found = [recipe.value("weight", expert="law", group=place) for place in (tensor, other, "layer.03.mlp", "head")]
    assert found == [0.2, 0.1, 0.1, 0.0]
    assert ties(*settings, Setting("weight", "law", "", 0.9)).value("weight", expert="law", group=tensor) == 0.9
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_short_says_the_span_of_each_number() -> None:
    recipe = ties(
        Setting("weight", "law", "embed", 0.1), Setting("weight", "law", "head", 0.9), Setting("density", "", "", 0.5)
    )
    assert recipe.short() == f"ties {recipe.digest}, law weight 0.10 to 0.90, clinical density 0.50, law density 0.50"


def test_zero_has_one_name() -> None:
    negative, zero = ties(Setting("weight", "", "", -0.0)), ties(Setting("weight", "", "", 0))
    assert negative.digest == zero.digest
    assert negative.to_json() == zero.to_json()


def test_the_digest_does_not_change_between_versions() -> None:
    assert ties(Setting("weight", "law", "layer.00.attn", 0.5)).digest == "2a86d476d16c"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (Setting("wieght", "", "", 1.0), "no such parameter.*wieght.*one of weight"),
        (Setting("weight", "lawyer", "", 1.0), "experts are clinical, law.*lawyer"),
        (Setting("weight", "", "layer.7.attn", 1.0), "layer.7.attn"),
        (Setting("weight", "", "layer.07.atn", 1.0), "layer.07.atn"),
        (Setting("weight", "", "heads", 1.0), "heads"),
        (Setting("weight", "", "vision.patch.weight", 1.0), "vision.patch.weight"),
        (Setting("weight", "law", "head", float("nan")), "finite number.*nan.*weight of law in head"),
        (Setting("weight", "law", "head", float("inf")), "finite number.*inf"),
        (Setting("density", "", "", 0.0), "above 0, at most 1.*0.0"),
        (Setting("density", "", "", 1.01), "above 0, at most 1"),
        (Setting("normalize", "", "", 0.5), r"0 \(off\) or 1 \(on\).*0.5"),
        (Setting("normalize", "law", "", 1.0), "one value for all experts.*law"),
        (Setting("normalize", "", "head", 1.0), "one value for all groups.*head"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(setting: Setting, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        ties(setting)


@pytest.mark.parametrize(
    ("method", "experts", "message"),
    [
        ("tise", ONE, "tise.*one of linear"),
        ("ties", (), "1 or more experts.*given: 0"),
        ("slerp", TWO, "slerp merges 1 expert;.*2: clinical, law"),
        ("model_stock", ONE, "model_stock merges 2 or more experts;.*1: clinical"),
        ("nuslerp", (*TWO, ("tax", "a/tax")), "nuslerp merges 1 to 2 experts;.*3: clinical, law, tax"),
        ("ties", (ONE[0], ONE[0]), "different names"),
        ("ties", (("a.b", "x"),), "a.b"),
        ("ties", (("", "x"),), "letters, digits"),
    ],
)
def test_wrong_experts_and_methods_are_refused(method: str, experts: tuple[tuple[str, str], ...], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        Recipe(method, "base", experts, ())


def test_a_number_is_set_once() -> None:
    with pytest.raises(SpaceError, match=r"once.*0.1 and 0.2.*weight of law in head"):
        ties(Setting("weight", "law", "head", 0.1), Setting("weight", "law", "head", 0.2))


def test_asking_for_an_unknown_name_is_an_error() -> None:
    with pytest.raises(SpaceError, match="wieght"):
        ties().value("wieght")
    with pytest.raises(SpaceError, match="lawyer"):
        ties().value("weight", expert="lawyer")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "JSON"),
        ("[]", "keys method, base"),
        ('{"method":"ties","base":"b","experts":[],"settings":[],"extra":1}', "extra"),
        ('{"method":"ties","base":"b","experts":[["a"]],"settings":[]}', "experts are strings"),
        ('{"method":"ties","base":1,"experts":[["a","b"]],"settings":[]}', "method and base"),
        ('{"method":"ties","base":"b","experts":{},"settings":[]}', "experts is a list"),
        ('{"method":"ties","base":"b","experts":[["a","b"]],"settings":[["weight","","",true]]}', "a setting is"),
        ('{"method":"ties","base":"b","experts":[["a","b"]],"settings":[["weight","",""]]}', "a setting is"),
        ('{"method":"ties","base":"b","experts":[["a","b"]],"settings":[["weight","",1,1]]}', "setting's words"),
        ('{"method":"ties","base":"b","experts":[["a","b"]],"settings":[["weight","","",NaN]]}', "nan"),
        ("[" * 100_000, "a recipe is JSON"),
        ('{"base":' * 100_000, "a recipe is JSON"),
        ("9" * 5000, "a recipe is JSON"),
        (
            f'{{"method":"ties","base":"b","experts":[["a","b"]],"settings":[["weight","","",1{"0" * 400}]]}}',
            "finite.*inf",
        ),
        ('{"method":"ties","base":"b","experts":[["a","b"]],"settings":[],"dtype":16}', "dtype and seed are strings"),
        ('{"method":"ties","base":"b","experts":[["a","b"]],"settings":[],"dtype":"int8"}', "stored in float32.*int8"),
        ('{"method":"ties","base":"b","experts":[["a","b"]],"settings":[],"seed":"1"}', "ties draws no random masks"),
        ('{"method":"dare_ties","base":"b","experts":[["a","b"]],"settings":[],"seed":"1 2"}', "seed is at most 64"),
    ],
)
def test_json_that_is_no_recipe_is_refused(text: str, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        Recipe.from_json(text)


@given(st.sampled_from(["method", "base", "experts", "settings", "dtype", "seed"]), JUNK, st.data())
def test_what_stands_anywhere_in_a_recipes_json_is_a_recipe_or_refused(
    key: str, junk: object, data: st.DataObject
) -> None:
    document = json.loads(ties(Setting("weight", "law", "head", 0.5)).to_json()) | {key: junk}
    if key in ("experts", "settings") and data.draw(st.booleans()):
        document[key] = [data.draw(st.lists(st.sampled_from(["weight", "law", "", "head", 1.0]) | JUNK, max_size=4))]
    with contextlib.suppress(SpaceError):
        Recipe.from_document(document)


def test_a_dtype_and_a_seed_of_its_own_count_and_change_no_other_recipe() -> None:
    plain = Recipe("dare_ties", "a/base", TWO, (Setting("density", "", "", 0.5),))
    assert plain.mask_seed == plain.digest
    assert set(json.loads(plain.to_json())) == {"method", "base", "experts", "settings"}
    stored = dataclasses.replace(plain, dtype="float32")
    assert stored.mask_seed == plain.mask_seed  # the same masks, in another dtype
    seeded = dataclasses.replace(stored, seed="0123")
    assert seeded.mask_seed == "0123"
    assert len({plain.digest, stored.digest, seeded.digest}) == 3
    assert Recipe.from_json(seeded.to_json()) == seeded


def test_a_number_for_a_part_the_base_does_not_have_is_refused() -> None:
    ties(Setting("weight", "law", "layer.03.mlp", 0.5), Setting("weight", "", TENSORS[0], 0.1)).require_places(TENSORS)
    for place in ("layer.99.attn", "model.layers.4.mlp.up_proj.weight"):
        with pytest.raises(
            SpaceError, match=f"given: {place}; where: weight of law in {place}; mend: remove the number"
        ):
            ties(Setting("weight", "law", place, 0.5)).require_places(TENSORS)
