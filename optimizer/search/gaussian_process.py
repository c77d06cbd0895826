"""A Gaussian process over the weights of a merge, with known noise: what `front_sampler` asks of it, and no more.

The kernel is a linear part beside a smooth one whose length grows with the square root of the dimensions, so that
points of a space of sixty weights still tell of one another.

Source: Rasmussen and Williams, "Gaussian processes for machine learning", 2006, chapters 2 and 5; the length: Hvarfner
et al., "Vanilla Bayesian optimization performs great in high dimensions", arXiv 2402.02229.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, solve_triangular

Array = NDArray[np.float64]

LENGTHS = (0.2, 0.4, 0.8, 1.6)  # of the smooth part, times the square root of the dimensions
LINEAR = (0.0, 0.5, 2.0, 8.0)  # variance of the linear part, that of the smooth one being 1
NOISE = (1e-4, 1e-3, 1e-2, 1e-1)  # of the values' variance, beside what is known of it
PLACES = 4  # of each of the three
MOST_SEARCHED = 250  # points by which a kernel is searched for
Choice = tuple[int, int, int]  # places in LENGTHS, LINEAR and NOISE
START: Choice = (1, 1, 1)


@dataclass(frozen=True, slots=True, eq=False)
class Posterior:
    """What some points say of all others.

    Args:
        points: (n, d) in [0, 1].
        mean, scale: of the values, which are modelled as (value - mean) / scale.
        factor: (n, n) lower Cholesky factor of their covariance.
        weights: (n,) its inverse times the values.
        amplitude: of the kernel.
        choice: places in LENGTHS, LINEAR and NOISE.
    """

    points: Array
    mean: float
    scale: float
    factor: Array
    weights: Array
    amplitude: float
    choice: Choice

    def predict(self, points: Array) -> tuple[Array, Array]:
        """Foretell values at points (m, d): means (m,) and standard deviations (m,), without noise."""
        cross = self.amplitude * _kernel(self.points, points, self.choice)  # (n, m)
        spread = solve_triangular(self.factor, cross, lower=True, check_finite=False)
        own = self.amplitude * (1 + LINEAR[self.choice[1]] * _linear_norms(points))
        variances = np.maximum(own - (spread**2).sum(axis=0), 1e-12)
        return self.mean + self.scale * (cross.T @ self.weights), self.scale * np.sqrt(variances)


def fit(
    points: Array, values: Array, variances: Array, *, start: Choice = START, is_searched: bool = True
) -> Posterior:
    """Make the process that explains values with noise most likely.

    Args:
        points: (n, d) in [0, 1].
        values: (n,).
        variances: (n,) of their noise, as far as it is known; 0 where nothing is.
        start: where the search for the kernel's lengths begins.
        is_searched: whether it is searched for at all.
    """
    mean, scale = float(values.mean()), float(values.std()) or 1.0
    targets, known = (values - mean) / scale, variances / scale**2
    some = np.random.default_rng(len(values)).permutation(len(values))[:MOST_SEARCHED]
    choice = _searched(points[some], targets[some], known[some], start) if is_searched else start
    _, factor, amplitude = _tried(points, targets, known, choice)
    weights = cho_solve((factor, True), targets, check_finite=False)
    return Posterior(points, mean, scale, factor, weights, amplitude, choice)


def _searched(points: Array, targets: Array, known: Array, start: Choice) -> Choice:
    """Find the likeliest kernel by steps from one to its neighbours."""
    best, likelihood = start, _tried(points, targets, known, start)[0]
    while True:
        before = best
        for axis in range(len(before)):
            for place in (before[axis] - 1, before[axis] + 1):
                if not 0 <= place < PLACES:
                    continue
                choice = (
                    place if axis == 0 else before[0],
                    place if axis == 1 else before[1],
                    place if axis == 2 else before[2],
                )
                if (found := _tried(points, targets, known, choice)[0]) > likelihood:
                    best, likelihood = choice, found
        if best == before:
            return best


def _tried(points: Array, targets: Array, known: Array, choice: Choice) -> tuple[float, Array, float]:
    """Compute the likelihood of a kernel, its factor, and the amplitude that explains the values' variance."""
    kernel = _kernel(points, points, choice)
    amplitude = 1.0 / float(np.diag(kernel).mean())
    noise = known + NOISE[choice[2]]
    factor = np.asarray(np.linalg.cholesky(amplitude * kernel + np.diag(noise + 1e-8)), dtype=np.float64)
    white = solve_triangular(factor, targets, lower=True, check_finite=False)
    return float(-0.5 * (white**2).sum() - np.log(np.diag(factor)).sum()), factor, amplitude


def _kernel(one: Array, other: Array, choice: Choice) -> Array:
    """Compute the Matérn 5/2 kernel beside a linear one: (n, m)."""
    length = LENGTHS[choice[0]] * math.sqrt(one.shape[1])
    squares = (one**2).sum(axis=1)[:, None] + (other**2).sum(axis=1) - 2 * one @ other.T
    r = math.sqrt(5) * np.sqrt(np.maximum(squares, 0.0)) / length
    smooth = (1 + r + r**2 / 3) * np.exp(-r)
    linear = 4 / one.shape[1] * (one - 0.5) @ (other - 0.5).T
    return np.asarray(smooth + LINEAR[choice[1]] * linear)


def _linear_norms(points: Array) -> Array:
    return np.asarray(4 / points.shape[1] * ((points - 0.5) ** 2).sum(axis=1))
