"""Limits of a study: the most that a merge may forget, of all general tasks and of single ones; and what keeps them.

Written in the study file as `search.max_forgetting` and `search.floors`; told to the sampler as constraints, and in the
end to a person: the point with the most gain that keeps them, or the one that came nearest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from evals.objectives import draw_objectives
from evals.outcomes import SEARCH
from optimizer.runs.manifest import stored_study
from optimizer.words import percent

if TYPE_CHECKING:
    from optimizer.runs.scored import ScoredRun

ALL = "max_forgetting"


@dataclass(frozen=True, slots=True)
class Limits:
    """What a merge may forget at most, as shares of what the base can do: 0.05 is 5 %.

    Args:
        max_forgetting: of all general tasks together, as the objective has it; None: any.
        floors: of single general tasks, by name.
    """

    max_forgetting: float | None = None
    floors: Mapping[str, float] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.max_forgetting is not None or bool(self.floors)

    @property
    def by_name(self) -> dict[str, float]:
        """Each limit by its name: `max_forgetting`, or the task it is for."""
        return ({} if self.max_forgetting is None else {ALL: self.max_forgetting}) | dict(self.floors)

    @property
    def keys(self) -> tuple[str, ...]:
        """What each limit is called as a constraint: name and value, for another value is another constraint."""
        return tuple(f"{name} {limit:g}" for name, limit in self.by_name.items())

    def excesses(self, forgetting: float, by_task: Mapping[str, float]) -> dict[str, float]:
        """Compute how far a merge is beyond each limit, 0 or less where it keeps it, by constraint.

        Args:
            forgetting: of all general tasks, a share.
            by_task: of each general task.
        """
        forgot = {**by_task, ALL: forgetting}
        limits = zip(self.keys, self.by_name.items(), strict=True)
        return {key: forgot[name] - limit for key, (name, limit) in limits}

    def text(self) -> str:
        """Say the limits in words: `forgetting at most 5 %; of arc_easy at most 1 %`."""
        all_tasks = [] if self.max_forgetting is None else [f"forgetting at most {percent(self.max_forgetting)}"]
        return "; ".join([*all_tasks, *(f"of {task} at most {percent(most)}" for task, most in self.floors.items())])


@dataclass(frozen=True, slots=True)
class Answer:
    """What a run has to say to its study's limits, by the search items.

    Args:
        trial: the point with the most gain of those that keep all limits; where none with a gain does, the one that is
            least beyond one of them. None where no point has a gain.
        is_kept: which of the two.
        name: of the limit that the point is farthest beyond, or nearest to.
        forgot: what it forgot there, a share.
    """

    limits: Limits
    trial: int | None
    is_kept: bool
    name: str = ""
    forgot: float = 0.0

    @property
    def limit(self) -> float:
        """The limit that the answer names."""
        return self.limits.by_name[self.name]

    def document(self) -> dict[str, Any]:
        """Give the answer as plain values."""
        asked = {"max_forgetting": self.limits.max_forgetting, "floors": dict(self.limits.floors)}
        if self.trial is None:
            return {**asked, "trial": None, "kept": False}
        nearest = {"of": self.name, "limit": self.limit, "forgot": self.forgot}
        return {**asked, "trial": self.trial, "kept": self.is_kept, "nearest": nearest}


def limits_of(document: Mapping[str, Any]) -> Limits:
    """Read the limits of a study file that `search` has stored; what is none is left out."""
    search = document.get("search")
    given = search if isinstance(search, dict) else {}
    most, floors = given.get("max_forgetting"), given.get("floors")
    usable = floors if isinstance(floors, dict) else {}
    return Limits(
        float(most) if _is_share(most) else None,  # type: ignore[arg-type]
        {str(task): float(limit) for task, limit in usable.items() if _is_share(limit)},
    )


def answer_to_limits(run: ScoredRun) -> Answer | None:
    """Find what a run has to say to its study's limits; None where it has none, or no point yet."""
    limits, points = limits_of(stored_study(run.path)), run.points(SEARCH)
    if not limits or points.empty:
        return None
    limits = Limits(
        limits.max_forgetting, {task: most for task, most in limits.floors.items() if task in _general(run)}
    )
    measured = draw_objectives(run.scale(SEARCH), replicates=0)
    off = {*run.stopped, *run.flagged}
    found: list[tuple[float, float, int, str]] = []  # excess, negated gain, trial, limit
    for place, trial in enumerate(measured.trials.tolist()):
        gain = float(measured.points["domain"][place])
        if trial in off or gain <= 0:
            continue
        forgot = {task: float(shares[place]) for task, shares in measured.by_task.items()}
        excesses = limits.excesses(float(measured.points["forgetting"][place]), forgot)
        names = dict(zip(excesses, limits.by_name, strict=True))
        worst = max(excesses, key=lambda key: excesses[key])
        found.append((excesses[worst], -gain, trial, names[worst]))
    if not found:
        return Answer(limits, None, is_kept=False)
    kept = [entry for entry in found if entry[0] <= 0]
    excess, _, trial, name = min(kept, key=lambda entry: entry[1:]) if kept else min(found)
    return Answer(limits, trial, bool(kept), name, limits.by_name[name] + excess)


def _general(run: ScoredRun) -> set[str]:
    return {task.name for task in run.tasks if task.role == "general"}


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1
