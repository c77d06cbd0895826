"""What a certificate tests, made from what is known before: the losses' scale, their bounds and the first bets.

Forgetting of several tasks is a mean of ratios, which no mean of items is. Its hypothesis weighs each task by what the
base could do there on the items that are known, and so is linear:

    sum over tasks of (loss of score - x * ability of the base) / known ability of the base, at most 0,

which is the study's objective at most x where the known ability is the true one. The gain is treated alike, with what
the expert won. `each_task` tests every general task by itself, where the scale has no say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from evals.certificates import Hypothesis, Part, start_of
from evals.errors import TaskError
from evals.objectives import experts_of
from evals.outcomes import ACCURACIES, TaskInfo
from evals.score_table import Table, summed, table_of

Array = NDArray[np.float64]

BOUND = 3.0  # an unbounded loss counts as at most so many times the largest that is known
LEAST_AIM = 0.1  # of the expert's gain: how far above the asked one the gain is hoped to be, at least
FORGETTING, GAIN = "forgetting", "domain gain"


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """Outcomes that may be looked at: those of the holdout items.

    Args:
        rows: columns trial and those of `Outcome`.
        base, candidate: trials.
        experts: expert name to trial.
        tasks: what is known of each.
        items: how many certify items each task has.
        sizes: and how many of them share each passage, in their order; without tasks whose items share none.
    """

    rows: pd.DataFrame
    base: int
    candidate: int
    experts: Mapping[str, int]
    tasks: Sequence[TaskInfo]
    items: Mapping[str, int]
    sizes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def of(self, role: str) -> list[TaskInfo]:
        """Return the tasks of a role."""
        return [task for task in self.tasks if task.role == role]

    def values(self, task: TaskInfo) -> tuple[dict[str, Array], Array]:
        """Return the known items' values by model, (n,) each, and their weights.

        Raises:
            TaskError: the task's score is no mean over items, on which bets are made.
        """
        if task.statistic:
            raise TaskError(
                f"a certificate is of scores that are means over items, task {task.name}'s {task.metric} is none; give "
                "the task another metric, or leave it to the intervals of the front"
            )
        trials, table = self._trials, self.table(task)
        return {name: table.values[:, table.column(trial)] for name, trial in trials.items()}, table.weights

    def table(self, task: TaskInfo) -> Table:
        """Return the known items of a task as arrays."""
        return table_of(self.rows[self.rows["trial"].isin(self._trials.values())], task.name)

    @property
    def _trials(self) -> dict[str, int]:
        return {"base": self.base, "candidate": self.candidate, **self.experts}


def forgetting_hypotheses(known: Known, limit: float, *, each_task: bool, delta: float) -> list[Hypothesis]:
    """Make what has to be shown for a limit on forgetting: of the mean over general tasks, or of each of them.

    Args:
        limit: a share, above 0 and below 1.
        delta: the error of the certificate.

    Raises:
        TaskError: a task has no certify items, or the base scores at chance.
    """
    tasks = known.of("general")
    total = sum(task.weight for task in tasks)
    parts = [_forgetting_part(known, task, limit, 1.0 if each_task else task.weight / total) for task in tasks]
    groups = (
        [(f"{FORGETTING} of {part.task}", (part,)) for part in parts] if each_task else [(FORGETTING, tuple(parts))]
    )
    return [_hypothesis(known, name, limit, group, least=limit / 2, delta=delta) for name, group in groups]


def gain_hypothesis(known: Known, least: float, *, delta: float) -> Hypothesis:
    """Make what has to be shown for a least domain gain: the mean over experts of the mean over their tasks.

    Args:
        least: a share of the expert's gain, above 0 and at most 1.

    Raises:
        TaskError: a task has no certify items, or the expert scores as the base.
    """
    tasks = known.of("domain")
    total = {
        name: sum(task.weight for task in tasks if name in experts_of(task, known.experts)) for name in known.experts
    }
    parts = tuple(
        _gain_part(known, task, least, {name: task.weight / (all_of * len(total)) for name, all_of in total.items()})
        for task in tasks
    )
    return _hypothesis(known, GAIN, least, parts, least=LEAST_AIM, delta=delta)


def _forgetting_part(known: Known, task: TaskInfo, limit: float, share: float) -> Part:
    """Compute s (v(base) - v(candidate)) - limit * side * s (v(base) - chance w), over the known ability, times what
    the task counts."""
    values, weights = known.values(task)
    sign = 1.0 if task.higher_is_better else -1.0
    ability = float(sign * (values["base"].sum() / weights.sum() - task.chance))
    if not ability:
        raise TaskError(f"general task {task.name}: the base scores exactly at chance, so there is nothing to forget")
    side = np.sign(ability)
    scale = abs(ability) * float(weights.mean()) / share
    base, constant = sign * (1 - limit * side), sign * limit * side * task.chance
    return _part(known, task, values, weights, np.array([base, -sign, constant]) / scale, {})


def _gain_part(known: Known, task: TaskInfo, least: float, weights_of: Mapping[str, float]) -> Part:
    """Compute least * s (v(expert) - v(base)) - s (v(candidate) - v(base)) over what was won, summed over experts."""
    values, weights = known.values(task)
    sign = 1.0 if task.higher_is_better else -1.0
    base = candidate = 0.0
    experts: dict[str, float] = {}
    for name in experts_of(task, known.experts):
        won = float(sign * (values[name] - values["base"]).sum() / len(weights))
        if won <= 0:
            raise TaskError(
                f"domain task {task.name}: expert {name} does not beat the base, so there is no gain to keep"
            )
        factor = sign * weights_of[name] / won
        experts[name] = least * factor
        base += (1 - least) * factor
        candidate -= factor
    return _part(known, task, values, weights, np.array([base, candidate, 0.0]), experts)


def _part(
    known: Known,
    task: TaskInfo,
    values: Mapping[str, Array],
    weights: Array,
    factors: Array,
    experts: Mapping[str, float],
) -> Part:
    if not known.items.get(task.name):
        raise TaskError(f"task {task.name} has no items for certificates; see `mergefront check`")
    base, candidate, constant = map(float, factors)
    is_bounded, sizes = task.metric not in ACCURACIES, known.sizes.get(task.name, ())
    items = known.items[task.name]
    part = Part(task.name, items, base, candidate, experts, constant, np.inf, is_bounded=is_bounded, sizes=sizes)
    if not part.is_bounded:  # values from 0 to 1, weights of 1
        most = sum(max(0.0, factor) for factor in (base, candidate, *experts.values())) + constant
    else:
        losses, _ = part.losses(values, weights)
        most = BOUND * float(np.abs(losses).max())
    return dataclasses.replace(part, most=most)


def _hypothesis(
    known: Known, name: str, limit: float, parts: tuple[Part, ...], *, least: float, delta: float
) -> Hypothesis:
    """Put parts together, with first bets by what is known: half of how far below 0 the losses lie there."""
    mean, variance = estimate(known, parts)
    return Hypothesis(name, limit, parts, start_of(max(-mean, least) / 2, variance, delta, measured=mean))


def estimate(known: Known, parts: Sequence[Part]) -> tuple[float, float]:
    """Estimate a round's mean loss and its variance from the known items."""
    tasks, rounds = {task.name: task for task in known.tasks}, min(part.units for part in parts)
    mean = variance = 0.0
    for part in parts:
        losses, _ = part.losses(*known.values(tasks[part.task]))
        mean += float(losses.mean())
        clusters = known.table(tasks[part.task]).clusters if part.sizes else None
        units = losses if clusters is None else summed(losses, clusters) * part.units / part.items
        variance += float(units.var()) * rounds / part.units
    return mean, variance
