"""From per-item outcomes to the two numbers a search turns: skill won in the domain, ability lost elsewhere.

Needs numpy and pandas only, so that a run folder can be read anywhere. Every score is turned so that higher is better;
intervals resample items, the same items for every trial (a paired bootstrap), since two merges err on the same items.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from evals.errors import TaskError
from evals.outcomes import SENTINEL, TaskInfo
from evals.score_table import Table, table_from, table_of
from evals.statistics import score_of
from evals.task_rows import TaskRows

Array = NDArray[np.float64]

INTERVAL = (0.025, 0.975)
ONE_SIGMA = (0.1587, 0.8413)  # half their distance is the standard error, and stands the heavy tails of a ratio


@dataclass(frozen=True, slots=True, eq=False)
class Scale:
    """Outcomes of trials, and what they are measured by.

    Args:
        outcomes: columns `trial` and those of `Outcome`.
        tasks: the study's tasks; a sentinel is used by `sentinel_changes` alone, all others by all else.
        suite: "search" or "holdout".
        base: the trial that is the base.
        experts: expert name to the trial that is this expert.
        arrays: the suite's outcomes by task once more, where they are at hand; objectives are then made of these.
    """

    outcomes: pd.DataFrame
    tasks: Sequence[TaskInfo]
    suite: str
    base: int
    experts: Mapping[str, int]
    arrays: Mapping[str, TaskRows] | None = None

    @property
    def rows(self) -> pd.DataFrame:
        """The outcomes of the suite."""
        is_of_it = self.outcomes["suite"] == self.suite
        return self.outcomes if is_of_it.all() else self.outcomes[is_of_it]

    def table(self, task: str) -> Table:
        """Arrange a task's outcomes on the suite as arrays; errors as of `table_of`."""
        if self.arrays is None:
            return table_of(self.rows, task)
        if task not in self.arrays:
            raise TaskError(f"task {task} has no outcome on this suite")
        return table_from(self.arrays[task], task)

    @property
    def measured_by(self) -> list[TaskInfo]:
        """The tasks that objectives are made of."""
        return [task for task in self.tasks if task.role != SENTINEL]

    def require_references(self, trials: NDArray[np.int64]) -> None:
        """Raise TaskError where the base or an expert is not among the trials (T,) that have outcomes."""
        for trial in (self.base, *self.experts.values()):
            if trial not in trials:
                raise TaskError(f"base and experts must be scored first: trial {trial} has no {self.suite} outcome")


@dataclass(frozen=True, slots=True)
class Draws:
    """Objectives of T trials, by name.

    Args:
        trials: (T,) rising.
        points: (T,) each, of the items as they are.
        samples: (B, T) each, of B resamplings of the items: row b is of the same items in every column and objective.
        by_task: (T,) forgetting of each general task.
    """

    trials: NDArray[np.int64]
    points: Mapping[str, Array]
    samples: Mapping[str, Array]
    by_task: Mapping[str, Array] = field(default_factory=dict)

    def column(self, trial: int) -> int:
        """Return where a trial stands among the T."""
        return int(np.searchsorted(self.trials, trial))


def objective_names(experts: Sequence[str]) -> tuple[str, ...]:
    """Name a study's objectives: domain (one for each of several experts; maximised), then forgetting (minimised)."""
    return (*(["domain"] if len(experts) < 2 else [f"domain_{name}" for name in experts]), "forgetting")


def task_scores(outcomes: pd.DataFrame, suite: str) -> pd.DataFrame:
    """Compute the score of every trial on every task, in the metric's own direction and unit.

    Args:
        outcomes: columns `trial` and those of `Outcome`, one row per trial and item.
        suite: "search" or "holdout".

    Returns:
        A frame of trial, task, score, stderr (over items; NaN for one item) and n (items).
    """
    rows = outcomes[outcomes["suite"] == suite]
    frames = []
    for task in rows["task"].unique():
        table = table_of(rows, str(task))
        frames.append(
            pd.DataFrame(
                {
                    "trial": table.trials,
                    "task": str(task),
                    "score": table.scores,
                    "stderr": table.stderr(),
                    "n": len(table.weights),
                }
            )
        )
    if not frames:
        raise TaskError(f"no outcome of the {suite} suite: score at least one trial on it first")
    return pd.concat(frames, ignore_index=True)


