"""What a worker is asked to make, and what it answers: in plain types, so that a driver needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from evals.outcomes import TaskInfo

Form = Literal["kfac", "regmean", "fisher"]
By = Literal["tensor", "group"]
Loss = Literal["labels", "teachers"]

STEPS = 24  # of a lesson, by default
BOUNDS = (-1.0, 2.0)  # of learned weights: beyond base and expert, where the loss asks for it
QUESTIONS, TEXTS = 10, 2  # of each task in a step; a text has many more tokens that teach
CALIBRATION = (24, 8)  # questions and texts of each task that a derived expert is made from; more make it no better
PULLS = (0.25, 0.5)  # towards the mean of an expert's weights, of the best of those
BASE = ""  # as the name of a model
LEAST_SCALE = 0.05  # of a task's loss at the base: an expert that hardly moved it gives no scale
LEAST_DIVERGENCE = 1e-4  # bits per token: below it a teacher's two sides are one model, up to rounding


@dataclass(frozen=True, slots=True)
class Lesson:
    """What one learned anchor is learned for.

    Args:
        start: the recipe to begin at, as JSON; its method is one of `gradients.LEARNABLE`.
        preference: of each expert's domain, by name; the general tasks have what is left of 1.
        by: whether every tensor or every layer group has a weight of its own.
        steps: how many.
        bounds: what the weights stay within.
        seed: of the items' order.
        loss: the items' own, or the divergence from the experts on their domains' items and from the base on the
            general ones (Expert Merging, arXiv 2509.25712).
        questions, texts: how many of each task a step reads.
        pulls: the shares that are tried of the way towards the mean of an expert's weights.
    """

    start: str
    preference: tuple[tuple[str, float], ...]
    by: By
    steps: int
    bounds: tuple[float, float]
    seed: int
    loss: Loss = "labels"
    questions: int = QUESTIONS
    texts: int = TEXTS
    pulls: tuple[float, ...] = PULLS


@dataclass(frozen=True, slots=True)
class Learned:
    """What a lesson gave.

    Args:
        recipe: as JSON.
        steps: after how many steps the weights were taken.
        pull: how far they were pulled towards their mean, a share.
        seen, kept: the loss on the items of the first step and on those kept apart, after; in shares of what lies
            between base and expert.
        seen_before, kept_before: the same at the start.
        candidates: the cost, as a multiple of reading the search suite once; a step backward counts three times. The
            first lesson of its loss in a process also pays for base and experts.
        seconds: what it took.
    """

    recipe: str
    steps: int
    pull: float
    seen: float
    kept: float
    seen_before: float
    kept_before: float
    candidates: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Derivation:
    """A path of derived experts.

    Args:
        form: how they are made.
        expert: name of the expert.
        shares: how far each goes to the expert, above 0 and below 1: RegMean's l, else the mean way of rows.
        folder: where their folders are made.
        texts: plain text files to read in place of the search items: the base on the first, the expert on the second.
    """

    form: Form
    expert: str
    shares: tuple[float, ...]
    folder: Path
    texts: tuple[Path, Path] | None = None


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


def loss_unit(difference: float, at_base: float) -> float:
    """Give the unit of a task's loss: what an expert won of its domain or lost of a general one, unless that is little.

    Args:
        difference: between base and expert.
        at_base: the base's loss.
    """
    return max(difference, LEAST_SCALE * abs(at_base), LEAST_DIVERGENCE)
