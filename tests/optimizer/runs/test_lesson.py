"""What a study says of a lesson is read number by number; whatever else it holds is no number."""

from __future__ import annotations

import json
import math

import pytest

from optimizer.runs.lesson import LESSON_COLUMNS, read_lesson


def test_a_lesson_is_its_numbers() -> None:
    lesson = {name: float(i) for i, name in enumerate(LESSON_COLUMNS)}
    assert read_lesson(json.dumps({**lesson, "other": "thing"})) == lesson


def test_preferences_of_several_experts_are_added() -> None:
    assert read_lesson('{"preference": {"clinical": 0.25, "legal": 0.5}}')["preference"] == 0.75
    for nothing in ("{}", '{"clinical": "much"}', '{"clinical": {"": []}}'):
        assert math.isnan(read_lesson(f'{{"preference": {nothing}}}')["preference"])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "[1, 2]",
        "3",
        "[" * 100_000,
        '{"steps": true, "kept": "0.4", "seen": null, "pull": [1], "candidates": Infinity, "seconds": NaN}',
        f'{{"steps": 1{"0" * 400}}}',
    ],
)
def test_what_is_no_finite_number_is_none(text: str) -> None:
    found = read_lesson(text)
    assert tuple(found) == LESSON_COLUMNS
    assert all(map(math.isnan, found.values()))
