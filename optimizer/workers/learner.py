"""Merge weights learned by gradients: from a start, downhill on the search items for one preference.

A worker runs this in its resident model. Each step merges the weights as they are, reads a few items of each task, and
moves every weight against the gradient. A part of the items is kept apart: it says when to stop, and how far to pull
the weights towards their mean, since a weight for every tensor can learn the items by heart.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from evals.losses import Example
from optimizer.workers.aims import Aims, Candidate, size_of
from optimizer.workers.orders import Learned, Lesson
from search_spaces import METHODS, Recipe, Setting, group_of

if TYPE_CHECKING:
    from evals.outcomes import TaskInfo

Array = NDArray[np.float64]

KEPT = 5  # every so many-th item of a task is kept apart
RATE, MOMENTUM, SMOOTHING = 0.12, 0.8, 0.9  # of the steps, which fall to 0; of the gradient and of its square
LOOKS = (0.5, 0.75, 1.0)  # shares of the steps after which the kept items are asked


def split_examples(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Split items into those to learn from and those kept apart: every fifth of a task, or one of two to four."""
    tasks: dict[str, list[Example]] = {}
    for example in examples:
        tasks.setdefault(example.task, []).append(example)
    seen: list[Example] = []
    kept: list[Example] = []
    for items in tasks.values():
        every = min(KEPT, max(2, len(items)))
        for n, example in enumerate(items, start=1):
            (kept if n % every == 0 else seen).append(example)
    return seen, kept


@dataclass(frozen=True, slots=True)
class Places:
    """The weights that are learned: of each expert in each tensor or group, in one order."""

    experts: tuple[str, ...]
    names: tuple[str, ...]
    group_of_tensor: Mapping[str, str]

    @classmethod
    def of(cls, tensors: Sequence[str], experts: Sequence[str], by: str) -> Places:
        where = {tensor: tensor if by == "tensor" else group_of(tensor) for tensor in tensors}
        return cls(tuple(experts), tuple(dict.fromkeys(where.values())), where)

    def weights(self, recipe: Recipe) -> Array:
        """Read a recipe's weights, a group's the mean of its tensors': (experts, places)."""
        inside: dict[str, list[str]] = {name: [] for name in self.names}
        for tensor, place in self.group_of_tensor.items():
            inside[place].append(tensor)

        def weight(expert: str, tensors: list[str]) -> float:
            values = [recipe.value("weight", expert=expert, group=tensor) for tensor in tensors]
            return values[0] if len(set(values)) == 1 else fmean(values)

        return np.array([[weight(expert, tensors) for tensors in inside.values()] for expert in self.experts])

    def gradient(self, found: Mapping[tuple[str, str], float]) -> Array:
        """Sum a gradient by tensor over the places that the tensors belong to: (experts, places)."""
        at = {name: i for i, name in enumerate(self.names)}
        total = np.zeros((len(self.experts), len(self.names)))
        for (expert, tensor), value in found.items():
            total[self.experts.index(expert), at[self.group_of_tensor[tensor]]] += value
        return total

    def recipe(self, start: Recipe, weights: Array) -> Recipe:
        """Give the start other weights; random masks stay the start's."""
        kept = [setting for setting in start.settings if setting.parameter != "weight"]
        rows = [dict(zip(self.names, row, strict=True)) for row in weights.tolist()]
        if kinds := start.kinds if any(setting.group for setting in kept) else ():  # places that groups do not reach
            rows = [{tensor: row[place] for tensor, place in self.group_of_tensor.items()} for row in rows]
        mine = [Setting("weight", e, n, w) for e, row in zip(self.experts, rows, strict=True) for n, w in row.items()]
        seed = start.mask_seed if METHODS[start.method].random else start.seed
        return replace(start, settings=(*kept, *mine), seed=seed, kinds=kinds)


