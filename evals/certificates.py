"""Is the mean of a loss at most zero? Told by betting on it, with an error that holds whenever one stops looking.

A person names a limit x on forgetting and the error delta. For an item, the loss is what the candidate lost of the
base's value, less x of what the base could do beyond chance: linear, so that a mean of at most 0 says that forgetting
is at most x. The null is a mean above 0; capital is bet against it, and once 1 in delta is exceeded the limit is
certified. Numpy only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

DELTA = 0.1  # the error of a certificate, unless a person names another
BUDGET = 0.2  # the error that all certificates of a run may share
BOLDEST = 0.75  # of the largest bet that cannot lose all
LUCK, EARLIEST = 2.5, 20  # standard errors and rounds: when a test is hopeless, what is left of the items is saved
CHANGED, ABILITY = 0.06, 0.5  # what power is told for: answers that differ from the base's, and the base above chance


@dataclass(frozen=True, slots=True)
class Part:
    """One task's share in a hypothesis: the loss of an item, linear in its outcomes.

    An item's loss is base * v(base) + candidate * v(candidate) + the sum of experts[e] * v(e) + constant * w, where v
    is the value a model has on the item and w the item's weight; a loss above `most` counts as `most`.

    Args:
        items: how many there are to test on.
        most: the largest loss. For accuracies no loss is larger; for others it is a bound that the certificate states.
        is_bounded: whether it is such a stated bound.
        sizes: how many items share each passage, in the order they are bet on; empty where each stands for itself.
    """

    task: str
    items: int
    base: float
    candidate: float
    experts: Mapping[str, float]
    constant: float
    most: float
    is_bounded: bool
    sizes: tuple[int, ...] = ()

    @property
    def units(self) -> int:
        """How many there are to bet on: passages, or items that share none."""
        return len(self.sizes) or self.items

    @property
    def unit_most(self) -> float:
        """The largest loss of a unit."""
        return self.most * max(self.sizes) / self._mean_size if self.sizes else self.most

    @property
    def _mean_size(self) -> float:
        return self.items / self.units

    def items_of(self, units: int) -> int:
        """Count the items of the first so many units."""
        return sum(self.sizes[:units]) if self.sizes else units

    def unit_losses(self, losses: Array) -> Array:
        """Add up the losses of items by unit, over the mean size of one: so their mean is that of the items' losses.

        Args:
            losses: of the first items in their order.

        Returns:
            Of each unit of which all items are there.
        """
        if not self.sizes:
            return losses
        ends = np.cumsum(self.sizes)
        whole = ends[: int((ends <= len(losses)).sum())]
        return np.diff(np.concatenate([[0.0], np.cumsum(losses)])[np.concatenate([[0], whole])]) / self._mean_size

    def losses(self, values: Mapping[str, Array], weights: Array) -> tuple[Array, int]:
        """Compute the losses of n items, and how many of them were above `most`.

        Args:
            values: (n,) each, of "base", "candidate" and the experts.
            weights: (n,).
        """
        loss = self.base * values["base"] + self.candidate * values["candidate"] + self.constant * weights
        loss = loss + sum(factor * values[name] for name, factor in self.experts.items())
        return np.minimum(loss, self.most), int((loss > self.most + 1e-12).sum())


@dataclass(frozen=True, slots=True)
class Start:
    """What is bet on before the first round: so many rounds of this mean and this mean square, as if seen.

    Args:
        measured: the mean on the items that are known; no bet depends on it.
    """

    mean: float
    square: float
    rounds: float
    measured: float = 0.0


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """What is to be shown: the parts' mean losses, added up, are at most 0.

    Args:
        name: what is limited, for a person.
        limit: a share: 0.05 is 5 %.
    """

    name: str
    limit: float
    parts: tuple[Part, ...]
    start: Start

    @property
    def most(self) -> float:
        """The largest loss of a round."""
        return sum(part.unit_most for part in self.parts)

    @property
    def rounds(self) -> int:
        """How many rounds there are: in each, every task gives at least one item, or one passage with all its items."""
        return min(part.units for part in self.parts)

    def round_losses(self, losses: Mapping[str, Array]) -> Array:
        """Compute the loss of each round of which all items are there: the sum of the tasks' means in it.

        A task that has more items (or passages) than there are rounds gives several to each; which, is fixed by their
        number. So the mean of every round is the sum of the tasks' means, whatever was seen before.

        Args:
            losses: of each part's first items in their order, by task.
        """
        total, found = np.zeros(self.rounds), self.rounds
        for part in self.parts:
            units = part.unit_losses(losses[part.task])
            ends = np.arange(1, self.rounds + 1) * part.units // self.rounds
            whole = int((ends <= len(units)).sum())
            sums = np.concatenate([[0.0], np.cumsum(units)])[np.concatenate([[0], ends[:whole]])]
            sizes = np.diff(np.concatenate([[0], ends[:whole]]))
            total[:whole] += np.diff(sums) / sizes
            found = min(found, whole)
        return total[:found]


@dataclass(frozen=True, slots=True)
class Game:
    """The bets of R rounds, and the capital after each: (S, R) for S games at once."""

    bets: Array
    capital: Array


def play(losses: ArrayLike, *, most: float, start: Start) -> Game:
    """Bet against a mean loss above 0, each bet from the rounds before it.

    The capital after a round is that before it times 1 - bet * loss. Were the mean above 0, it could only shrink on
    average, so that it ever exceeds 1 / delta with a probability of at most delta (Ville). The bet is the one that
    would have made it grow fastest, to second order, on the rounds so far and those of `start`.

    Args:
        losses: (R,), or (S, R) of S games.
        most: the largest loss there can be.

    Source: Waudby-Smith & Ramdas, "Estimating means of bounded random variables by betting" (2010.09686): capital
    process (eq. 20), one side; bets approximately GRAPA (appendix B.3), cut at `BOLDEST` / most.
    """
    rows = np.atleast_2d(np.asarray(losses, dtype=float))
    bets, capital = np.empty_like(rows), np.empty_like(rows)
    seen = np.full(len(rows), float(start.rounds))
    total, squares, logs = seen * start.mean, seen * start.square, np.zeros(len(rows))
    for r in range(rows.shape[1]):
        bets[:, r] = np.clip(-total / np.maximum(squares, 1e-300), 0.0, BOLDEST / most)
        logs = logs + np.log1p(-bets[:, r] * rows[:, r])
        capital[:, r] = np.exp(np.minimum(logs, 700.0))
        total, squares, seen = total + rows[:, r], squares + rows[:, r] ** 2, seen + 1
    return Game(bets, capital)


def verdicts(
    losses: ArrayLike, capital: ArrayLike, delta: float, *, rounds: int, most: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tell how each of S games ends, and after how many rounds.

    A game is hopeless when the rounds that are left would not do even if the mean were `LUCK` standard errors below
    what was seen, from `EARLIEST` rounds on. To stop early is no error, since nothing is then certified.

    Args:
        losses, capital: (S, R), of the rounds that were played.
        rounds: how many there are in all.
        most: as of `play`.

    Returns:
        (S,) 1 where the limit is certified, -1 where it is hopeless, 0 where neither; (S,) rounds.
    """
    seen, rows = (np.atleast_2d(np.asarray(values, dtype=float)) for values in (losses, capital))
    number = np.arange(1, rows.shape[1] + 1)
    mean = np.cumsum(seen, axis=1) / number
    variance = np.maximum(np.cumsum(seen**2, axis=1) / number - mean**2, 1e-12)
    below = np.maximum(0.0, LUCK * np.sqrt(variance / number) - mean)
    gain = (rounds - number) / np.maximum(rounds_needed(np.maximum(below, 1e-12), variance, math.exp(-1), most), 1e-12)
    is_up = rows >= 1 / delta
    is_down = (np.log(np.maximum(rows, 1e-300)) + gain < math.log(1 / delta)) & (number >= EARLIEST)
    up, down = (_first(hits) for hits in (is_up, is_down & ~is_up))
    won = np.where(up < down, 1, np.where(down < up, -1, 0))
    return won, np.minimum(np.minimum(up, down) + 1, rows.shape[1])


