"""The numbers each merge method takes: their defaults, their limits and the range worth searching.

The arithmetic is elsewhere; this table is what a recipe is checked against and what a space searches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Scope = Literal["expert", "group", "recipe"]
Domain = Literal["real", "unit", "share", "switch"]

DOMAINS: dict[Domain, str] = {
    "real": "a finite number",
    "unit": "a number from 0 to 1",
    "share": "a number above 0, at most 1",
    "switch": "0 (off) or 1 (on)",
}


@dataclass(frozen=True, slots=True)
class Parameter:
    """A number of a merge method.

    `scope` says what may have a value of its own: each expert in each group, each group, or only the whole recipe.
    `low` and `high` bound the search unless a study says otherwise; `searched` is false where only asking varies it.
    """

    name: str
    default: float
    low: float
    high: float
    scope: Scope
    meaning: str
    domain: Domain = "real"
    searched: bool = True

    def allows(self, value: float) -> bool:
        """Tell whether a value means anything to the method, searched range aside."""
        if not math.isfinite(value):
            return False
        if self.domain == "switch":
            return value in (0.0, 1.0)
        if self.domain == "real":
            return True
        return value <= 1.0 and (value > 0.0 if self.domain == "share" else value >= 0.0)


@dataclass(frozen=True, slots=True)
class MethodSpec:
    """What a merge method takes. `scale` is the parameter that leads from the base (0) to an expert (1)."""

    name: str
    parameters: tuple[Parameter, ...]
    min_experts: int
    max_experts: int | None
    random: bool
    source: str
    scale: str = "weight"

    def parameter(self, name: str) -> Parameter | None:
        """Find a parameter by name."""
        return next((parameter for parameter in self.parameters if parameter.name == name), None)


_WEIGHT = Parameter("weight", 1.0, 0.0, 1.0, "expert", "scale of an expert's delta")
_SHARE = Parameter("weight", 1.0, 0.0, 1.0, "expert", "share of an expert; the base has what is left of 1")
_T = Parameter("t", 1.0, 0.0, 1.0, "group", "place on the arc from base (0) to expert (1)", "unit")
_TOP = Parameter("density", 1.0, 0.1, 1.0, "expert", "share of a delta kept, the largest by magnitude", "share")
_DROP = Parameter("density", 1.0, 0.1, 1.0, "expert", "chance of each number of a delta to be kept", "share")
_LAMBDA = Parameter("lambda", 1.0, 0.0, 1.0, "recipe", "scale of the merged delta", searched=False)
_RESCALE = Parameter("rescale", 1.0, 1.0, 1.0, "recipe", "divide kept numbers by density", "switch", searched=False)


def _normalize(default: float) -> Parameter:
    meaning = "divide a merged delta by the weights of the experts that agree"
    return Parameter("normalize", default, default, default, "recipe", meaning, "switch", searched=False)


_SPECS = (
    MethodSpec("linear", (_SHARE,), 1, None, False, "Model soups, arXiv 2203.05482; WiSE-FT, arXiv 2109.01903"),
    MethodSpec("task_arithmetic", (_WEIGHT, _LAMBDA), 1, None, False, "Task arithmetic, arXiv 2212.04089"),
    MethodSpec("slerp", (_T,), 1, 1, False, "Shoemake, SIGGRAPH 1985", scale="t"),
    MethodSpec("ties", (_WEIGHT, _TOP, _normalize(1.0), _LAMBDA), 1, None, False, "TIES-Merging, arXiv 2306.01708"),
    MethodSpec("dare_ties", (_WEIGHT, _DROP, _RESCALE, _normalize(0.0), _LAMBDA), 1, None, True, "DARE, 2311.03099"),
)

METHODS: dict[str, MethodSpec] = {spec.name: spec for spec in _SPECS}