class Descent:
    """Steps against a gradient: momentum, and each weight's step in the unit of its own gradient (Adam, 1412.6980)."""

    def __init__(self, weights: Array, steps: int, bounds: tuple[float, float]) -> None:
        self.weights, self._steps, self._bounds = weights, steps, bounds
        self._mean, self._square, self._done = np.zeros_like(weights), np.zeros_like(weights), 0

    def step(self, gradient: Array) -> None:
        rate = RATE * (1 - self._done / self._steps)
        self._done += 1
        self._mean = MOMENTUM * self._mean + (1 - MOMENTUM) * gradient
        self._square = SMOOTHING * self._square + (1 - SMOOTHING) * gradient**2
        mean = self._mean / (1 - MOMENTUM**self._done)
        size = np.sqrt(self._square / (1 - SMOOTHING**self._done))
        move = np.divide(mean, size, out=np.zeros_like(mean), where=size > 0)
        self.weights = np.clip(self.weights - rate * move, *self._bounds)


def minibatches(examples: Sequence[Example], seed: int, *, questions: int, texts: int) -> Iterator[list[Example]]:
    """Draw a few items of every task again and again; a task's items come in a new order after each time through."""
    rng = np.random.default_rng(seed)
    tasks: dict[str, list[Example]] = {}
    for example in examples:
        tasks.setdefault(example.task, []).append(example)
    queues: dict[str, list[Example]] = {task: [] for task in tasks}
    while True:
        batch = []
        for task, items in tasks.items():
            for _ in range(min(len(items), questions if items[0].right else texts)):
                if not queues[task]:
                    queues[task] = [items[i] for i in rng.permutation(len(items))]
                batch.append(queues[task].pop())
        yield batch


class Learner:
    """Learns weights for one preference after another, from the same items in the same resident model."""

    def __init__(
        self,
        candidate: Candidate,
        examples: Sequence[Example],
        *,
        tasks: Sequence[TaskInfo],
        base: str,
        experts: Mapping[str, str],
    ) -> None:
        self._candidate = candidate
        self._seen, self._kept = split_examples(examples)
        self._aims = Aims(candidate, self._seen, self._kept, tasks=tasks, base=base, experts=experts)
        self._of_candidate = size_of(_as_drawn(examples, tasks))

    def learn(self, lesson: Lesson) -> Learned:
        """Learn from the start of a lesson; the same lesson gives the same weights.

        Raises:
            MergeError: a gradient or a merge is not finite; the tensor is named.
            ScoreError: a loss is not finite.
        """
        begun, self._aims.tokens = time.perf_counter(), 0
        start = Recipe.from_json(lesson.start)
        places = Places.of(self._candidate.tensors, [name for name, _ in start.experts], lesson.by)
        aim = self._aims.aim(lesson.loss, dict(lesson.preference))
        before = aim.read_start(start, self._kept)
        found = [(before, 0, 0.0, places.weights(start))]

        def look(weights: Array, step: int, pull: float) -> None:
            found.append((aim.read(places.recipe(start, weights), self._kept), step, pull, weights.copy()))

        descent = Descent(places.weights(start), lesson.steps, lesson.bounds)
        looks = {max(1, round(share * lesson.steps)) for share in LOOKS}
        batches = minibatches(self._seen, lesson.seed, questions=lesson.questions, texts=lesson.texts)
        first, seen_before = next(batches), 0.0
        for step, batch in zip(range(1, lesson.steps + 1), chain([first], batches), strict=False):
            gradient, loss = aim.gradient(places.recipe(start, descent.weights), batch)
            seen_before = loss if step == 1 else seen_before
            descent.step(places.gradient(gradient))
            if step in looks:
                look(descent.weights, step, 0.0)
        _, steps, _, weights = min(found, key=lambda found: found[0])
        for pull in lesson.pulls if steps else ():
            look(weights + pull * (weights.mean(axis=1, keepdims=True) - weights), steps, pull)
        kept, steps, pull, weights = min(found, key=lambda found: found[0])
        recipe = places.recipe(start, weights) if steps else start
        return Learned(
            recipe=recipe.to_json(),
            steps=steps,
            pull=pull,
            seen=aim.read(recipe, first) if steps else seen_before,
            kept=kept,
            seen_before=seen_before,
            kept_before=before,
            candidates=self._aims.tokens / self._of_candidate,
            seconds=time.perf_counter() - begun,
        )


def _as_drawn(examples: Sequence[Example], tasks: Sequence[TaskInfo]) -> list[Example]:
    """Give as many items of each task as a candidate is scored on at first, where the task has a bank."""
    own = {task.name: [example for example in examples if example.task == task.name] for task in tasks}
    return [example for task in tasks for example in own[task.name][: task.drawn_items or None]]
