"""How things are said to a person: shares as per cent with their interval, counts with their noun, lists."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


def printable(text: str) -> str:
    """Return text without orders to a terminal: what is neither printable nor a line end is written as `\\x1b` is."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def one_line(name: str) -> str:
    """Return a name, printable and on one line."""
    return printable(name).replace("\n", "\\n")


@dataclass(frozen=True, slots=True)
class Interval:
    """A share and its 95 % interval; NaN where it was not measured, or has none.

    Args:
        value, low, high: shares: 0.06 is 6 %.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, row: Mapping[str, Any], name: str) -> Interval:
        """Read a figure and its bounds from the columns of a row: `name`, `name_low`, `name_high`."""
        return cls(row[name], row[f"{name}_low"], row[f"{name}_high"])

    @property
    def is_known(self) -> bool:
        """Whether there is a value."""
        return math.isfinite(self.value)

    @property
    def figure(self) -> str:
        """The value in per cent: `92 %`; empty where there is none."""
        return percent(self.value) if self.is_known else ""

    @property
    def bounds(self) -> str:
        """The interval with as many digits as the value has: `[88, 96]`; empty where there is none."""
        if not all(map(math.isfinite, (self.value, self.low, self.high))) or self.low == self.value == self.high:
            return ""
        digits = _digits(self.value)
        return f"[{_number(self.low, digits)}, {_number(self.high, digits)}]"

    def text(self, seam: str = " ") -> str:
        """Write the value with its interval, where it has one: `92 % [88, 96]`, below ten `6.1 % [3.9, 8.4]`."""
        return seam.join(filter(None, (self.figure, self.bounds)))


POINTS = "points"  # the unit of what is a share


@dataclass(frozen=True, slots=True)
class Change:
    """How far a score lies from the base's, turned so that higher is better, and its 95 % interval.

    Args:
        value, low, high: in the unit, where that is no share; NaN where it was not measured, or has none.
        unit: "points" for differences of shares (0.01 is one point), else the metric's name.
    """

    value: float
    low: float
    high: float
    unit: str

    @property
    def figure(self) -> str:
        """The value: `-1.2` points, `-0.012` bits per byte; empty where there is none."""
        return self.number(self.value) if math.isfinite(self.value) else ""

    @property
    def bounds(self) -> str:
        """The interval: `[-3.0, 0.6]`; empty where there is none."""
        if not all(map(math.isfinite, (self.value, self.low, self.high))) or self.low == self.value == self.high:
            return ""
        return f"[{self.number(self.low)}, {self.number(self.high)}]"

    def text(self, seam: str = " ") -> str:
        """Write the value with its interval, where it has one."""
        return seam.join(filter(None, (self.figure, self.bounds)))

    @property
    def from_base(self) -> str:
        """As said of a trial: `1.2 points below the base [-3.0, 0.6]`; empty where there is no value."""
        figure = self.figure
        if not figure:
            return ""
        below, above = ("below", "above") if self.unit == POINTS else ("worse than", "better than")
        far = f"{figure.removeprefix('-')} {self.unit} {below if figure.startswith('-') else above}"
        return " ".join(filter(None, (far if float(figure) else "level with", "the base", self.bounds)))

    def number(self, value: float) -> str:
        """Write a number in the unit."""
        text = f"{100 * value:.1f}" if self.unit == POINTS else f"{value:.3f}"
        return text.removeprefix("-") if float(text) == 0 else text


def percent(share: float) -> str:
    """Write a share in per cent: `92 %`, below ten `6.1 %`."""
    return f"{_number(share, _digits(share))} %"


def task_labels(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the names of tasks, with the expert a domain task is measured by where there are several.

    Args:
        rows: of `Run.retention`: task and expert (empty for a general task).
    """
    pairs = [(row["task"], row["expert"]) for row in rows]
    several = len({expert for _, expert in pairs if expert}) > 1
    return [one_line(f"{task} ({expert})" if several and expert else task) for task, expert in pairs]


def count(number: int, noun: str) -> str:
    """Write `1 trial`, `2 trials`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def listed(sentences: Sequence[str], shown: int = 3) -> str:
    """Join the first few of many clauses, and how many more there are."""
    more = [f"and {len(sentences) - shown} more"] if len(sentences) > shown else []
    return "; ".join([*sentences[:shown], *more])


def _digits(share: float) -> int:
    return 0 if abs(share) >= 0.0995 else 1


def _number(share: float, digits: int) -> str:
    text = f"{100 * share:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text
