"""The numbers each merge method takes: their defaults, their limits and the range worth searching.

The arithmetic is elsewhere; this table is what a recipe is checked against and what a space searches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

Scope = Literal["expert", "group", "recipe"]
Domain = Literal["real", "size", "unit", "share", "switch", "count"]

DOMAINS: dict[Domain, str] = {
    "real": "a finite number",
    "size": "a finite number, at least 0",
    "unit": "a number from 0 to 1",
    "share": "a number above 0, at most 1",
    "switch": "0 (off) or 1 (on)",
    "count": "a whole number, at least 0",
}


@dataclass(frozen=True, slots=True)
class Parameter:
    """A number of a merge method.

    `scope` says what may have a value of its own: each expert in each group, each group, or only the whole recipe.
    `low` and `high` bound the search unless a study says otherwise; `searched` is false where only asking varies it,
    `log` is true where its orders of magnitude are searched alike; with fewer experts than `least_experts` it is not
    searched, since it compares them. What mergekit makes of it: `required` numbers have no default there, and `ours`
    are unknown to it, so that only their defaults can be exported.
    """

    name: str
    default: float
    low: float
    high: float
    scope: Scope
    meaning: str
    domain: Domain = "real"
    searched: bool = True
    log: bool = False
    least_experts: int = 1
    required: bool = False
    ours: bool = False

    def is_searched(self, experts: int) -> bool:
        """Tell whether a search over so many experts varies the number unasked."""
        return self.searched and experts >= self.least_experts

    def allows(self, value: float) -> bool:
        """Tell whether a value means anything to the method, searched range aside."""
        if not math.isfinite(value):
            return False
        if self.domain == "switch":
            return value in (0.0, 1.0)
        if self.domain == "real":
            return True
        if self.domain in ("size", "count"):
            return value >= 0.0 and (self.domain == "size" or value == int(value))
        return value <= 1.0 and (value > 0.0 if self.domain == "share" else value >= 0.0)


@dataclass(frozen=True, slots=True)
class MethodSpec:
    """What a merge method takes.

    Attributes:
        scale: the parameter that leads from the base (0) to an expert (1), or to what the method makes of it.
        fixed_in_search: (parameter, value) that a search sets, since another value would let the scale cancel out.
        unsearchable: why no space can be built on the method; empty where one can.
    """

    name: str
    parameters: tuple[Parameter, ...]
    source: str
    min_experts: int = 1
    max_experts: int | None = None
    random: bool = False
    scale: str = "weight"
    fixed_in_search: tuple[tuple[str, float], ...] = ()
    unsearchable: str = ""

    def parameter(self, name: str) -> Parameter | None:
        """Find a parameter by name."""
        return next((parameter for parameter in self.parameters if parameter.name == name), None)


def to_float(value: float | str) -> float:
    """Read a number; a whole number with no room in 64 bits is infinite, which no parameter allows.

    Raises:
        TypeError, ValueError: it is none.
    """
    try:
        return float(value)
    except OverflowError:
        return math.inf if int(value) > 0 else -math.inf


def _weight(meaning: str, *, ours: bool = False) -> Parameter:
    return Parameter("weight", 1.0, 0.0, 1.0, "expert", meaning, required=not ours, ours=ours)


def _switch(name: str, default: float, meaning: str, *, ours: bool = False) -> Parameter:
    return Parameter(name, default, default, default, "recipe", meaning, "switch", searched=False, ours=ours)


def _normalize(default: float, among: str) -> Parameter:
    return _switch("normalize", default, f"divide the sum of deltas by the weights of {among}")


_SHARE = _weight("share of an expert; the base has what is left of 1")
_EQUAL_SHARE = replace(_SHARE, required=False, ours=True)
_SUM = Parameter(
    "sum", 1.0, 0.0, 1.0, "group", "what the shares of base and experts add up to", searched=False, ours=True
)
_WEIGHT = _weight("scale of an expert's delta")
_OWN_WEIGHT = _weight("scale of an expert's delta in the merge; what the method measures is the whole delta", ours=True)
_T = Parameter("t", 1.0, 0.0, 1.0, "group", "place on the arc from base (0) to expert (1)", "unit", required=True)
_NEAR = Parameter(
    "t", 1.0, 1e-5, 1.0, "group", "how far, in absolute numbers, an element goes to the expert's at most", "size",
    log=True, required=True,
)  # fmt: skip
_TOP = Parameter("density", 1.0, 0.1, 1.0, "expert", "share of a delta kept, the largest by magnitude", "share")
_MIDDLE = Parameter("density", 1.0, 0.1, 1.0, "expert", "share of a delta kept, below the outliers", "share")
_DROP = Parameter("density", 1.0, 0.1, 1.0, "expert", "chance of each number of a delta to be kept", "share")
_MEAN_DROP = Parameter("density", 1.0, 0.1, 1.0, "expert", "mean chance of a delta's numbers to be kept", "share")
_GAMMA = Parameter(
    "gamma", 0.01, 0.0, 0.1, "expert", "share of a delta dropped as outliers, the largest by magnitude", "unit",
    searched=False,
)  # fmt: skip
_EPSILON = Parameter(
    "epsilon", 0.15, 0.0, 0.3, "expert", "how far the chances of smallest and largest are from density", "unit",
    searched=False,
)  # fmt: skip
_LAMBDA = Parameter("lambda", 1.0, 0.0, 1.0, "group", "scale of the merged delta", searched=False)
_TOPK = Parameter(
    "select_topk", 1.0, 0.1, 1.0, "group", "share of elements kept, where experts vary most (one does not)", "unit",
    least_experts=2,
)  # fmt: skip
_CHANGED = Parameter(
    "epsilon", 1e-5, 1e-7, 1e-3, "group", "an element changed where its delta is larger", "size", searched=False,
    log=True,
)  # fmt: skip
_R = Parameter("r", 0.1, 0.0, 1.0, "group", "how much what only one expert changed is amplified", searched=False)
_ALPHA = Parameter("alpha", 0.2, 0.0, 1.0, "group", "largest share that r is multiplied with", "size", searched=False)
_RESCALE = _switch("rescale", 1.0, "divide kept numbers so that the delta's expected L1 norm stays")
_MATCH_L1 = _switch("rescale", 0.0, "scale kept numbers so that the delta's L1 norm stays")
_ALL, _AGREEING = "all experts", "the experts that agree"
_PLAIN = (("normalize", 0.0),)

_SPECS = (
    MethodSpec("linear", (_SHARE, _SUM), "Model soups, arXiv 2203.05482; WiSE-FT, arXiv 2109.01903"),
    MethodSpec("slerp", (_T,), "Shoemake, SIGGRAPH 1985", max_experts=1, scale="t"),
    MethodSpec(
        "nuslerp",
        (
            _SHARE,
            _switch("nuslerp_flatten", 1.0, "take a tensor as one vector; off: one vector for each row"),
            _switch("nuslerp_row_wise", 0.0, "where not flattened: one vector for each column"),
        ),
        "Shoemake, SIGGRAPH 1985, between base and expert, or between two deltas",
        max_experts=2,
    ),
    MethodSpec(
        "multislerp",
        (
            _SHARE,
            _switch("normalize_weights", 1.0, "divide the weights by their sum"),
            _switch(
                "deltas", 0.0, "turn the experts' deltas around the base; off: base and experts around 0", ours=True
            ),
            Parameter("eps", 1e-8, 1e-8, 1e-8, "recipe", "lengths below it count as none", "size", searched=False),
        ),
        "Goddard, Multi-SLERP, 2025, goddard.blog/posts/multislerp-wow-what-a-cool-idea",
        fixed_in_search=(("normalize_weights", 0.0),),
    ),
    MethodSpec(
        "karcher",
        (
            _EQUAL_SHARE,
            Parameter("max_iter", 10.0, 10.0, 10.0, "recipe", "iterations at most", "count", searched=False),
            Parameter("tol", 1e-5, 1e-5, 1e-5, "recipe", "angles below it count as none", "size", searched=False),
        ),
        "Karcher mean on the sphere, arXiv 2603.04972; Karcher 1977",
    ),
    MethodSpec(
        "task_arithmetic",
        (_WEIGHT, _normalize(0.0, _ALL), _LAMBDA),
        "Task arithmetic, arXiv 2212.04089",
        fixed_in_search=_PLAIN,
    ),
    MethodSpec(
        "ties",
        (_WEIGHT, _TOP, _MATCH_L1, _normalize(1.0, _AGREEING), _LAMBDA),
        "TIES-Merging, arXiv 2306.01708",
        fixed_in_search=_PLAIN,
    ),
    MethodSpec(
        "dare_linear",
        (_WEIGHT, _DROP, _RESCALE, _normalize(0.0, _ALL), _LAMBDA),
        "DARE, arXiv 2311.03099",
        random=True,
        fixed_in_search=_PLAIN,
    ),
    MethodSpec(
        "dare_ties",
        (_WEIGHT, _DROP, _RESCALE, _normalize(0.0, _AGREEING), _LAMBDA),
        "DARE, arXiv 2311.03099, with TIES, arXiv 2306.01708",
        random=True,
        fixed_in_search=_PLAIN,
    ),
    MethodSpec(
        "della",
        (_WEIGHT, _MEAN_DROP, _EPSILON, _RESCALE, _normalize(1.0, _AGREEING), _LAMBDA),
        "DELLA-Merging, arXiv 2406.11617",
        random=True,
        fixed_in_search=_PLAIN,
    ),
    MethodSpec(
        "della_linear",
        (_WEIGHT, _MEAN_DROP, _EPSILON, _RESCALE, _normalize(0.0, _ALL), _LAMBDA),
        "DELLA-Merging's MAGPRUNE, arXiv 2406.11617",
        random=True,
        fixed_in_search=_PLAIN,
    ),
    MethodSpec(
        "breadcrumbs",
        (_WEIGHT, _MIDDLE, _GAMMA, _MATCH_L1, _normalize(0.0, _ALL), _LAMBDA),
        "Model Breadcrumbs, arXiv 2312.06795",
        fixed_in_search=_PLAIN,
    ),
    MethodSpec(
        "breadcrumbs_ties",
        (_WEIGHT, _MIDDLE, _GAMMA, _MATCH_L1, _normalize(0.0, _AGREEING), _LAMBDA),
        "Model Breadcrumbs, arXiv 2312.06795, with TIES, arXiv 2306.01708",
        fixed_in_search=_PLAIN,
    ),
    MethodSpec("sce", (_OWN_WEIGHT, _TOPK), "SCE in FuseChat, arXiv 2408.07990"),
    MethodSpec("ram", (_OWN_WEIGHT, _CHANGED), "Reinforced Agent Merging, arXiv 2601.13572"),
    MethodSpec("ramplus_tl", (_OWN_WEIGHT, _R, _ALPHA, _CHANGED), "RAM+, tensor by tensor, arXiv 2601.13572"),
    MethodSpec(
        "model_stock",
        (_OWN_WEIGHT, _switch("filter_wise", 0.0, "one ratio for each row instead of each tensor")),
        "Model Stock, arXiv 2403.19522",
        min_experts=2,
    ),
    MethodSpec(
        "nearswap",
        (_OWN_WEIGHT, _NEAR),
        "NearSwap, huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
        max_experts=1,
    ),
    MethodSpec(
        "arcee_fusion",
        (_OWN_WEIGHT,),
        "Arcee Fusion, arcee.ai and mergekit",
        max_experts=1,
        unsearchable="it takes only the expert's most important numbers, so that no point of a space is the expert",
    ),
    MethodSpec(
        "passthrough",
        (Parameter("scale", 1.0, 0.0, 1.0, "group", "factor of the only model's tensors", searched=False),),
        "the tensors of one model",
        min_experts=0,
        max_experts=1,
        scale="scale",
        unsearchable="it takes one model, so there is nothing between base and expert",
    ),
)

METHODS: dict[str, MethodSpec] = {spec.name: spec for spec in _SPECS}
