"""A bank of items: what a candidate scores on all of them, estimated from some by what anchors score on all.

Anchors (base, experts, lines, learned points) are scored on the N items of a task's bank, any other candidate on n that
were drawn. A ridge regression on the anchors foretells the rest, and what it errs by on the drawn items corrects the
sum, so that the estimate is honest whatever the anchors are. A search goes by that estimate moved towards the
regression, as far as the regression foretells anchors. Needs numpy only.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Places = NDArray[np.int64]

LEAST_DRAWN = 12  # items of a task: fewer tell too little of how far the regression errs
STRATA = 3
LEAST_OF_STRATUM = 3  # drawn items, so that each stratum tells its spread
EVEN = 0.25  # of the draw follows the strata's sizes alone, for what the anchors agree on may differ elsewhere
PENALTIES = np.geomspace(1e-2, 1e4, 13)  # of the ridge, in units of a drawn item's variance
PRIOR = 4.0  # drawn items that the model's own variance stands for, in each stratum
MOST_MOVED = 1.0  # standard errors that the regression may move an estimate by
LAPSE = 0.004  # variance of an answer that no margin foretells: an accuracy of 0.4 %, beyond the normal's thin tails
LEVEL = 0.975
Z = NormalDist().inv_cdf(LEVEL)


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """One candidate on the drawn items of one task.

    Args:
        places: (n,) of the items in the bank, each once.
        values: (n,) the items' values: 0 or 1, bits, or what the metric gives.
        signals: (n,) what the regression is on: margins in nats, or the values again.
        inclusion: (n,) probability with which each was drawn; all items of a stratum have the same.
    """

    places: Places
    values: Array
    signals: Array
    inclusion: Array


@dataclass(frozen=True, slots=True, eq=False)
class Estimate:
    """One candidate on all N items of a bank.

    Args:
        values: (N,) what was measured, and elsewhere what is foretold and corrected: their sum is the estimated sum.
        pulls: (N,) each drawn item's pull on the error of that sum, 0 where nothing was drawn. Their sum of squares is
            the error's variance, widened so that 1.96 standard errors hold 95 % although the items are few.
    """

    values: Array
    pulls: Array

    @property
    def total(self) -> float:
        """The estimated sum of the values."""
        return float(self.values.sum())

    @property
    def stderr(self) -> float:
        """The standard error of `total`."""
        return float(np.sqrt((self.pulls**2).sum()))


def margins(loglikelihoods: Array, right: NDArray[np.bool_]) -> Array:
    """Compute how far the best right answer is above the best wrong one: above 0 where the model answers right.

    Args:
        loglikelihoods: (..., C) of each choice, in nats; -inf for a choice that is not there.
        right: (..., C) whether a choice is right.

    Returns:
        (...) in nats.
    """
    best = np.where(right, loglikelihoods, -np.inf).max(axis=-1)
    return np.asarray(best - np.where(right, -np.inf, loglikelihoods).max(axis=-1))


def draw_order(anchors: Array, *, are_margins: bool, seed: int, task: str) -> tuple[Places, Places]:
    """Put a bank's items in the order in which candidates are scored on them: a draw of n is the first n.

    Items are put in strata by how unsure their outcome is between the anchors, and an unsure stratum comes up more
    often. Within a stratum the order is by chance, so that of each stratum every item is as likely to be drawn.

    Args:
        anchors: (N, k) margins or values of what was scored on all.
        are_margins: which of the two.
        seed, task: of the chance.

    Returns:
        order (N,), and the stratum of each item (N,).
    """
    unsure = _unsure(anchors) if are_margins else anchors.std(axis=1)
    strata = _strata(unsure)
    sizes = np.bincount(strata)
    spreads = np.sqrt(np.bincount(strata, unsure**2) * sizes)  # (H,) Neyman: size times standard deviation
    shares = sizes / sizes.sum()
    if spreads.sum() > 0:
        shares = EVEN * shares + (1 - EVEN) * spreads / spreads.sum()
    chance = np.random.default_rng((seed, zlib.crc32(task.encode()))).permutation(len(strata))
    turns = np.empty(len(strata))
    for stratum, share in enumerate(shares):
        members = chance[strata[chance] == stratum]
        turns[members] = (np.arange(len(members)) + 0.5) / share
        turns[members[:LEAST_OF_STRATUM]] = 0.0
    return np.argsort(turns, kind="stable"), strata


def inclusion_of(strata: Places, places: Places) -> Array:
    """Compute the probability with which each drawn item was drawn, the share of its stratum that was: (n,)."""
    return np.asarray((np.bincount(strata[places], minlength=strata.max() + 1) / np.bincount(strata))[strata[places]])


def estimate(anchors: Array, seen: Seen, *, are_margins: bool) -> Estimate:
    """Estimate what a candidate scores on every item of the bank.

    The regression foretells each drawn item without having seen it (leave one out, in closed form). In each stratum the
    mean of what it errs by stands for the items that were not drawn. With margins an outcome is foretold as the
    probability that the margin is above 0, normally distributed around what the regression says.

    Args:
        anchors: (N, k) margins or values of each item, k >= 1.
        seen: the candidate on the drawn items.
        are_margins: whether the signals are margins, and the values 0 or 1.

    Source: Cassel, Särndal and Wretman, "Some results on generalized difference estimation", 1976; Breidt and Opsomer,
    "Model-assisted survey estimation with modern prediction techniques", 2017 (cross-fitted residuals).
    """
    foretold, unseen, doubts = foretell(anchors, seen, are_margins=are_margins)
    errors = seen.values - unseen
    correction, variances, freedoms, pulls = 0.0, [], [], np.zeros(len(anchors))
    for probability in np.unique(seen.inclusion[seen.inclusion < 1]):
        mine = seen.inclusion == probability
        drawn = int(mine.sum())
        size = round(drawn / probability)
        correction += (size - drawn) * errors[mine].mean()
        apart = errors[mine] - errors[mine].mean()
        variance = ((apart**2).sum() + PRIOR * doubts[mine].mean()) / (drawn - 1 + PRIOR)
        variances.append(size * (size - drawn) / drawn * variance)
        freedoms.append(max(drawn - 1, 1))
        pulls[seen.places[mine]] = math.sqrt(variances[-1]) * _direction(apart)
    if not variances:
        return Estimate(_placed(foretold, seen, 0.0), pulls)
    freedom = sum(variances) ** 2 / sum(v**2 / f for v, f in zip(variances, freedoms, strict=True))  # Satterthwaite
    return Estimate(_placed(foretold, seen, correction), pulls * t_quantile(freedom) / Z)


def regression_error(anchors: Array, values: Array, places: Places, *, are_margins: bool) -> float:
    """Compute how far the regression alone is from what anchors score on all items, each foretold by the others.

    Args:
        anchors: (N, k) margins or values of each item.
        values: (N, k) the anchors' values.
        places: (n,) of the drawn items.
        are_margins: as of `estimate`.

    Returns:
        The root mean square of the errors of k sums of N values; infinity for one anchor, which nothing foretells.
    """
    count = anchors.shape[1]
    if count < 2:
        return math.inf
    errors = []
    for anchor in range(count):
        seen = Seen(places, values[places, anchor], anchors[places, anchor], np.ones(len(places)))
        foretold, _, _ = foretell(np.delete(anchors, anchor, axis=1), seen, are_margins=are_margins)
        errors.append(_placed(foretold, seen, 0.0).sum() - values[:, anchor].sum())
    return math.sqrt(np.mean(np.square(errors)))


def towards_regression(found: Estimate, anchors: Array, seen: Seen, error: float, *, are_margins: bool) -> Estimate:
    """Move an estimate towards what the regression alone says, the more the better that foretells anchors.

    Of many estimates the highest is mostly a lucky one; these have less luck. The correction keeps the share
    error² / (error² + stderr²), and the estimate moves by `MOST_MOVED` standard errors at most, for a candidate may be
    unlike all anchors. Its standard error stays, so that the interval is too wide rather than too narrow.

    Args:
        found: what `estimate` gives for the same anchors and candidate.
        error: what `regression_error` gives.

    Source: Efron and Morris, "Limiting the risk of Bayes and empirical Bayes estimators II", 1972.
    """
    variance = found.stderr**2
    if variance == 0 or not math.isfinite(error):
        return found
    foretold, _, _ = foretell(anchors, seen, are_margins=are_margins)
    correction = found.total - float(_placed(foretold, seen, 0.0).sum())
    most = MOST_MOVED * found.stderr
    move = min(max(-correction * variance / (variance + error**2), -most), most)
    return replace(found, values=_placed(foretold, seen, correction + move))


def foretell(anchors: Array, seen: Seen, *, are_margins: bool) -> tuple[Array, Array, Array]:
    """Foretell each item's value by the regression alone, which nothing corrects; arguments as of `estimate`.

    Returns:
        every item's value (N,); each drawn item's, without having seen it (n,), and the variance of that (n,).
    """
    foretold, unseen, spread, spreads = _regress(anchors, seen)
    if not are_margins:
        return foretold, unseen, spreads**2
    foretold, unseen = _normal_cdf(foretold / spread), _normal_cdf(unseen / spreads)
    return foretold, unseen, unseen * (1 - unseen) + LAPSE


def t_quantile(freedom: float) -> float:
    """Compute the 97.5 % quantile of Student's t, to 1 % from 3 degrees of freedom on.

    Source: Abramowitz and Stegun, "Handbook of mathematical functions", 26.7.5.
    """
    f = max(freedom, 2.0)
    terms = (
        Z,
        (Z**3 + Z) / 4 / f,
        (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96 / f**2,
        (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384 / f**3,
        (79 * Z**9 + 776 * Z**7 + 1482 * Z**5 - 1920 * Z**3 - 945 * Z) / 92160 / f**4,
    )
    return math.fsum(terms)


def _unsure(anchors: Array) -> Array:
    """Compute the standard deviation of an answer whose margin lies where the anchors' do: (N,)."""
    variances = anchors.var(axis=1)
    p = _normal_cdf(anchors.mean(axis=1) / np.sqrt(variances + variances.mean() + 1e-12))
    return np.asarray(np.sqrt(p * (1 - p)))


