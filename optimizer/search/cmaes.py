"""CMA-ES for a study of several objectives: it climbs the height above the line from base to expert, as the knee does.

Optuna's own takes one objective, needs a package and keeps pickles in the study. This one keeps nothing: its state is
replayed from the trials that were told, in the order in which they were. The letters are the tutorial's.

Source: Hansen, "The CMA evolution strategy: a tutorial", arXiv 1604.00772; "Injecting external solutions into CMA-ES",
arXiv 1110.4181, since trials may come from elsewhere (midpoints, an earlier sampler).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.search_space import IntersectionSearchSpace
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from optimizer.runs.front import heights_above, losses
from optimizer.runs.trial import Role, TrialKind

Array = NDArray[np.float64]

SIGMA = 1 / 6  # of a parameter's range: how far around the best anchor it first looks
TRIES = 100  # draws for one that lies in the range, before it is put on its border


class CmaEsState:
    """The distribution that CMA-ES draws from, over [0, 1]^n.

    Args:
        start: (n,) the first mean.
        population: lambda, points of a generation.
    """

    def __init__(self, start: Array, population: int) -> None:
        n = self.n = len(start)
        mu = population // 2
        self.population = population
        raw = math.log((population + 1) / 2) - np.log(np.arange(1, mu + 1))  # (49)
        self.weights = raw / raw.sum()
        self.mueff = 1 / float((self.weights**2).sum())
        self.c_sigma = (self.mueff + 2) / (n + self.mueff + 5)  # (55)
        self.d_sigma = 1 + 2 * max(0.0, math.sqrt((self.mueff - 1) / (n + 1)) - 1) + self.c_sigma
        self.c_c = (4 + self.mueff / n) / (n + 4 + 2 * self.mueff / n)  # (56)
        self.c_1 = 2 / ((n + 1.3) ** 2 + self.mueff)  # (57)
        self.c_mu = min(1 - self.c_1, 2 * (self.mueff - 2 + 1 / self.mueff) / ((n + 2) ** 2 + self.mueff))  # (58)
        self.chi = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n * n))  # the length of N(0, I)
        self.mean, self.sigma = start.copy(), SIGMA
        self.p_sigma, self.p_c = np.zeros(n), np.zeros(n)
        self.covariance = np.eye(n)
        self.generation = 0
        self._decompose()

    def _decompose(self) -> None:
        squares, self.basis = np.linalg.eigh((self.covariance + self.covariance.T) / 2)
        self.scales = np.sqrt(np.maximum(squares, 1e-20))

    def draw(self, rng: np.random.Generator) -> Array:
        """Draw a point of [0, 1]^n; after too many that lie outside, the last is put on the border."""
        for _ in range(TRIES):
            x = self.mean + self.sigma * (self.basis @ (self.scales * rng.standard_normal(self.n)))
            if ((x >= 0) & (x <= 1)).all():
                break
        return np.clip(x, 0.0, 1.0)

    def tell(self, points: Array, losses: Array) -> None:
        """Learn from a generation.

        Args:
            points: (lambda, n).
            losses: (lambda,), of which the order counts.
        """
        self.generation += 1
        best = points[np.argsort(losses, kind="stable")[: len(self.weights)]]
        y = (best - self.mean) / self.sigma  # (mu, n)
        z = (y @ self.basis) / self.scales  # C^-1/2 y, but for a rotation
        longest = math.sqrt(self.n) + 2 * self.n / (self.n + 2)
        y *= np.minimum(1.0, longest / np.maximum(np.linalg.norm(z, axis=1), 1e-12))[:, None]
        step = self.weights @ y  # (41)
        self.mean = np.clip(self.mean + self.sigma * step, 0.0, 1.0)
        whitened = self.basis @ ((step @ self.basis) / self.scales)
        self.p_sigma = (1 - self.c_sigma) * self.p_sigma + math.sqrt(
            self.c_sigma * (2 - self.c_sigma) * self.mueff
        ) * whitened  # (43)
        length = float(np.linalg.norm(self.p_sigma))
        expected = math.sqrt(1 - (1 - self.c_sigma) ** (2 * self.generation))
        h_sigma = float(length / expected < (1.4 + 2 / (self.n + 1)) * self.chi)
        pull = h_sigma * math.sqrt(self.c_c * (2 - self.c_c) * self.mueff)
        self.p_c = (1 - self.c_c) * self.p_c + pull * step  # (45)
        shrunk = 1 - self.c_1 - self.c_mu + (1 - h_sigma) * self.c_1 * self.c_c * (2 - self.c_c)
        self.covariance = (
            shrunk * self.covariance
            + self.c_1 * np.outer(self.p_c, self.p_c)
            + self.c_mu * (self.weights * y.T) @ y  # (47), without negative weights
        )
        self.sigma *= math.exp(min(1.0, (self.c_sigma / self.d_sigma) * (length / self.chi - 1)))  # (44)
        self._decompose()


class ScalarisedCmaEs(BaseSampler):
    """Proposes what CMA-ES draws; parameters that are words, or that some trials lack, are drawn at random.

    Args:
        population: of a generation; None: 4 + 3 log(n), the tutorial's.
    """

    def __init__(self, *, seed: int, population: int | None = None) -> None:
        self._rng = np.random.default_rng(seed)
        self._random = RandomSampler(seed=seed)
        self._population = population
        self._known = IntersectionSearchSpace()
        self._used: list[int] = []  # trials that the state has learned from
        self._names: tuple[str, ...] = ()
        self._state: CmaEsState | None = None

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        shared = self._known.calculate(study)
        return {name: d for name, d in shared.items() if isinstance(d, FloatDistribution) and not d.single()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if not search_space:
            return {}
        state = self._replayed(study, search_space)
        x = state.draw(self._rng)
        return {
            name: float(min(max(d.low + share * (d.high - d.low), d.low), d.high))
            for (name, d), share in zip(search_space.items(), x, strict=True)
            if isinstance(d, FloatDistribution)
        }

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._random.sample_independent(study, trial, param_name, param_distribution)

    def _replayed(self, study: Study, space: dict[str, BaseDistribution]) -> CmaEsState:
        """Give the state after all whole generations that were told."""
        complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        told = [t for t in complete if space.keys() <= t.params.keys()]
        told.sort(key=lambda t: (t.datetime_complete, t.number))
        anchors = [t for t in told if TrialKind.of(t.user_attrs).is_anchor]
        climbers = [t for t in told if not TrialKind.of(t.user_attrs).is_anchor]
        numbers, names = [t.number for t in climbers], tuple(space)
        if self._state is None or names != self._names or numbers[: len(self._used)] != self._used:
            self._used, self._names = [], names
            self._state = self._started(anchors or told, space)
        state = self._state
        while len(climbers) - len(self._used) >= state.population:
            generation = climbers[len(self._used) : len(self._used) + state.population]
            state.tell(_points(generation, space), _losses(generation, anchors))
            self._used += [t.number for t in generation]
        return state

    def _started(self, anchors: Sequence[FrozenTrial], space: dict[str, BaseDistribution]) -> CmaEsState:
        n = len(space)
        population = self._population or 4 + int(3 * math.log(n))
        if not anchors:
            return CmaEsState(np.full(n, 0.5), population)
        best = int(np.argmin(_losses(anchors, anchors)))
        return CmaEsState(_points(anchors, space)[best], population)


def _points(trials: Sequence[FrozenTrial], space: dict[str, BaseDistribution]) -> Array:
    """Give trials' parameters in shares of their ranges: (T, n)."""
    lows = np.array([d.low for d in space.values() if isinstance(d, FloatDistribution)])
    highs = np.array([d.high for d in space.values() if isinstance(d, FloatDistribution)])
    return (np.array([[t.params[name] for name in space] for t in trials], dtype=float) - lows) / (highs - lows)


def _losses(trials: Sequence[FrozenTrial], anchors: Sequence[FrozenTrial]) -> Array:
    """Give what is to be made small: how far limits are exceeded, where none is the height turned about: (T,)."""
    experts = [t for t in anchors if TrialKind.of(t.user_attrs).role is Role.EXPERT]
    most = max((float(t.values[-1]) for t in experts if t.values), default=0.0)
    values = losses([t.values for t in trials])
    down = -heights_above(-values[:, :-1].mean(axis=1), values[:, -1], expert_forgetting=most)
    exceeded = np.array([sum(max(0.0, over) for over in t.constraints.values()) for t in trials])
    worst = down.max(initial=0.0) - down.min(initial=0.0) + 1.0
    return np.where(exceeded > 0, down.max(initial=0.0) + worst * (1.0 + exceeded), down)
