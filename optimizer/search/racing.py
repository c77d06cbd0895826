"""Racing: after each block of items a candidate that is beaten stops, and one that is near the front gets more.

The blocks are the same for all candidates. Optuna cannot prune where there are several objectives, so this is ours.
"""

from __future__ import annotations

from enum import Enum

import numpy as np

from evals.objectives import Scale, draw_objectives, objective_names
from optimizer.runs.front import losses, non_dominated
from optimizer.runs.posterior import front_chances
from optimizer.search.ledger import Ledger
from optimizer.search.scale import beside

BEATEN = 0.05  # a chance of being on the front below which a candidate stops
REPLICATES = 200


class Verdict(Enum):
    """What becomes of a trial after a block."""

    STOPS = "stops"  # it is beaten
    ENDS = "ends"  # it is known well enough, or the bank is used up
    GOES_ON = "goes on"  # it is scored on another block


def verdict_of(trial: int, scale: Scale, ledger: Ledger) -> Verdict:
    """Say what becomes of a trial whose outcomes of one block or more are in the run folder."""
    front = [number for number in sorted(ledger.front()) if number != trial and not ledger.outcomes_lost(number)]
    draws = draw_objectives(beside((*front, trial), scale, ledger), replicates=REPLICATES)
    names = objective_names(list(scale.experts))
    columns = [draws.column(number) for number in (*front, trial)]
    samples = losses(np.stack([draws.samples[name][:, columns] for name in names], axis=-1))  # (B, F + 1, m)
    points = losses(np.stack([draws.points[name][columns] for name in names], axis=-1))
    return verdict(samples, points, is_used_up=ledger.has_whole_bank(trial))


def verdict(samples: np.ndarray, points: np.ndarray, *, is_used_up: bool) -> Verdict:
    """Say what becomes of the last of some points, the others being the front.

    It goes on until the error of its difference to the nearest of them is less than their distance, both in shares of
    the front's extent.

    Args:
        samples: (B, T, m) resampled objectives, minimised.
        points: (T, m) as measured.
        is_used_up: whether there is no more item to score it on.
    """
    if front_chances(samples)[-1] < BEATEN and not non_dominated(points)[-1]:
        return Verdict.STOPS
    if is_used_up or len(points) < 2:
        return Verdict.ENDS
    extent = np.maximum(np.ptp(points, axis=0), 1e-9)
    distances = np.linalg.norm((points[:-1] - points[-1]) / extent, axis=1)
    errors = (samples[:, -1] - samples[:, :-1].transpose(1, 0, 2)).std(axis=1) / extent  # (T - 1, m), paired
    nearest = int(np.argmin(distances))
    return Verdict.ENDS if np.linalg.norm(errors[nearest]) < distances[nearest] else Verdict.GOES_ON