def _first(hits: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Find the first hit of each row (S, R); R where there is none."""
    return np.where(hits.any(axis=1), hits.argmax(axis=1), hits.shape[1])


def start_of(aim: float, variance: float, delta: float, *, measured: float = 0.0) -> Start:
    """Make what is bet on at first, from how far below 0 the mean is hoped to be.

    It counts as half of the rounds that would be needed, were the mean twice the aim (`rounds_needed`).

    Args:
        aim: above 0.
        variance: of a round's loss.
        measured: as of `Start`.
    """
    rounds = max(5.0, rounds_needed(2 * aim, variance, delta) / 2)
    return Start(-aim, variance + aim**2, rounds, measured)


def rounds_needed(below: Any, variance: Any, delta: float, most: float = 0.0) -> Any:
    """Estimate how many rounds it takes, at even odds, until a mean so far below 0 is certified.

    The best bet gains below² / (2 variance) of log capital in a round, to second order, and no bet more than the
    boldest on a round of that mean.

    Args:
        below: above 0; a number or an array, as is the variance.
        most: as of `play`; 0: however large bets may be.
    """
    gain = below**2 / (2 * variance)
    if most:
        gain = np.minimum(gain, np.log1p(BOLDEST * below / most))
    return math.log(1 / delta) / gain


def smallest_limit(items: Mapping[str, int], delta: float) -> float:
    """Estimate the smallest limit on forgetting that so many items of each task can certify, for a merge that forgets
    nothing, answers `CHANGED` of the items otherwise than the base, and a base `ABILITY` above chance."""
    variance = sum(1 / number for number in items.values()) / len(items) ** 2
    return math.sqrt(rounds_needed(1.0, variance * CHANGED / ABILITY**2, delta))


def items_for(limit: float, tasks: int, delta: float) -> int:
    """Estimate how many items of each of so many tasks a limit on forgetting needs; assumptions as `smallest_limit`."""
    return math.ceil(rounds_needed(limit, CHANGED / ABILITY**2 / tasks, delta))
