"""The range of a searched parameter: two numbers in its domain that hold what every search starts from."""

from __future__ import annotations

from collections.abc import Iterable

from search_spaces.errors import SpaceError
from search_spaces.parameters import DOMAINS, MethodSpec

Range = tuple[float, float]


def read_range(name: str, span: Iterable[float]) -> Range:
    """Read a range as a study file gives it, two numbers, low and high."""
    ends = tuple(span) if not isinstance(span, str) else ()
    if len(ends) != 2 or any(isinstance(end, bool) or not isinstance(end, int | float) for end in ends):
        raise SpaceError("a range is two numbers, low and high", given=span, where=f"space.{name}")
    return float(ends[0]), float(ends[1])


def require_range(spec: MethodSpec, name: str, span: Range) -> None:
    """Raise SpaceError for a range that does not fit the parameter of that name."""
    where = f"space.{name}"
    parameter = spec.parameter(name)
    if parameter is None:
        known = ", ".join(p.name for p in spec.parameters if p.domain != "switch")
        raise SpaceError(
            f"{spec.name} has no such parameter to search", given=name, where=where, mend=f"one of {known}"
        )
    if parameter.domain == "switch":
        raise SpaceError(f"{name} is a switch and is not searched", given=span, where=where)
    low, high = read_range(name, span)
    if not (parameter.allows(low) and parameter.allows(high) and low <= high):
        rule = f"a range runs from low to high and {name} is {DOMAINS[parameter.domain]}"
        raise SpaceError(rule, given=[low, high], where=where)
    needed = (0.0, 1.0) if name == spec.scale else (parameter.default,)
    if not all(low <= value <= high for value in needed):
        rule = f"the range of {name} holds {' and '.join(f'{value:g}' for value in needed)}"
        mend = "base and experts are points of every space" if name == spec.scale else "one point leaves a delta whole"
        raise SpaceError(rule, given=[low, high], where=where, mend=mend)
