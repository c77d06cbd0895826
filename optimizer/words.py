"""How things are said to a person: shares as per cent with their interval, counts with their noun, lists."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def printable(text: str) -> str:
    """Text without an order to a terminal: what is no printable character or line end is written as `\\x1b` is here."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def one_line(name: str) -> str:
    """A name, printable and on one line."""
    return printable(name).replace("\n", "\\n")


def percent(value: float, low: float = math.nan, high: float = math.nan) -> str:
    """A share in per cent, with its interval where it has one: `92 % [88, 96]`, below ten `6.1 % [3.9, 8.4]`."""
    digits = 0 if abs(value) >= 0.0995 else 1
    said = f"{_number(value, digits)} %"
    if math.isnan(low) or math.isnan(high) or low == value == high:
        return said
    return f"{said} [{_number(low, digits)}, {_number(high, digits)}]"


def tasks_said(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The names of tasks, with the expert a domain task is measured by where there are several.

    Args:
        rows: of `Run.retention`: task and expert (empty for a general task).
    """
    pairs = [(row["task"], row["expert"]) for row in rows]
    several = len({expert for _, expert in pairs if expert}) > 1
    return [one_line(f"{task} ({expert})" if several and expert else task) for task, expert in pairs]


def count(number: int, noun: str) -> str:
    """`1 trial`, `2 trials`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def listed(sentences: Sequence[str], shown: int = 3) -> str:
    """The first few of many clauses, and how many more there are."""
    more = [f"and {len(sentences) - shown} more"] if len(sentences) > shown else []
    return "; ".join([*sentences[:shown], *more])


def _number(share: float, digits: int) -> str:
    text = f"{100 * share:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text
