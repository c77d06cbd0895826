"""What a worker is asked to make, and what it answers: in plain types, so that a driver needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Form = Literal["regmean", "fisher"]
By = Literal["tensor", "group"]
Loss = Literal["labels", "teachers"]

STEPS = 12  # of a lesson, by default
STEP_COST = 0.7  # in candidates: what a trial reads on the search suite
BOUNDS = (-1.0, 2.0)  # of learned weights: beyond base and expert, where the loss asks for it
QUESTIONS, TEXTS = 10, 2  # of each task in a step; a text has many more tokens that teach
PULLS = (0.25, 0.5)  # towards the mean of an expert's weights, of the best of those


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
        shares: how far each goes to the expert, above 0 and below 1.
        folder: where their folders are made.
        texts: plain text files to read in place of the search items: the base on the first, the expert on the second.
    """

    form: Form
    expert: str
    shares: tuple[float, ...]
    folder: Path
    texts: tuple[Path, Path] | None = None
