"""What each family of points adds to what a study covers: those derived, those learned, those searched.

Each set of points has its front by the search items; the items that judge say what that front covers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from evals.objectives import INTERVAL, Draws
from optimizer.runs.front import hypervolumes, losses, on_front
from optimizer.runs.trial import NO_ANCHORS, Role

Array = NDArray[np.float64]

PREPARED = (Role.DERIVED, Role.LEARNED)  # those whose recipes a worker makes
SETS = {
    "anchors": (),
    "+ derived": (Role.DERIVED,),
    "+ learned": (Role.LEARNED,),
    "+ searched": (Role.SEARCHED,),
    "all": (*PREPARED, *NO_ANCHORS),
}  # what is added to the anchors of a space: base, experts, lines
COLUMNS = ("set", "points", "hypervolume", "share", "low", "high")
FEW = 200  # resamplings that are enough where many objectives make each one dear


def fronts_by_set(minimised: pd.DataFrame, roles: pd.Series[Any], fitted: Collection[int] = ()) -> dict[str, list[int]]:
    """Give the trials of each set that none other of the set beats; that of "all" is the front that a run reports.

    Args:
        minimised: the objectives of every point by the search items, all minimised.
        roles: of the same trials.
        fitted: the trials whose weights were fitted to these items, which beat only one another (`on_front`).

    Returns:
        Without the sets whose own points are not there; "all" is there always.
    """
    named = set(SETS["all"])
    fronts = {}
    for name, added in SETS.items():
        if name in ("anchors", "all") or (roles == added[0]).any():
            chosen = minimised[[role not in named or role in added for role in roles]]
            mask = on_front(chosen.to_numpy(), chosen.index.isin([*fitted]))
            fronts[name] = [int(trial) for trial in chosen.index[mask]]
    return fronts


def without_prepared(fronts: Mapping[str, Sequence[int]]) -> str:
    """Give the set that all others are measured by: what there is without derived and learned points."""
    return "+ searched" if "+ searched" in fronts else "anchors"


def what_sets_cover(
    draws: Draws, fronts: Mapping[str, Sequence[int]], *, names: Sequence[str], corner: Sequence[float]
) -> pd.DataFrame:
    """Give what the front of each set covers, and how much more that is than without derived and learned points.

    Args:
        draws: of the items that judge; of every trial that is on a front.
        fronts: `fronts_by_set`.
        names: of the objectives, forgetting last.
        corner: the hypervolume's reference point, all minimised.

    Returns:
        set, points (on its front), hypervolume, share (what it has more than the set without derived and learned
        points, as a share of that one's), and the share's 95 % interval low, high: paired, over resampled items. NaN
        where that set covers nothing; infinite where it does in a fortieth of the resamplings.
    """
    covered = {name: _covered(draws, trials, names=names, corner=corner) for name, trials in fronts.items()}
    at, samples = covered[without_prepared(fronts)]
    rows = []
    for name, (value, resampled) in covered.items():
        share = low = high = np.nan
        if at > 0:
            share = (value - at) / at
            low, high = np.quantile(_more(resampled, samples), INTERVAL, method="inverted_cdf")  # between no infinities
        rows.append((name, len(fronts[name]), value, share, low, high))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _covered(
    draws: Draws, trials: Sequence[int], *, names: Sequence[str], corner: Sequence[float]
) -> tuple[float, Array]:
    """Give the hypervolume of some trials, of the items as they are and of each resampling (B,)."""
    columns = [draws.column(trial) for trial in trials]
    few = slice(FEW if len(names) > 3 else None)
    points = losses(np.stack([draws.points[name][columns] for name in names], axis=-1))  # (k, m)
    samples = losses(np.stack([draws.samples[name][few][:, columns] for name in names], axis=-1))  # (B, k, m)
    return float(hypervolumes(points[None], corner)[0]), hypervolumes(samples, corner)


def _more(values: Array, others: Array) -> Array:
    """Give how much more values are than others, as shares of these: of nothing, infinitely more or none.

    Where few items tell what the expert won, a resampling in a thousand has the others cover nothing.
    """
    of_nothing = np.where(values > 0, np.inf, 0.0)
    return np.divide(values - others, others, out=of_nothing, where=others > 0)
