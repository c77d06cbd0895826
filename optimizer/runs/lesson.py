"""What a learned trial says of its lesson: a text in the study that the search wrote, or that anybody changed."""

from __future__ import annotations

import json
import math

LESSON_COLUMNS = (
    "preference", "steps", "pull", "seen_before", "seen", "kept_before", "kept", "candidates", "seconds",
)  # fmt: skip


def read_lesson(text: str) -> dict[str, float]:
    """Read the numbers of a lesson.

    Args:
        text: a JSON object.

    Returns:
        The columns by name; NaN where the text has no finite number.
    """
    try:
        stored = json.loads(text)
    except (ValueError, RecursionError):
        stored = None
    stored = stored if isinstance(stored, dict) else {}
    return {name: _number(stored.get(name)) for name in LESSON_COLUMNS}


def _number(value: object) -> float:
    if isinstance(value, dict):  # a preference for each of several experts: the domains have their sum
        value = sum(map(_number, value.values())) if value else math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        number = float(value)
    except OverflowError:
        return math.nan
    return number if math.isfinite(number) else math.nan
