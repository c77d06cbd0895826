"""Slices that are the whole model say which number holds where, and nothing else."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from search_spaces import Recipe, SpaceError
from search_spaces.mergekit.reader import from_mergekit
from tests.search_spaces.strategies import TENSORS

DOCUMENT: dict[str, Any] = {
    "merge_method": "task_arithmetic",
    "base_model": "base",
    "slices": [
        {
            "sources": [
                {"model": "base", "layer_range": [0, 3]},
                {"model": "runs/law", "layer_range": [0, 3], "parameters": {"weight": [0.1, 0.3]}},
            ]
        },
        {
            "sources": [{"model": "base", "layer_range": [3, 4]}, {"model": "runs/law", "layer_range": [3, 4]}],
            "parameters": {"weight": [{"filter": "mlp", "value": 0.5}]},
        },
    ],
    "parameters": {"weight": 0.9, "normalize": False},
}


def changed(**changes: object) -> dict[str, Any]:
    """The document with values replaced at paths such as `slices__0__sources`."""
    document = copy.deepcopy(DOCUMENT)
    for path, value in changes.items():
        *parents, last = [int(key) if key.isdecimal() else key for key in path.split("__")]
        place: Any = document
        for key in parents:
            place = place[key]
        place[last] = value
    return document


def weight(recipe: Recipe, place: str) -> float:
    return recipe.value("weight", expert="law", group=place)


def test_gradients_run_along_a_slice_and_outer_tensors_stand_at_its_beginning() -> None:
    recipe = from_mergekit(DOCUMENT, TENSORS, base_dtype="bfloat16")
    assert [weight(recipe, f"layer.{i:02d}.attn") for i in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.9])
    assert weight(recipe, "embed") == 0.1
    assert weight(recipe, "head") == 0.9  # the last slice has no number for it, so the document's
    assert weight(recipe, "model.layers.3.mlp.up_proj.weight") == 0.5
    assert weight(recipe, "model.layers.3.post_attention_layernorm.weight") == 0.9
    assert recipe.value("normalize") == 0.0


def test_a_model_that_a_slice_leaves_out_has_no_weight_there() -> None:
    alone = changed(slices__1__sources=[{"model": "base", "layer_range": [3, 4]}])
    recipe = from_mergekit(alone, TENSORS, base_dtype="bfloat16")
    assert [weight(recipe, f"layer.{i:02d}.mlp") for i in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.0])
    assert weight(recipe, "head") == 0.0


def test_a_documents_gradient_runs_along_each_slice() -> None:
    shared = changed(parameters={"weight": [0, 1]})
    del shared["slices"][0]["sources"][1]["parameters"]
    del shared["slices"][1]["parameters"]
    recipe = from_mergekit(shared, TENSORS, base_dtype="bfloat16")
    assert [weight(recipe, f"layer.{i:02d}.mlp") for i in range(4)] == [0.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": []}, "models or slices"),
        ({"slices": []}, "slices is a list"),
        ({"slices__0__residual": 1}, r"'residual'.*slices\[0\]"),
        ({"slices__0__sources": []}, r"sources is a list.*slices\[0\]"),
        ({"slices__0__sources__0__weight": 1}, r"'weight'.*slices\[0\].sources\[0\]"),
        ({"slices__0__sources__0__layer_range": [0]}, r"layer_range is.*slices\[0\].sources\[0\]"),
        ({"slices__0__sources__0__layer_range": [2, 2]}, "runs from 0 or more"),
        ({"slices__0__sources__0__layer_range": [0, 2]}, "as many layers"),
        ({"slices__0__sources__0__layer_range": [1, 4]}, "the same layers.*merge_method: passthrough"),
        ({"slices__1__sources": [{"model": "base", "layer_range": [2, 4]}]}, "ended, at layer 3.*given: 2"),
        ({"slices__1__sources": [{"model": "base", "layer_range": [3, 5]}]}, "base's 4 layers.*given: 5"),
        ({"slices__1__sources__0__model": "runs/law"}, "lists a model once"),
        ({"slices__0__sources": DOCUMENT["slices"][0]["sources"][:1]}, r"no more models than the first.*slices\[1\]"),
        ({"slices__1__parameters__weight": ["a"]}, r"gradient is a list.*slices\[1\].parameters.weight"),
        ({"slices__1__parameters__weight": [{"filter": "a", "values": 1}]}, "'values'"),
        ({"slices__1__parameters__weight": [{"filter": 3, "value": 1}]}, r"a word stands here.*weight\[0\].filter"),
        ({"slices__1__parameters__weight": "much"}, "weight is a number.*much"),
        ({"slices__1__parameters__weight": [0, 10**400]}, "weight takes no such value"),
        ({"slices__1__parameters": False}, r"mapping of keys.*False.*slices\[1\].parameters"),
        ({"parameters": []}, "mapping of keys.*parameters"),
    ],
)
def test_other_slices_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        from_mergekit(changed(**changes), TENSORS, base_dtype="")
