"""What a lesson lowers: the items' losses on their labels, or how far the candidate is from base and experts.

Both are weighed alike, by a preference between the experts' domains and the general tasks, in shares of what lies
between base and expert. What does not depend on the preference is read once: the losses and beliefs of base and
experts, and the losses at a start. Every token that is read is counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch

from evals.losses import Example, pairs_of, task_losses
from evals.packing import build_trie
from optimizer.merging.gradients import Gradient
from optimizer.workers.orders import BASE, Loss, counts, loss_unit
from search_spaces import Recipe, Setting

if TYPE_CHECKING:
    from evals.engine import Engine
    from evals.outcomes import TaskInfo
    from evals.teachers import Beliefs


class Candidate(Protocol):
    """The resident model, as a learner uses it."""

    @property
    def engine(self) -> Engine: ...

    @property
    def tensors(self) -> Sequence[str]:
        """Names of the base's floating tensors."""

    def merge(self, recipe: Recipe) -> None:
        """Make the model the merge of a recipe."""

    def gradients(self, recipe: Recipe) -> AbstractContextManager[Gradient]:
        """Take `weight_gradients` of the recipe that was merged last."""


@dataclass(frozen=True, slots=True)
class Term:
    """One task's loss, or its divergence from one teacher.

    Args:
        task: its name.
        teacher: "" for the base; labels have none, which is "" as well.
    """

    task: str
    teacher: str


@dataclass(frozen=True, slots=True)
class Part:
    """An item as one of the terms has it.

    Args:
        taught: whether what counts is how far the candidate is from the term's teacher, not the item's labels.
    """

    term: Term
    example: Example
    taught: bool


class Aims:
    """The losses of one model family's candidates on one set of items.

    Args:
        candidate: the resident model.
        seen, kept: the items that lessons learn from, and those they keep apart.
        tasks: of the items.
        base: its source.
        experts: name and source of each by which losses are measured; a start may be of others, derived from them.
    """

    def __init__(
        self,
        candidate: Candidate,
        seen: Sequence[Example],
        kept: Sequence[Example],
        *,
        tasks: Sequence[TaskInfo],
        base: str,
        experts: Mapping[str, str],
    ) -> None:
        self.candidate = candidate
        self.tokens = 0  # read so far; a step backward counts three times
        self._seen, self._kept = seen, kept
        self._base, self._experts = base, dict(experts)
        self._domain = {
            name: [t.name for t in tasks if t.role == "domain" and t.expert in ("", name)] for name in experts
        }
        self._general = [t.name for t in tasks if t.role == "general"]
        self._tasks = tasks
        self._ends: dict[Loss, dict[str, dict[Term, float]]] = {}  # by model, on the items learned from
        self._beliefs: dict[tuple[str, Example], tuple[Beliefs, ...]] = {}
        self._at_starts: dict[tuple[Loss, str, tuple[Term, ...]], dict[Term, float]] = {}  # on the items kept apart

    def aim(self, loss: Loss, preference: Mapping[str, float]) -> Aim:
        """Weigh each term by its side's preference, in shares of what lies between base and expert."""
        if loss not in self._ends:
            self._ends[loss] = self._ends_on_labels() if loss == "labels" else self._ends_of_teachers()
        ends = self._ends[loss]
        factors = dict.fromkeys(ends[BASE], 0.0)
        for task, name, share in counts(preference, self._tasks):
            term = Term(task, name if loss == "teachers" else BASE)
            at_base = ends[BASE][term]
            between = at_base - ends[name][term] if name else max(ends[e][term] for e in self._experts) - at_base
            factors[term] += share / loss_unit(between, at_base)
        return Aim(self, loss, factors)

    def parts(self, loss: Loss, examples: Sequence[Example]) -> list[Part]:
        """Turn items into parts: one each on labels, one for each of their task's teachers otherwise.

        An item that is compared with the base has no labels, and the base for its one teacher.
        """
        if loss == "labels":
            return [Part(Term(e.task, BASE), e, e.to_base) for e in examples]
        taught_by = {task: [BASE] for task in self._general}
        for name, tasks in self._domain.items():
            for task in tasks:
                taught_by.setdefault(task, []).append(name)
        return [Part(Term(e.task, teacher), e, True) for e in examples for teacher in taught_by.get(e.task, ())]

    def losses_at_start(self, loss: Loss, start: Recipe, parts: Sequence[Part]) -> dict[Term, float]:
        """Merge a start and read its losses on items kept apart, or give those that an earlier lesson read."""
        key = loss, start.digest, tuple(dict.fromkeys(part.term for part in parts))
        if key not in self._at_starts:
            self.candidate.merge(start)
            self._at_starts[key] = self.losses(parts)
        return self._at_starts[key]

    def losses(self, parts: Sequence[Part]) -> dict[Term, float]:
        """Read the losses of what was merged last: on labels in the task's unit, else in bits a token."""
        losses: dict[Term, float] = {}
        for alike in by_teaching(parts):
            self.tokens += size_of([part.example for part in alike])
            pairs = pairs_of([part.example for part in alike])
            if alike[0].taught:
                found = self.candidate.engine.agreements(pairs, self.beliefs(alike))
            else:
                found = [x for x, _ in self.candidate.engine.loglikelihoods(pairs)]
            values = term_losses(alike, torch.tensor(found, dtype=torch.float64))
            losses |= {term: float(value) for term, value in values.items()}
        return losses

    def beliefs(self, parts: Sequence[Part]) -> list[Beliefs]:
        """Return what the parts' teachers hold likely, for each pair of each part."""
        return [held for part in parts for held in self._beliefs[part.term.teacher, part.example]]

    def _ends_on_labels(self) -> dict[str, dict[Term, float]]:
        every = self.parts("labels", [*self._seen, *self._kept])
        ends = {}
        for name in (BASE, *self._experts):
            self.candidate.merge(self.only(name))
            if name == BASE:
                self._believe([part for part in every if part.taught])
            ends[name] = self.losses(self.parts("labels", self._seen))
        return ends

    def _ends_of_teachers(self) -> dict[str, dict[Term, float]]:
        """Read the beliefs on all items, and how far base and experts are from one another on those learned from."""
        every = self.parts("teachers", [*self._seen, *self._kept])
        seen = self.parts("teachers", self._seen)
        ends: dict[str, dict[Term, float]] = {}
        for name in (BASE, *self._experts):
            self.candidate.merge(self.only(name))
            self._believe([part for part in every if part.term.teacher == name])
            others = [part for part in seen if name != BASE and part.term.teacher == BASE]
            ends[name] = {p.term: 0.0 for p in seen if p.term.teacher == name} | self.losses(others)
        self.candidate.merge(self.only(BASE))
        ends[BASE] |= self.losses([part for part in seen if part.term.teacher != BASE])
        return ends

    def only(self, expert: str) -> Recipe:
        """Make a recipe that is the base ("") or one expert."""
        settings = tuple(Setting("weight", name, "", float(name == expert)) for name in self._experts)
        return Recipe("task_arithmetic", self._base, tuple(self._experts.items()), settings)

    def _believe(self, parts: Sequence[Part]) -> None:
        if not parts:
            return
        self.tokens += size_of([part.example for part in parts])
        found = iter(self.candidate.engine.beliefs(pairs_of([part.example for part in parts])))
        for part in parts:
            held = tuple(next(found) for _ in part.example.pairs)
            self._beliefs[part.term.teacher, part.example] = held


