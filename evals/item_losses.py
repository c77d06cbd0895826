"""The loss of outcomes by task: few items tell more by it than by a score, which only knows right from wrong."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from evals.outcomes import TaskInfo
from evals.statistics import score_of

BY_LENGTH = ("acc_norm", "acc_bytes")  # metrics that divide a choice's log-likelihood by its length


def mean_losses(outcomes: pd.DataFrame, tasks: Sequence[TaskInfo]) -> dict[str, float]:
    """Compute what one trial loses on each task, lower is better.

    Choices have the cross-entropy of the right ones in nats; of other items it is the score, negated where higher is
    better. The unit is the task's own.

    Args:
        outcomes: of one trial, with the columns of `Outcome`.
        tasks: that are wanted; those without outcomes are left out.
    """
    by_task = dict(tuple(outcomes.groupby("task", sort=False, observed=True)))
    return {task.name: _loss(by_task[task.name], task) for task in tasks if task.name in by_task}


def _loss(rows: pd.DataFrame, task: TaskInfo) -> float:
    by_length = task.metric.split(",")[0] in BY_LENGTH
    found = [
        _cross_entropy(np.asarray(all_), np.asarray(lengths) if by_length else np.ones(len(all_)), [*right])
        for all_, lengths, right in zip(rows["loglikelihoods"], rows["lengths"], rows["right"], strict=True)
        if right is not None and 0 < len(right) < len(all_)
    ]
    if len(found) == len(rows):
        return float(np.mean(found))
    if task.statistic:
        score = float(score_of(task.statistic, np.array([*rows["parts"]], dtype=float).sum(axis=0)))
    else:
        score = float(rows["value"].sum() / rows["weight"].sum())
    return -score if task.higher_is_better else score


def _cross_entropy(loglikelihoods: np.ndarray, lengths: np.ndarray, right: list[int]) -> float:
    scores = loglikelihoods / np.maximum(lengths, 1)
    return float(np.logaddexp.reduce(scores) - np.logaddexp.reduce(scores[right]))
