"""What tasks count in a lesson: by a preference, in shares of what lies between base and expert. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evals.outcomes import TaskInfo

BASE = ""  # as the name of a model
LEAST_SCALE = 0.05  # of a task's loss at the base: an expert that hardly moved it gives no scale
LEAST_DIVERGENCE = 1e-4  # bits per token: below it a teacher's two sides are one model, up to rounding


def counts(preference: Mapping[str, float], tasks: Sequence[TaskInfo]) -> Iterator[tuple[str, str, float]]:
    """Yield each task's share of a lesson: (task, the expert whose domain it is of or "", share); they add up to 1.

    Args:
        preference: of each expert's domain; the general tasks have what is left of 1.
    """
    sides = {
        name: [task for task in tasks if task.role == "domain" and task.expert in ("", name)] for name in preference
    }
    sides[BASE] = [task for task in tasks if task.role == "general"]
    shares = {**preference, BASE: 1 - math.fsum(preference.values())}
    for name, side in sides.items():
        whole = math.fsum(task.weight for task in side)
        for task in side:
            yield task.name, name, shares[name] * task.weight / whole


def scale(difference: float, at_base: float) -> float:
    """Give the unit of a task's loss: what an expert won of its domain or lost of a general one, unless that is little.

    Args:
        difference: between base and expert.
        at_base: the base's loss.
    """
    return max(difference, LEAST_SCALE * abs(at_base), LEAST_DIVERGENCE)