def draw_objectives(scale: Scale, *, replicates: int = 1000, seed: int = 0) -> Draws:
    """Compute the objectives of every trial scored on a suite, as measured and on resampled items.

    Args:
        scale: the outcomes, and what they are measured by.
        replicates: bootstrap samples; 0 gives none.
        seed: of the bootstrap.

    Returns:
        `domain` (share of the expert's gain; the mean of `domain_<name>` where there are several experts) and
        `forgetting`.

    Raises:
        TaskError: a trial lacks items, or a task has no scale (the expert scores as the base, the base as chance).
    """
    measures = _measures(scale, replicates, seed)
    experts = scale.experts
    groups = {f"domain_{name}": [m for m in measures if m.expert == name] for name in experts}
    empty = [name for name in groups if not groups[name]]
    if empty:
        raise TaskError(f"every expert needs a domain task: {', '.join(empty)} has none (evals.domain)")
    forgetting = [m for m in measures if m.role == "general"]
    if not forgetting:
        raise TaskError("forgetting needs at least one general task (evals.general)")
    points = {name: _mean(group, [m.point for m in group]) for name, group in groups.items()}
    samples = {name: _mean(group, [m.samples for m in group]) for name, group in groups.items()}
    points = {"domain": np.mean(list(points.values()), axis=0), **(points if len(experts) > 1 else {})}
    samples = {"domain": np.mean(list(samples.values()), axis=0), **(samples if len(experts) > 1 else {})}
    points["forgetting"] = _mean(forgetting, [m.point for m in forgetting])
    samples["forgetting"] = _mean(forgetting, [m.samples for m in forgetting])
    return Draws(measures[0].trials, points, samples, {m.task: m.point for m in forgetting})


def _mean(measures: Sequence[_Measure], arrays: Sequence[Array]) -> Array:
    """Average what tasks say, each by its weight."""
    weights = [measure.weight for measure in measures]
    if len(set(weights)) == 1:
        return np.asarray(np.mean(arrays, axis=0))
    return np.asarray(np.average(arrays, axis=0, weights=weights))


def objectives(draws: Draws) -> pd.DataFrame:
    """Compute the objectives of every trial with 95 % intervals.

    Returns:
        A frame indexed by trial: `domain` (share of the expert's gain; the mean of `domain_<name>` where there are
        several experts), `forgetting`, and of each `_low`, `_high` and `_stderr`.
    """
    columns = dict(draws.points)
    for name, samples in draws.samples.items():
        columns[f"{name}_low"], columns[f"{name}_high"] = interval(samples)
        below, above = _quantiles(samples, ONE_SIGMA)
        columns[f"{name}_stderr"] = (above - below) / 2
    return pd.DataFrame(columns, index=pd.Index(draws.trials, name="trial"))


