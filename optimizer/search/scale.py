"""The scale of a search: what every trial is measured by."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd

from evals.errors import TaskError
from evals.objectives import Scale, draw_objectives, objective_names
from evals.outcomes import SEARCH
from optimizer.errors import SearchError
from optimizer.runs.trial import BASE
from optimizer.search.ledger import Ledger


def objectives_of(trial: int, scale: Scale, ledger: Ledger) -> tuple[float, ...]:
    """Return a trial's objectives, in the study's order; its outcomes are in the run folder, or it is a reference."""
    if trial not in (scale.base, *scale.experts.values()):
        own = ledger.run.read_outcomes(trial, SEARCH)
        scale = replace(scale, outcomes=pd.concat([scale.outcomes, own], ignore_index=True))
    measured = draw_objectives(scale, replicates=0)
    place = measured.column(trial)
    return tuple(float(measured.points[name][place]) for name in objective_names(list(scale.experts)))


def find_scale(ledger: Ledger) -> Scale:
    """Give the scale, once the base and every expert are scored.

    Raises:
        SearchError: the tasks cannot tell the base from an expert, or from chance.
    """
    trials = ledger.references
    outcomes = pd.concat([ledger.run.read_outcomes(n, SEARCH) for n in trials.values()], ignore_index=True)
    experts = {kind.expert_name: trials[kind] for kind in ledger.reference_kinds if kind != BASE}
    scale = Scale(outcomes, ledger.tasks, SEARCH, trials[BASE], experts)
    try:
        objectives_of(scale.base, scale, ledger)
    except TaskError as error:
        raise SearchError(f"these tasks cannot carry a search: {error}") from error
    return scale
