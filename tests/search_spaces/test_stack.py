"""A stack's text and its mergekit document hold whole layers of known models, and nothing that memory cannot."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search_spaces import SpaceError
from search_spaces.mergekit.stack import MOST_LAYERS, Stack, stack_of
from tests.search_spaces.names import llama
from tests.search_spaces.strategies import JUNK

TEXT = {
    "method": "passthrough",
    "models": [["m0", "a"], ["m1", "b"]],
    "layers": [["m0", 0], ["m1", 3]],
    "scales": [["model.norm.weight", 2]],
}
NAMES = {"a": tuple(llama(4)), "b": tuple(llama(4))}


def document(*spans: object, **more: object) -> dict[str, Any]:
    slices = [{"sources": [{"model": "a", "layer_range": span}]} for span in spans]
    return {"merge_method": "passthrough", "slices": slices, **more}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [["m0", 0.9]]}, r"layers is a list of \[name, whole number\]; given: \['m0', 0.9\]"),
        ({"layers": [["m0", True]]}, "whole number"),
        ({"layers": [["m0", "3"]]}, "whole number"),
        ({"layers": [["m2", 0]]}, "a layer is one of m0, m1; given: m2, 0; where: layers"),
        ({"layers": [["m0", 0]] * (MOST_LAYERS + 1)}, "at most 10,000 layers"),
        ({"layers": {"m0": 0}}, "layers is a list"),
        ({"models": [["m0", 1]]}, r"models is a list of \[name, text\]"),
        ({"scales": [["model.norm.weight", "2"]]}, "scales is a list.*'2'"),
        ({"scales": [["model.norm.weight", 10**400]]}, "factor is a finite number; given: inf"),
        ({"scales": [["model.norm.weight", 1], ["model.norm.weight", 2]]}, "a tensor has one factor"),
        ({"dtype": "float64"}, "stored in float32, bfloat16, float16; given: float64"),
        ({"dtype": 32}, "dtype is a word"),
        ({"method": "linear"}, "the method of a stack is passthrough"),
        ({"extra": 1}, "a stack has the keys.*extra"),
    ],
)
def test_text_that_is_no_stack_is_refused(changes: dict[str, object], message: str) -> None:
    assert Stack.from_document(TEXT).scale("model.norm.weight") == 2.0
    with pytest.raises(SpaceError, match=message):
        Stack.from_document(TEXT | changes)


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, "{"])
def test_text_that_is_no_json_is_refused(text: str) -> None:
    with pytest.raises(SpaceError, match="a stack is JSON"):
        Stack.from_json(text)


@given(st.sampled_from(sorted(TEXT)), JUNK)
def test_what_stands_anywhere_in_a_stacks_json_is_a_stack_or_refused(key: str, junk: object) -> None:
    for value in (junk, [junk], [["m0", junk]], [[junk, 0]]):
        with contextlib.suppress(SpaceError):
            Stack.from_document(TEXT | {key: value})


def test_a_factor_of_a_tensor_that_is_not_there_is_refused() -> None:
    stack = Stack.from_document(TEXT)
    stack.require_scaled(stack.tensors(NAMES["a"]))
    with pytest.raises(
        SpaceError, match=r"which has 2 layers; given: model.layers.9.mlp.w; where: scales; mend: remove"
    ):
        Stack.from_document(TEXT | {"scales": [["model.layers.9.mlp.w", 2]]}).require_scaled(stack.tensors(NAMES["a"]))


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([[0, 10**9]], r"has 4 layers; given: \[0, 1000000000\]; where: slices\[0\].sources\[0\].layer_range; mend"),
        ([[0, 4], [4, 5]], r"has 4 layers; given: \[4, 5\]; where: slices\[1\]"),
        ([[0, 4]] * (MOST_LAYERS // 4 + 1), r"at most 10,000 layers; given: more; where: slices\[2500\]"),
    ],
)
def test_layers_are_counted_before_they_are_stacked(spans: list[list[int]], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        stack_of(document(*spans), NAMES, base_dtype="")


def test_a_stack_is_stored_in_what_its_document_says() -> None:
    for more, stored in (
        ({}, ""),
        ({"dtype": "bfloat16"}, ""),
        ({"dtype": "bfloat16", "out_dtype": "float32"}, "float32"),
    ):
        stack = stack_of(document([0, 2], **more), NAMES, base_dtype="bfloat16")
        assert stack.dtype == stored
        assert Stack.from_json(stack.to_json()) == stack
        assert ("dtype" in json.loads(stack.to_json())) is (stored != "")
    with pytest.raises(SpaceError, match=r"dtype is one of.*float64"):
        stack_of(document([0, 2], dtype="float64"), NAMES, base_dtype="float32")