def task_retention(scale: Scale, *, replicates: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Compute what each trial won or lost on each task; arguments as `draw_objectives`.

    Returns:
        A frame of trial, task, role, expert, score, gain_share (domain tasks, else NaN), forgetting (general tasks,
        else NaN), and the 95 % interval `low`, `high` of whichever of the two it is.
    """
    frames = []
    for measure in _measures(scale, replicates, seed):
        low, high = interval(measure.samples)
        domain = measure.role == "domain"
        frames.append(
            pd.DataFrame(
                {
                    "trial": measure.trials,
                    "task": measure.task,
                    "role": measure.role,
                    "expert": measure.expert,
                    "score": measure.scores,
                    "gain_share": measure.point if domain else np.nan,
                    "forgetting": np.nan if domain else measure.point,
                    "low": low,
                    "high": high,
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def sentinel_changes(scale: Scale, *, replicates: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Measure each trial against the base on each sentinel task; arguments and errors as `draw_objectives`.

    Returns:
        A frame of trial, task, score (in the metric's own direction), change (score minus the base's, in the metric's
        unit, turned so that higher is better), and the change's 95 % interval low, high. Empty without a sentinel.
    """
    rows, frames = scale.rows, [pd.DataFrame(columns=["trial", "task", "score", "change", "low", "high"])]
    for task in (task for task in scale.tasks if task.role == SENTINEL):
        table = table_of(rows, task.name)
        scale.require_references(table.trials)
        base = table.column(scale.base)
        scores = turned(task, table.scores)
        samples = turned(task, _resampled_scores(table, replicates, _seed(seed, task.name)))  # (B, T)
        low, high = interval(samples - samples[:, base, None])
        change = scores - scores[base]
        told = told_scores(task, table, scale.base)
        columns = {"score": told, "change": change, "low": low, "high": high}
        frames.append(pd.DataFrame({"trial": table.trials, "task": task.name, **columns}))
    return pd.concat(frames[1:] or frames, ignore_index=True)


@dataclass(frozen=True, slots=True)
class _Measure:
    """One task's gain share (per expert) or forgetting: the point (T,) and its bootstrap samples (B, T)."""

    task: str
    role: str
    expert: str
    trials: NDArray[np.int64]
    scores: Array
    point: Array
    samples: Array
    weight: float = 1.0


def _measures(scale: Scale, replicates: int, seed: int) -> list[_Measure]:
    base, experts, suite = scale.base, scale.experts, scale.suite
    measures: list[_Measure] = []
    for task in scale.measured_by:
        table = scale.table(task.name)
        scale.require_references(table.trials)
        if measures and not np.array_equal(table.trials, measures[0].trials):
            odd = sorted(set(table.trials.tolist()) ^ set(measures[0].trials.tolist()))
            raise TaskError(f"every trial needs outcomes of every task: trial {odd[0]} lacks some of the {suite} suite")
        point = turned(task, table.scores)[None, :]  # (1, T)
        samples = turned(task, _resampled_scores(table, replicates, _seed(seed, task.name)))  # (B, T)
        for name in experts_of(task, experts) if task.role == "domain" else ("",):
            at_base, at_expert = table.column(base), table.column(experts[name]) if name else None
            exact = _relative(task, point, at_base, at_expert)
            if not len(exact):
                what = f"expert {name} scores exactly as the base" if name else "the base scores exactly at chance"
                raise TaskError(f"task {task.name} has no scale: {what}; use more items or another task")
            drawn = _relative(task, samples, at_base, at_expert)
            told = told_scores(task, table, base)
            measures.append(_Measure(task.name, task.role, name, table.trials, told, exact[0], drawn, task.weight))
    if not measures:
        raise TaskError("objectives need at least one domain and one general task")
    return [m if len(m.samples) == replicates else _refilled(m, replicates) for m in measures]


def _relative(task: TaskInfo, scores: Array, base: int, expert: int | None) -> Array:
    """Compute gain share or forgetting of turned scores (B, T); rows without a scale are left out."""
    at_base = scores[:, base, None]
    if expert is not None:
        change, scale = scores - at_base, scores[:, expert, None] - at_base
    else:
        change, scale = at_base - scores, np.abs(at_base - task.chance)
    rows = scale[:, 0] != 0
    return np.asarray(change[rows] / scale[rows] + 0.0)  # + 0.0: no negative zero


def _refilled(measure: _Measure, replicates: int) -> _Measure:
    """Replace the few samples that had no scale by repeats, so that tasks can be averaged row by row."""
    samples = np.resize(measure.samples, (replicates, len(measure.trials))) if len(measure.samples) else np.nan
    filled = np.broadcast_to(samples, (replicates, len(measure.trials)))
    return replace(measure, samples=np.asarray(filled))


def told_scores(task: TaskInfo, table: Table, base: int) -> Array:
    """Return a task's scores as people are told them: of a distance to the base the distance alone, 0 for the base.

    Args:
        base: the trial that is the base.

    Returns:
        (T,) in the metric's unit; of KL in bits a token.
    """
    return table.scores - table.scores[table.column(base)] if task.is_to_base else table.scores


def turned(task: TaskInfo, scores: Array) -> Array:
    """Turn a task's scores so that higher is better."""
    return scores if task.higher_is_better else -scores


def experts_of(task: TaskInfo, experts: Mapping[str, int]) -> tuple[str, ...]:
    """Name the experts that a task measures.

    Raises:
        TaskError: the study has no such expert.
    """
    if task.expert and task.expert not in experts:
        raise TaskError(f"task {task.name} names expert {task.expert}; the study has {', '.join(experts)}")
    return (task.expert,) if task.expert else tuple(experts)


def _resampled_scores(table: Table, replicates: int, seed: Sequence[int]) -> Array:
    """Compute scores of resampled item sets: (B, k) counts times (k, T) values of items or clusters.

    What estimates may be off by is drawn too: the same normal draw for an item in every trial, times its pull.
    """
    values, weights = table.by_cluster(table.values), table.by_cluster(table.weights)
    n = len(weights)
    draws = np.random.default_rng(seed).integers(n, size=(replicates, n)) + n * np.arange(replicates)[:, None]
    counts = np.bincount(draws.ravel(), minlength=replicates * n).reshape(replicates, n).astype(np.float64)
    if table.parts is not None:
        return score_of(table.statistic, np.tensordot(counts, table.by_cluster(table.parts), axes=1))  # (B, T)
    scores = np.asarray(counts @ values / (counts @ weights)[:, None])  # (B, T)
    if table.pulls is None:
        return scores
    luck = np.random.default_rng((*seed, 1)).normal(size=(replicates, n))
    return np.asarray(scores + luck @ table.by_cluster(table.pulls) / weights.sum())


def _seed(seed: int, task: str) -> tuple[int, int]:
    return seed, zlib.crc32(task.encode())


def interval(samples: Array) -> tuple[Array, Array]:
    """Find the ends of the 95 % interval of bootstrap samples (B, T): (T,) each, NaN where there are none."""
    return _quantiles(samples, INTERVAL)


def _quantiles(samples: Array, levels: tuple[float, float]) -> tuple[Array, Array]:
    if not len(samples):
        nothing = np.full(samples.shape[1], np.nan)
        return nothing, nothing
    low, high = np.quantile(samples, levels, axis=0)
    return low, high
