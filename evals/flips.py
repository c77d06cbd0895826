"""What changed between the base and a merge, answer by answer: equal accuracy can hide that many were exchanged."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from evals.objectives import Scale
from evals.outcomes import ACCURACIES
from evals.score_table import table_of

COLUMNS = ("task", "role", "items", "lost", "won", "flip_rate", "lost_knowledge", "p")


def flips(scale: Scale, trial: int) -> pd.DataFrame:
    """Count what a trial lost (right to wrong) and won (wrong to right) against the base, on tasks of right and wrong.

    Returns:
        task, role, items, lost, won, flip_rate (both, a share of the items), lost_knowledge (lost less won, a share of
        the items, over 1 - chance: two models that guess k-way lose and win alike where neither knows, and each item
        that is no longer known is still guessed right 1 time in k), and p (McNemar's exact test, two-sided: how often
        so uneven a split comes of flips that fall either way; of passages that
        lost or won more, where items share one). Sentinel tasks among them. Without tasks of which the
        trial was scored on some items alone: those drawn from a bank are the unsure ones, and flip more often.
    """
    rows = []
    for task in scale.tasks:
        found = scale.rows[scale.rows["task"] == task.name]
        counts = found["trial"].value_counts()
        if task.metric not in ACCURACIES or found.empty or counts.get(trial, 0) < counts.max():
            continue
        table = table_of(found, task.name)
        base, merge = (table.values[:, table.column(number)] for number in (scale.base, trial))
        lost, won = int((merge < base).sum()), int((merge > base).sum())
        net = table.by_cluster(np.sign(merge - base))  # by passage, where items share one
        items = len(base)
        known = (lost - won) / items / (1 - task.chance) if task.chance < 1 else math.nan
        p = mcnemar(int((net < 0).sum()), int((net > 0).sum()))
        rows.append((task.name, task.role, items, lost, won, (lost + won) / items, known, p))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def flipped_items(scale: Scale, trial: int) -> pd.DataFrame:
    """List the items that a trial lost or won against the base: task, item, and change ("lost" or "won")."""
    rows = []
    for task in (task for task in scale.tasks if task.metric in ACCURACIES):
        found = scale.rows[scale.rows["task"] == task.name]
        values = found.pivot(index="item", columns="trial", values="value")
        step = (values[trial] - values[scale.base]).dropna()  # a trial may have some items of a bank
        rows += [
            (task.name, item, "won" if way > 0 else "lost") for item, way in zip(step.index, step, strict=True) if way
        ]
    return pd.DataFrame(rows, columns=["task", "item", "change"])


def mcnemar(lost: int, won: int) -> float:
    """Compute the exact two-sided p of McNemar's test: twice the smaller tail of fair coins, at most 1.

    Source: McNemar, "Note on the sampling error of the difference between correlated proportions", 1947.
    """
    number, few = lost + won, min(lost, won)
    logs = [
        math.lgamma(number + 1) - math.lgamma(k + 1) - math.lgamma(number - k + 1) - number * math.log(2)
        for k in range(few + 1)
    ]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))
