"""What a run's figures mean where that is no matter of course: distances to the base, in words."""

from __future__ import annotations

from evals.objectives import task_scores
from evals.outcomes import HOLDOUT, SEARCH, SENTINEL
from optimizer.runs.scored import ScoredRun
from optimizer.words import one_line, percent

EXAMPLE = 0.05


def measures(run: ScoredRun) -> list[str]:
    """Say of each task that measures the distance to the base what its figures are: a sentence each."""
    return [
        sentence
        for task in run.tasks
        if task.is_to_base
        for sentence in _distance(run, task.name, HOLDOUT if task.role == SENTINEL else SEARCH)
    ]


def _distance(run: ScoredRun, task: str, suite: str) -> list[str]:
    outcomes = run.outcomes(suite)
    base = run.references and outcomes[(outcomes["trial"] == run.references[0]) & (outcomes["task"] == task)]
    if base is None or base.empty:
        return []
    entropy = float(task_scores(base, suite)["score"].iloc[0])
    return [
        f"{one_line(task)} measures how far a merge's predictions lie from the base's, KL(base || merge); forgetting "
        f"there is its share of the base's own entropy, {entropy:.2f} bits a token, so that {percent(EXAMPLE)} are "
        f"{EXAMPLE * entropy:.3f} bits. It counts any change, also one for the better."
    ]
