"""Which items of a bank candidates are scored on: drawn once, from what base and experts answered."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from evals.bank import draw_order, inclusion_of
from evals.score_table import margins_of


def draw_items(rows: pd.DataFrame, task: str, *, items: int, seed: int) -> Mapping[str, float]:
    """Draw items of a task's bank, more often where those that were scored on all of it differ.

    Args:
        rows: outcomes of base and experts on the whole bank.
        task: whose items.
        items: how many.
        seed: of the draw; the same rows and seed give the same items.

    Returns:
        The items' hashes in the order they were drawn, each with the probability with which it was.
    """
    rows = rows[rows["task"] == task]
    margins = margins_of(rows)
    signals = rows.assign(signal=rows["value"] if margins is None else margins)
    anchors = signals.pivot(index="item", columns="trial", values="signal").sort_index()
    order, strata = draw_order(anchors.to_numpy(np.float64), are_margins=margins is not None, seed=seed, task=task)
    places = order[:items]
    return dict(zip(anchors.index[places], inclusion_of(strata, places).tolist(), strict=True))
