"""A sampler for fronts of merges: it proposes where it expects to add most to the hypervolume.

Gain and forgetting are each a Gaussian process over the weights, with the noise that the outcomes tell. Trials that run
count as if they had come out as foretold. Points are drawn around the front, between its points and anywhere, and the
best of them are moved on.

Source: Emmerich, Deutz and Klinkenberg, "Hypervolume-based expected improvement: monotonicity properties and exact
computation", 2011; Yang et al., "Efficient computation of expected hypervolume improvement using box decomposition
algorithms", 2019.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.search_space import IntersectionSearchSpace
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from scipy.special import ndtr
from threadpoolctl import threadpool_limits

from optimizer.runs.front import losses, non_dominated
from optimizer.runs.limits import ALL
from optimizer.runs.trial import STDERR, Role, TrialKind
from optimizer.search.gaussian_process import START, Choice, Posterior, fit

Array = NDArray[np.float64]

LEAST = 5  # trials to learn from; before them it draws at random
DRAWN, MOVED, ROUNDS = 600, 150, 4  # points of a first draw, of each round that moves the best on
KEPT = 10  # the best, that are moved on
STEPS = (0.02, 0.05, 0.1, 0.25)  # of a move, in a parameter's range
OFTEN, SELDOM = 200, 20  # up to so many trials the kernels are searched for at each ask, then at each so many


class FrontSampler(BaseSampler):
    """Proposes by expected hypervolume improvement; parameters that are words are drawn at random."""

    def __init__(self, *, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._random = RandomSampler(seed=seed)
        self._known = IntersectionSearchSpace()
        self._choices: dict[int, Choice] = {}  # of each process' kernel, as it was found last
        self._searched_at = -SELDOM

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        shared = self._known.calculate(study)
        return {name: d for name, d in shared.items() if isinstance(d, FloatDistribution) and not d.single()}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._random.sample_independent(study, trial, param_name, param_distribution)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        told = [t for t in complete if search_space.keys() <= t.params.keys()]
        if not search_space or len(told) < LEAST:
            return {}
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        open_ones = [t for t in running if t.number != trial.number and search_space.keys() <= t.params.keys()]
        lows = np.array([d.low for d in search_space.values() if isinstance(d, FloatDistribution)])
        highs = np.array([d.high for d in search_space.values() if isinstance(d, FloatDistribution)])
        points, open_points = (_points(trials, search_space, lows, highs) for trials in (told, open_ones))
        with threadpool_limits(1, user_api="blas"):  # threads that wait for a core a worker has take ten times as long
            x = self._propose(points, told, open_points)
        weights = np.clip(lows + x * (highs - lows), lows, highs)
        return dict(zip(search_space, weights.tolist(), strict=True))

    def _propose(self, points: Array, told: Sequence[FrozenTrial], open_points: Array) -> Array:
        values, variances = self._objectives(told)
        is_searched = len(told) <= OFTEN or len(told) - self._searched_at >= SELDOM
        if is_searched:
            self._searched_at = len(told)
        columns = [values[:, 0], values[:, 1]]
        noises = [variances[:, 0], variances[:, 1]]
        if (excess := _excesses(told)) is not None:
            columns, noises = [*columns, excess], [*noises, np.zeros(len(told))]
        processes = [
            self._fitted(place, points, column, noise, open_points, is_searched=is_searched)
            for place, (column, noise) in enumerate(zip(columns, noises, strict=True))
        ]
        corner = _corner(told, values)
        means = np.stack([process.predict(points)[0] for process in processes[:2]], axis=1)
        front = means[non_dominated(means)]

        def worth(candidates: Array) -> Array:
            found = [process.predict(candidates) for process in processes]
            (m1, s1), (m2, s2) = found[:2]
            improvement = expected_improvement(front, corner, np.stack([m1, m2], 1), np.stack([s1, s2], 1))
            return improvement if len(found) < 3 else improvement * ndtr(-found[2][0] / found[2][1])

        return self._best(points[non_dominated(means)], worth)

    def _objectives(self, told: Sequence[FrozenTrial]) -> tuple[Array, Array]:
        """Give two losses of each trial and the variances of their noise; several gains are one by random shares."""
        found = losses([t.values for t in told])
        gains = found.shape[1] - 1
        shares = self._rng.dirichlet(np.ones(gains)) if gains > 1 else np.ones(1)
        errors = np.array([_errors(t, gains + 1) for t in told])
        values = np.stack([found[:, :-1] @ shares, found[:, -1]], axis=1)
        return values, np.stack([(errors[:, :-1] ** 2) @ shares**2, errors[:, -1] ** 2], axis=1)

    def _fitted(
        self, place: int, points: Array, values: Array, noise: Array, open_points: Array, *, is_searched: bool
    ) -> Posterior:
        start = self._choices.get(place, START)
        process = fit(points, values, noise, start=start, is_searched=is_searched)
        self._choices[place] = process.choice
        if not len(open_points):
            return process
        believed = process.predict(open_points)[0]
        return fit(
            np.vstack([points, open_points]),
            np.concatenate([values, believed]),
            np.concatenate([noise, np.zeros(len(believed))]),
            start=process.choice,
            is_searched=False,
        )

    def _best(self, front: Array, worth: Any) -> Array:
        """Give the best of points drawn anywhere, around the front and between its points, and of those near them."""
        rng, d = self._rng, front.shape[1]
        one, other = (front[rng.integers(len(front), size=DRAWN // 3)] for _ in range(2))
        between = one + rng.random((len(one), 1)) * (other - one)
        candidates = np.vstack([rng.random((DRAWN // 3, d)), self._moved(between), self._moved(one), between])
        values = worth(candidates)
        for _ in range(ROUNDS):
            ranked = np.argsort(-values)[:KEPT]
            near = self._moved(candidates[ranked[rng.integers(len(ranked), size=MOVED)]])
            candidates, values = np.vstack([candidates[ranked], near]), np.concatenate([values[ranked], worth(near)])
        return np.asarray(candidates[int(np.argmax(values))])

    def _moved(self, points: Array) -> Array:
        """Give each point moved by a step of some size, in all of its parameters or in some."""
        rng, (n, d) = self._rng, points.shape
        steps = rng.normal(size=(n, d)) * rng.choice(STEPS, size=(n, 1))
        some = rng.random((n, d)) < rng.choice([1.0, 0.3, 3.0 / d], size=(n, 1))
        return np.clip(points + steps * some, 0.0, 1.0)


def expected_improvement(front: Array, corner: Array, means: Array, deviations: Array) -> Array:
    """Compute by how much normally distributed points are expected to add to a front's hypervolume.

    Args:
        front: (F, 2), minimised, none of which beats another.
        corner: (2,), the worst that still counts.
        means, deviations: (m, 2), of independent objectives.

    Returns:
        (m,).
    """
    inside = front[(front < corner).all(axis=1)]
    inside = inside[np.argsort(-inside[:, 0])]  # the first objective falls, the second rises
    right = np.concatenate([[corner[0]], inside[:, 0]])  # (F + 1,) of each stripe of the first objective
    left = np.concatenate([inside[:, 0], [-np.inf]])
    top = np.concatenate([inside[:, 1], [corner[1]]])
    # in the stripe right of the i-th point, what is above its second objective is covered already
    m1, s1, m2, s2 = means[:, :1], deviations[:, :1], means[:, 1:], deviations[:, 1:]
    depth = _below(top, m2, s2)  # (m, F + 1): expected depth below the stripe's top
    width = _below(right, m1, s1) - _below(left, m1, s1)  # expected width that is won in the stripe
    return np.asarray((width * depth).sum(axis=1))


def _below(limits: Array, mean: Array, deviation: Array) -> Array:
    """Compute the expected max(limit - z, 0) of normal z: (m, k); 0 for a limit of minus infinity."""
    finite = np.where(np.isfinite(limits), limits, 0.0)
    u = (finite - mean) / deviation
    density = np.exp(-0.5 * u**2) / np.sqrt(2 * np.pi)
    return np.where(np.isfinite(limits), deviation * density + (finite - mean) * ndtr(u), 0.0)


def _errors(trial: FrozenTrial, objectives: int) -> list[float]:
    """Give the standard errors of a trial's objectives; 0 where the study has none, or something else."""
    given = trial.user_attrs.get(STDERR, [])
    sound = len(given) == objectives and all(isinstance(error, float | int) and 0 <= error < 1e6 for error in given)
    return [float(error) for error in given] if sound else [0.0] * objectives


def _points(trials: Sequence[FrozenTrial], space: dict[str, BaseDistribution], lows: Array, highs: Array) -> Array:
    rows = [[t.params[name] for name in space] for t in trials]
    return (np.array(rows, dtype=float).reshape(len(rows), len(space)) - lows) / (highs - lows)


def _corner(told: Sequence[FrozenTrial], values: Array) -> Array:
    """Give the worst point that counts: no gain, and what an expert forgot at most, or the limit on forgetting."""
    experts = [t.values[-1] for t in told if TrialKind.of(t.user_attrs).role is Role.EXPERT]
    most = max(experts, default=float(values[:, 1].max()))
    limits = [float(key.removeprefix(f"{ALL} ")) for key in told[-1].constraints if key.startswith(f"{ALL} ")]
    return np.array([0.0, max(min([most, *limits]), 1e-6)])


def _excesses(told: Sequence[FrozenTrial]) -> Array | None:
    """Give how far each trial is beyond the floors of single tasks, the worst of them; None without any: (n,)."""
    rows = [[over for key, over in t.constraints.items() if not key.startswith(f"{ALL} ")] for t in told]
    return np.array([max(row) for row in rows]) if all(rows) else None
