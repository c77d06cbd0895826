"""The scale of a search: what every trial is measured by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from evals.errors import TaskError
from evals.objectives import carries, draw_objectives, objective_names
from evals.outcomes import SEARCH, TaskInfo
from optimizer.errors import SearchError
from optimizer.runs.trial import BASE
from optimizer.search.ledger import Ledger


@dataclass(frozen=True, slots=True)
class Scale:
    """What every trial is measured by: the outcomes of the base and the experts on the search suite."""

    tasks: Sequence[TaskInfo]
    base: int
    experts: Mapping[str, int]
    outcomes: pd.DataFrame

    def objectives(self, trial: int, ledger: Ledger) -> tuple[float, ...]:
        """A trial's objectives, in the study's order; its outcomes are in the run folder, or it is a reference."""
        frame = self.outcomes
        if trial not in (self.base, *self.experts.values()):
            frame = pd.concat([frame, ledger.run.read_outcomes(trial, SEARCH)], ignore_index=True)
        measured = draw_objectives(
            frame, tasks=self.tasks, suite=SEARCH, base=self.base, experts=self.experts, replicates=0
        )
        place = measured.column(trial)
        return tuple(float(measured.points[name][place]) for name in objective_names(list(self.experts)))

    def findings(self) -> list[str]:
        """What these tasks cannot show, in words."""
        return carries(self.outcomes, tasks=self.tasks, suite=SEARCH, base=self.base, experts=self.experts)


def find_scale(ledger: Ledger) -> Scale:
    """Give the scale, once the base and every expert are scored.

    Raises:
        SearchError: the tasks cannot tell the base from an expert, or from chance.
    """
    trials = ledger.references
    outcomes = pd.concat([ledger.run.read_outcomes(n, SEARCH) for n in trials.values()], ignore_index=True)
    experts = {kind.expert_name: trials[kind] for kind in ledger.reference_kinds if kind != BASE}
    scale = Scale(ledger.tasks, trials[BASE], experts, outcomes)
    try:
        scale.objectives(scale.base, ledger)
    except TaskError as error:
        raise SearchError(f"these tasks cannot carry a search: {error}") from error
    return scale
