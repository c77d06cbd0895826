"""What a trial in the study says of itself: its kind, and why it failed. Written by the search, read by a run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

from optimizer.words import one_line

if TYPE_CHECKING:
    import pandas as pd

EXPERT_PREFIX = "expert:"
DRIVER_DIED = "driver_died"
WORKER_DIED = "worker_died"
DUPLICATE = "duplicate of"
STOPPED = "stopped"  # user attribute of a trial that a race stopped: after what
STAMP = "outcomes"  # user attribute: the stamp of the file of its search outcomes, as it was told
COST = "candidates"  # user attribute: what it cost, as a multiple of what a searched trial reads at first
STDERR = "stderr"  # user attribute: standard errors of its objectives, for a sampler that goes by them
NOT_COUNTED = (DRIVER_DIED, DUPLICATE)  # failures that say nothing about a recipe


class Role(Enum):
    """What a trial is in its study."""

    BASE = auto()
    EXPERT = auto()
    UNIFORM = auto()  # an anchor of the uniform line: one weight for all layers
    SLOPE = auto()  # an anchor whose weight rises with depth
    START = auto()  # an anchor of a person's own: the recipe that the search starts from
    DERIVED = auto()  # an anchor that is a derived expert: a closed form of base and expert
    LEARNED = auto()  # an anchor whose weights were learned by gradients
    SEARCHED = auto()  # no anchor: a sampler's proposal
    BETWEEN = auto()  # no anchor: the mean of two trials' weights


NO_ANCHORS = (Role.SEARCHED, Role.BETWEEN)
FAMILIES = {
    EXPERT_PREFIX: Role.EXPERT,
    "uniform ": Role.UNIFORM,
    "slope ": Role.SLOPE,
    "derived ": Role.DERIVED,
    "learned ": Role.LEARNED,
    "between ": Role.BETWEEN,
}  # the start of a kind's text, but of the base's, a person's own anchor and what a sampler proposes


@dataclass(frozen=True, slots=True)
class TrialKind:
    """What a trial is: an anchor by its name, or a point that was searched.

    Args:
        stored: the text in the study's database and in a run's frames: "base", "expert:<name>", another anchor's name
            such as "uniform a=0.25", "derived regmean 0.4", "learned p=0.60" or "from recipe.json", "between 9 and
            14", or "search" (which the database leaves out).
    """

    stored: str

    @classmethod
    def of(cls, attributes: Mapping[str, Any]) -> TrialKind:
        """Read the kind from a trial's user attributes."""
        return cls(str(attributes.get("kind", SEARCHED.stored)))

    @classmethod
    def expert(cls, name: str) -> TrialKind:
        """Give the kind of the trial that is an expert itself."""
        return cls(f"{EXPERT_PREFIX}{name}")

    @property
    def role(self) -> Role:
        """What the trial is in its study."""
        if self in (BASE, SEARCHED):
            return Role.BASE if self == BASE else Role.SEARCHED
        return next((role for start, role in FAMILIES.items() if self.stored.startswith(start)), Role.START)

    @property
    def is_anchor(self) -> bool:
        """Whether the trial is a point that is scored before the search begins."""
        return self.role not in NO_ANCHORS

    @property
    def is_prepared(self) -> bool:
        """Whether a worker makes the trial's recipe."""
        return self.role in (Role.DERIVED, Role.LEARNED)

    @property
    def has_params(self) -> bool:
        """Whether the trial has parameters; samplers do not see the others."""
        return not self.is_prepared and self.role is not Role.BETWEEN

    @classmethod
    def between(cls, one: int, other: int) -> TrialKind:
        """Give the kind of the trial whose weights are the mean of two trials'."""
        return cls(f"between {min(one, other)} and {max(one, other)}")

    @property
    def between_trials(self) -> tuple[int, ...]:
        """The two trials that the trial lies between; none for any other kind."""
        return tuple(map(int, re.findall(r"\d+", self.stored))) if self.role is Role.BETWEEN else ()

    @property
    def is_reference(self) -> bool:
        """Whether the trial is the base or an expert, by which every score is measured."""
        return self.role in (Role.BASE, Role.EXPERT)

    @property
    def expert_name(self) -> str:
        """The expert that the trial is; empty where it is none."""
        return self.stored.removeprefix(EXPERT_PREFIX) if self.role is Role.EXPERT else ""

    @property
    def preference(self) -> float:
        """What a learned anchor's name says that the domain counts, 0.6 of `learned p=0.60`; NaN where it says none."""
        said = re.search(r"\bp=(\d+(?:\.\d+)?)", self.stored) if self.role is Role.LEARNED else None
        return float(said[1]) if said else float("nan")

    @property
    def label(self) -> str:
        """The kind for a person, on one line: `expert clinical` of `expert:clinical`, the others as they are stored."""
        return one_line(f"expert {self.expert_name}" if self.expert_name else self.stored)

    def __str__(self) -> str:
        return self.stored


def fitted(kinds: Mapping[int, TrialKind]) -> frozenset[int]:
    """Give the trials whose weights were fitted to the search items: those learned, and what lies between one of them
    and another."""
    found: set[int] = set()
    for number in sorted(kinds):
        if kinds[number].role is Role.LEARNED or found.intersection(kinds[number].between_trials):
            found.add(number)
    return frozenset(found)


BASE = TrialKind("base")
SEARCHED = TrialKind("search")


def roles_of(kinds: pd.Series[str]) -> pd.Series[Any]:
    """Give the role of each stored kind, under the same index."""
    import pandas as pd

    return pd.Series([TrialKind(kind).role for kind in kinds], index=kinds.index, dtype=object)
