"""Does a search pay: one trial against a line of anchors, at the same forgetting and on the same items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from evals.objectives import objectives
from evals.outcomes import TaskInfo
from optimizer.frames import Row, rows_of


def mixture_at(forgetting: NDArray[np.float64], target: float) -> dict[int, float] | None:
    """Where a line of points reaches a target: two positions and their shares, or None beyond its ends.

    Args:
        forgetting: (k,) along the line, rising.
    """
    if len(forgetting) < 2 or not forgetting[0] <= target <= forgetting[-1]:
        return None
    right = int(np.clip(np.searchsorted(forgetting, target), 1, len(forgetting) - 1))
    width = forgetting[right] - forgetting[right - 1]
    share = float((target - forgetting[right - 1]) / width) if width > 0 else 0.5
    return {right - 1: 1 - share, right: share}


def difference(
    outcomes: pd.DataFrame,
    trial: int,
    mixture: Mapping[int, float],
    *,
    tasks: Sequence[TaskInfo],
    suite: str,
    base: int,
    experts: Mapping[str, int],
) -> Row:
    """The objectives of a trial less those of a mixture of trials, with intervals that are paired by item.

    Gains and losses are linear in an item's values. So a made-up trial, whose values are the base's plus the trial's
    less the mixture's, has these differences as its objectives, and `objectives` gives their intervals.

    Args:
        outcomes: of one suite; columns `trial` and those of `Outcome`.
        mixture: trial number to share; the shares sum to 1.

    Returns:
        What `objectives` says of the made-up trial: `domain`, `domain_low`, `domain_high`, …
    """
    needed = outcomes[outcomes["trial"].isin({trial, base, *experts.values(), *mixture})]
    values = needed.pivot(index=["task", "item"], columns="trial", values="value")
    mixed = sum((share * values[stop] for stop, share in mixture.items()), start=0.0 * values[base])
    gap = needed[needed["trial"] == base].set_index(["task", "item"])
    number = int(outcomes["trial"].max()) + 1
    gap = gap.assign(trial=number, value=values[base] + values[trial] - mixed).reset_index()
    ends = needed[needed["trial"].isin([base, *experts.values()])]
    made_up = pd.concat([ends, gap], ignore_index=True)
    return rows_of(objectives(made_up, tasks=tasks, suite=suite, base=base, experts=experts))[number]