@dataclass(frozen=True, slots=True)
class Aim:
    """The weighted loss of one lesson, in shares of what lies between base and expert.

    Args:
        of: what it is a weighing of.
        loss: labels or teachers.
        factors: of each term.
    """

    of: Aims
    loss: Loss
    factors: Mapping[Term, float]

    def read(self, recipe: Recipe, examples: Sequence[Example]) -> float:
        """Merge a recipe and read its loss; items that count nothing are left out."""
        self.of.candidate.merge(recipe)
        return self._sum(self.of.losses(self._parts(examples)))

    def read_start(self, start: Recipe, kept: Sequence[Example]) -> float:
        """Read the loss of a start on the items kept apart, unless an earlier lesson began there."""
        return self._sum(self.of.losses_at_start(self.loss, start, self._parts(kept)))

    def gradient(self, recipe: Recipe, examples: Sequence[Example]) -> tuple[Gradient, float]:
        """Merge a recipe, and find its loss and the gradient by its weights."""
        groups, candidate, value = by_teaching(self._parts(examples)), self.of.candidate, 0.0
        candidate.merge(recipe)
        with candidate.gradients(recipe) as found:
            for parts in groups:
                self.of.tokens += 3 * size_of([part.example for part in parts])
                beliefs = self.of.beliefs(parts) if parts[0].taught else None
                pairs = pairs_of([part.example for part in parts])
                value += candidate.engine.backward(pairs, partial(self._weighted, parts), beliefs)
        return found, value

    def _parts(self, examples: Sequence[Example]) -> list[Part]:
        return [part for part in self.of.parts(self.loss, examples) if self.factors[part.term]]

    def _sum(self, losses: Mapping[Term, float]) -> float:
        return float(sum(self.factors[term] * value for term, value in losses.items()))

    def _weighted(self, parts: Sequence[Part], found: torch.Tensor) -> torch.Tensor:
        losses = term_losses(parts, found)
        return torch.stack([self.factors[term] * value for term, value in losses.items()]).sum()


def by_teaching(parts: Sequence[Part]) -> list[list[Part]]:
    """Return the parts of labels and those that a teacher has, each where there are some."""
    groups = [part for part in parts if not part.taught], [part for part in parts if part.taught]
    return [group for group in groups if group]


def term_losses(parts: Sequence[Part], found: torch.Tensor) -> dict[Term, torch.Tensor]:
    """Compute each term's loss from the log-likelihoods of all pairs one after another, or, if all are taught, from the
    agreements."""
    terms = list(dict.fromkeys(part.term for part in parts))
    named = {term: str(i) for i, term in enumerate(terms)}
    examples = [replace(part.example, task=named[part.term]) for part in parts]
    if parts[0].taught:  # bits a token, whatever the item is
        tokens = [float(sum(len(pair.continuation) for pair in e.pairs)) for e in examples]
        examples = [replace(e, right=(), lengths=(), weight=n) for e, n in zip(examples, tokens, strict=True)]
    losses = task_losses(examples, found)
    return {term: losses[name] for term, name in named.items()}


def size_of(examples: Sequence[Example]) -> int:
    """Count the distinct tokens that are read."""
    return len(build_trie(dict(enumerate(pairs_of(examples)))))
