"""The scale of a search: what every trial is measured by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pandas as pd

from evals.errors import TaskError
from evals.objectives import Scale, draw_objectives, objective_names
from evals.outcomes import SEARCH
from evals.task_rows import joined, rows_by_task
from optimizer.errors import SearchError
from optimizer.runs.trial import BASE
from optimizer.search.ledger import Ledger
from optimizer.search.measured import Measured


def objectives_of(trial: int, scale: Scale, ledger: Ledger) -> tuple[float, ...]:
    """Return a trial's objectives, in the study's order; its outcomes are in the run folder, or it is in the scale."""
    return measured_of(trial, scale, ledger).values


def measured_of(trial: int, scale: Scale, ledger: Ledger, *, replicates: int = 0) -> Measured:
    """Measure a trial; its outcomes are in the run folder, or it is in the scale.

    Args:
        replicates: resamplings of the items, for standard errors; 0 gives none.
    """
    drawn = draw_objectives(beside([trial], scale, ledger), replicates=replicates)
    place, names = drawn.column(trial), objective_names(list(scale.experts))
    return Measured(
        tuple(float(drawn.points[name][place]) for name in names),
        {task: float(shares[place]) for task, shares in drawn.by_task.items()},
        tuple(float(drawn.samples[name][:, place].std()) for name in names) if replicates else (),
    )


def beside(trials: Iterable[int], scale: Scale, ledger: Ledger) -> Scale:
    """Give a scale for making objectives of some trials: its arrays have theirs too, its outcomes have not."""
    assert scale.arrays is not None
    known = _trials_in(scale)
    parts = [ledger.rows_of(trial) for trial in trials if trial not in known]
    arrays = {
        task: joined([rows, *(part[task] for part in parts if task in part)]) for task, rows in scale.arrays.items()
    }
    return replace(scale, arrays=arrays)


def with_anchor(trial: int, scale: Scale, ledger: Ledger) -> Scale:
    """Give a scale that has a trial's outcomes too: with a bank, those of every anchor tell what others would score."""
    if trial in _trials_in(scale):
        return scale
    own = ledger.run.read_outcomes(trial, SEARCH)
    return replace(beside([trial], scale, ledger), outcomes=pd.concat([scale.outcomes, own], ignore_index=True))


def _trials_in(scale: Scale) -> set[int]:
    assert scale.arrays is not None
    return set(np.unique(next(iter(scale.arrays.values())).trials).tolist())


def find_scale(ledger: Ledger) -> Scale:
    """Give the scale, once the base and every expert are scored; with a bank, with the anchors that are finished.

    Raises:
        SearchError: the tasks cannot tell the base from an expert, or from chance.
    """
    trials = ledger.references
    finished = ledger.finished_anchors() - set(ledger.owed) if ledger.has_bank else set()
    numbers = dict.fromkeys([*trials.values(), *sorted(finished)])
    outcomes = pd.concat([ledger.run.read_outcomes(n, SEARCH) for n in numbers], ignore_index=True)
    experts = {kind.expert_name: trials[kind] for kind in ledger.reference_kinds if kind != BASE}
    arrays = rows_by_task(outcomes, is_bank=ledger.has_bank)
    scale = Scale(outcomes, ledger.tasks, SEARCH, trials[BASE], experts, arrays)
    try:
        objectives_of(scale.base, scale, ledger)
    except TaskError as error:
        raise SearchError(f"these tasks cannot carry a search: {error}") from error
    return scale


def values_now(ledger: Ledger) -> dict[int, tuple[float, ...]]:
    """Give the objectives of every finished trial as a reader of the run finds them: with a bank, estimated again from
    all anchors that are there now; without one, or where outcomes are lost, as they were told."""
    if not (ledger.has_bank and ledger.has_references):
        return ledger.values
    scale = find_scale(ledger)
    others = sorted(ledger.values.keys() - set(ledger.owed) - set(scale.outcomes["trial"]))
    measured = draw_objectives(beside(others, scale, ledger), replicates=0)
    names = objective_names(list(scale.experts))
    found = {
        int(number): tuple(float(measured.points[name][place]) for name in names)
        for place, number in enumerate(measured.trials)
    }
    return {number: found.get(number, told) for number, told in ledger.values.items()}
