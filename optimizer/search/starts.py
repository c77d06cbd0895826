"""Where a lesson begins: at the anchor whose outcomes lose least for its preference.

Scores of few items cannot tell anchors that lie a few points apart, but losses can: the right start matters more to
what is learned than the preference does, and which form of derived expert has it differs from one pair of models to
another.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from evals.item_losses import mean_losses
from evals.outcomes import SEARCH
from optimizer.runs.trial import Role
from optimizer.search.ledger import Ledger
from optimizer.workers.weighing import counts, scale


def best_start(trials: Iterable[int], preference: Mapping[str, float], ledger: Ledger) -> int:
    """Give the trial that loses least, in shares of what lies between base and expert; the first of equals.

    Args:
        trials: scored ones.
        preference: of each expert's domain; the general tasks have what is left of 1.
    """

    def losses(trial: int) -> dict[str, float]:
        return mean_losses(ledger.run.read_outcomes(trial, SEARCH), ledger.tasks)

    experts = {kind.expert_name: losses(n) for kind, n in ledger.references.items() if kind.role is Role.EXPERT}
    base = next(losses(n) for kind, n in ledger.references.items() if kind.role is Role.BASE)
    factors: dict[str, float] = {}
    for task, name, share in counts(preference, ledger.tasks):
        between = base[task] - experts[name][task] if name else max(e[task] for e in experts.values()) - base[task]
        factors[task] = factors.get(task, 0.0) + share / scale(between, base[task])

    def loss(trial: int) -> float:
        found = losses(trial)
        return math.fsum(factor * found[task] for task, factor in factors.items())

    return min(trials, key=lambda trial: (loss(trial), trial))
