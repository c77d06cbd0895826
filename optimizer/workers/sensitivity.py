"""Which parts of a model a gain and a loss come from: the gradient by each tensor's weight along base -> expert.

With one weight t on all tensors, dL/dt is the sum over the tensors of dL/dw. So its integral from 0 to 1, the sum of
all averages over the path, is the loss of the expert minus that of the base. That is measured as well, and says how far
to trust them: it needs more points where the path bends, and merges in bf16 add rounding. The averages are integrated
gradients (arXiv 1703.01365) by merge weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch

from evals.losses import Example, few_at_a_time, pairs_of
from optimizer.errors import MergeError
from optimizer.runs.sensitivities import OBJECTIVES, Objective, Sensitivities
from optimizer.workers.aims import Candidate, size_of
from search_spaces import Recipe, Setting

if TYPE_CHECKING:
    from evals.outcomes import TaskInfo
    from evals.teachers import Beliefs


def measure(
    candidate: Candidate,
    examples: Sequence[Example],
    start: Recipe,
    *,
    tasks: Sequence[TaskInfo],
    expert: str,
    points: int,
) -> Sensitivities:
    """Measure the sensitivities of one expert.

    Args:
        candidate: the resident model; it is left at some merge.
        examples: items of both sides.
        start: any recipe of its models.
        tasks: of the items.
        expert: its name.
        points: of the path, at least 1; a polynomial of degree 2 * points - 1 is integrated exactly.

    Raises:
        MergeError: a gradient is not finite, the tensor is named; or the expert is none of the recipe's.
        ScoreError: a loss is not finite.
    """
    if expert not in dict(start.experts):
        raise MergeError(f"the experts are {', '.join(dict(start.experts))}; given {expert!r}")
    begun, size = time.perf_counter(), size_of(examples)
    beliefs = _beliefs_of_base(candidate, _on_path(start, expert, 0.0), [e for e in examples if e.to_base])
    sides = {objective: _Side.of(objective, examples, tasks, expert, beliefs) for objective in OBJECTIVES}
    nodes, shares = (0.5 * x for x in np.polynomial.legendre.leggauss(points))  # on [-1, 1], of length 2
    tables: dict[str, list[tuple[float, ...]]] = {objective: [] for objective in OBJECTIVES}
    for at in (0.5 + nodes).tolist():
        recipe = _on_path(start, expert, at)
        candidate.merge(recipe)
        for objective, side in sides.items():
            tables[objective].append(_gradient(candidate, recipe, expert, side))
    changes = dict.fromkeys(OBJECTIVES, 0.0)
    for at, sign in ((0.0, -1), (1.0, 1)):
        candidate.merge(_on_path(start, expert, at))
        for objective, side in sides.items():
            changes[objective] += sign * _loss(candidate, side)
    forward = sum(size_of(side.examples) for side in sides.values())
    backward = sum(size_of(batch) for side in sides.values() for batch in few_at_a_time(side.examples))
    return Sensitivities(
        expert=expert,
        tensors=tuple(candidate.tensors),
        points=tuple((0.5 + nodes).tolist()),
        shares=tuple(shares.tolist()),
        domain=tuple(tables["domain"]),
        general=tuple(tables["general"]),
        domain_change=changes["domain"],
        general_change=changes["general"],
        items=len(examples),
        candidates=(2 * forward + 3 * points * backward) / size,
        seconds=time.perf_counter() - begun,
    )


def some_of_each(examples: Sequence[Example], questions: int, texts: int, *, seed: int) -> list[Example]:
    """Draw so many items of every task at random, or all where there are no more; their order stays.

    Args:
        questions: of a task with choices.
        texts: of any other.
    """
    rng = np.random.default_rng(seed)
    chosen: set[int] = set()
    for task in dict.fromkeys(example.task for example in examples):
        mine = [i for i, example in enumerate(examples) if example.task == task]
        chosen.update(rng.permutation(mine)[: questions if examples[mine[0]].right else texts].tolist())
    return [example for i, example in enumerate(examples) if i in chosen]


@dataclass(frozen=True, slots=True)
class _Side:
    """The items of an objective, and what a unit of an item's loss counts in it, by task.

    Args:
        beliefs: the base's, of the pairs of items that are compared with it.
    """

    examples: list[Example]
    factors: dict[str, float]
    beliefs: Mapping[Example, Sequence[Beliefs]]

    @classmethod
    def of(
        cls,
        objective: Objective,
        examples: Sequence[Example],
        tasks: Sequence[TaskInfo],
        expert: str,
        beliefs: Mapping[Example, Sequence[Beliefs]],
    ) -> _Side:
        names = [t.name for t in tasks if t.role == objective and t.expert in ("", expert)]
        mine = [e for e in examples if e.task in names]
        weights = {name: math.fsum(e.weight for e in mine if e.task == name) for name in names}
        return cls(mine, {name: 1 / weight / len(names) for name, weight in weights.items()}, beliefs)

    def beliefs_of(self, examples: Sequence[Example]) -> list[Beliefs] | None:
        """Return the base's beliefs of examples that are all compared with it; None where none is."""
        held = [self.beliefs[e] for e in examples if e.to_base]
        return [of_pair for of_example in held for of_pair in of_example] if held else None

    def loss(self, examples: Sequence[Example], loglikelihoods: torch.Tensor) -> torch.Tensor:
        """Compute what some of the items add to the objective's loss."""
        parts = loglikelihoods.split([len(e.pairs) for e in examples])
        return torch.stack([self.factors[e.task] * e.loss(x) for e, x in zip(examples, parts, strict=True)]).sum()


def _gradient(candidate: Candidate, recipe: Recipe, expert: str, side: _Side) -> tuple[float, ...]:
    with candidate.gradients(recipe) as found:
        for batch in few_at_a_time(side.examples):
            candidate.engine.backward(pairs_of(batch), partial(side.loss, batch), side.beliefs_of(batch))
    return tuple(found[expert, tensor] for tensor in candidate.tensors)


def _loss(candidate: Candidate, side: _Side) -> float:
    plain = [e for e in side.examples if not e.to_base]
    found = [x for x, _ in candidate.engine.loglikelihoods(pairs_of(plain))]
    if beliefs := side.beliefs_of(compared := [e for e in side.examples if e.to_base]):
        found += candidate.engine.agreements(pairs_of(compared), beliefs)
    return float(side.loss([*plain, *compared], torch.tensor(found, dtype=torch.float64)))


def _beliefs_of_base(
    candidate: Candidate, base: Recipe, examples: Sequence[Example]
) -> dict[Example, Sequence[Beliefs]]:
    if not examples:
        return {}
    candidate.merge(base)
    found = iter(candidate.engine.beliefs(pairs_of(examples)))
    return {example: [*islice(found, len(example.pairs))] for example in examples}


def _on_path(start: Recipe, expert: str, at: float) -> Recipe:
    """Make the recipe of one weight: 0 is the base, bit for bit, and 1 the expert."""
    settings = [Setting("weight", name, "", at if name == expert else 0.0) for name, _ in start.experts]
    return Recipe("task_arithmetic", start.base, start.experts, tuple(settings))