def _strata(unsure: Array) -> Places:
    """Cut the items, by what they are unsure of, where its sums are alike; one stratum where all are alike: (N,)."""
    if np.ptp(unsure) <= 1e-9 * unsure.max() or len(unsure) < LEAST_OF_STRATUM * STRATA:
        return np.zeros(len(unsure), dtype=np.int64)
    ranked = np.argsort(unsure, kind="stable")
    reached = np.cumsum(unsure[ranked] + EVEN * unsure.mean())
    cuts = np.minimum((STRATA * reached / reached[-1]).astype(np.int64), STRATA - 1)
    strata = np.empty(len(unsure), dtype=np.int64)
    strata[ranked] = np.unique(cuts, return_inverse=True)[1]
    return strata


def _regress(anchors: Array, seen: Seen) -> tuple[Array, Array, float, Array]:
    """Regress a candidate's signals on the anchors', drawn towards the anchors' mean.

    Returns:
        what it says of each item (N,), and of each drawn one when that is left out (n,); the standard deviation of its
        error, and that without each drawn one (n,).
    """
    mean = anchors.mean(axis=1)
    features = np.hstack([mean[:, None], (anchors - mean[:, None])[:, 1:]])  # (N, k)
    centre = features[seen.places].mean(axis=0)
    target = seen.signals - mean[seen.places]
    level, n = target.mean(), len(target)
    left, sizes, right = np.linalg.svd(features[seen.places] - centre, full_matrices=False)
    unit = max(float((sizes**2).sum() / n / len(centre)), 1e-12)
    along = left.T @ (target - level)  # (r,)
    shrunk = 1 / (sizes**2 + PENALTIES[:, None] * unit)  # (P, r)
    fitted = level + (shrunk * sizes**2 * along) @ left.T  # (P, n)
    leverages = 1 / n + (shrunk * sizes**2) @ (left.T**2)
    errors = (target - fitted) / np.maximum(1 - leverages, 1e-3)  # of each when it is left out
    best = int(np.argmin((errors**2).sum(axis=1)))
    squares, error = float((errors[best] ** 2).sum()), errors[best]
    foretold = mean + level + (features - centre) @ (right.T @ (shrunk[best] * sizes * along))
    least = 1e-9 + 1e-6 * float(np.abs(seen.signals).mean())  # a candidate that is an anchor has no error
    spreads = np.sqrt(np.maximum(squares - error**2, 0.0) / max(n - 1, 1)) + least
    return foretold, seen.signals - error, math.sqrt(squares / n) + least, spreads


def _placed(foretold: Array, seen: Seen, correction: float) -> Array:
    """Put what was measured in its places, and spread the correction over all others: (N,)."""
    values, others = foretold.copy(), np.ones(len(foretold), dtype=bool)
    others[seen.places] = False
    values[others] += correction / max(int(others.sum()), 1)
    values[seen.places] = seen.values
    return values


def _direction(apart: Array) -> Array:
    """Scale to length 1; where nothing differs, all are alike: (n,)."""
    length = math.sqrt(float((apart**2).sum()))
    return apart / length if length > 0 else np.full(len(apart), 1 / math.sqrt(len(apart)))


def _normal_cdf(x: Array) -> Array:
    return np.array([0.5 * math.erfc(-value) for value in (x / math.sqrt(2)).tolist()])
