"""What weights are learned from: the items of a suite as differentiable losses, in the order of the harness.

An item's loss is a ratio like its score: a task's loss is sum(value) / sum(weight) over its items. Choices have the
cross-entropy of the right one, a text its bits per byte, a written answer the bits per token of its reference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from evals.tokens import Pair

AT_ONCE = 4  # items of a backward pass; a text is read alone


@dataclass(frozen=True, slots=True)
class Example:
    """One item to learn from: C pairs whose log-likelihoods (C,) become a loss.

    Args:
        task, item: as in `Outcome`.
        pairs: of its choices, of the windows of its text, or of its reference.
        right: which choices are right; empty where the pairs are one text.
        lengths: what each choice's log-likelihood is divided by, as its metric does; 1 in most.
        weight: of the item in its task's loss: 1, or bytes, or tokens.
        to_base: whether, where an objective is measured, its predictions are compared with the base's: the pairs have
            agreements with the base then, in place of log-likelihoods.
    """

    task: str
    item: str
    pairs: tuple[Pair, ...]
    right: tuple[int, ...]
    lengths: tuple[float, ...]
    weight: float
    to_base: bool = False

    def loss(self, loglikelihoods: torch.Tensor) -> torch.Tensor:
        """Return the item's loss times its weight, nats for choices, bits for texts; log-likelihoods (C,) are nats."""
        if not self.right:
            return -loglikelihoods.sum() / math.log(2)
        chosen = (loglikelihoods / loglikelihoods.new_tensor(self.lengths)).log_softmax(0)
        return -chosen[list(self.right)].logsumexp(0)


def task_losses(examples: Sequence[Example], loglikelihoods: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return each task's loss over examples, from the log-likelihoods of all their pairs one after another."""
    sums: dict[str, torch.Tensor] = {}
    weights: dict[str, float] = {}
    for example, part in zip(examples, loglikelihoods.split([len(e.pairs) for e in examples]), strict=True):
        loss = example.loss(part)
        sums[example.task] = sums[example.task] + loss if example.task in sums else loss
        weights[example.task] = weights.get(example.task, 0.0) + example.weight
    return {task: total / weights[task] for task, total in sums.items()}


def pairs_of(examples: Sequence[Example]) -> list[Pair]:
    """Return the pairs of examples one after another."""
    return [pair for example in examples for pair in example.pairs]


def few_at_a_time(examples: Sequence[Example]) -> Iterator[list[Example]]:
    """Yield as many items of one task as a backward pass has room for; a text alone."""
    batch: list[Example] = []
    for example in examples:
        if batch and (len(batch) == AT_ONCE or not example.right or batch[0].task != example.task):
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch
