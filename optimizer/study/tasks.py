"""What a study asks of each of its tasks."""

from __future__ import annotations

from typing import Literal

from evals.outcomes import REST, SENTINEL, SPARE, TaskSpec
from optimizer.study.schema import Study


def task_specs(study: Study) -> tuple[TaskSpec, ...]:
    """Return what the study asks of each task: domain tasks, general ones, sentinels."""
    evals = study.evals
    return tuple(
        TaskSpec(
            name=entry.source,
            role=role,
            expert=entry.expert,
            search_items=0 if role == SENTINEL else evals.items if entry.items is None else entry.items,
            holdout_items=_items(evals.holdout_items if entry.holdout_items is None else entry.holdout_items),
            certify_items=0
            if role == SENTINEL
            else _kept(evals.certify_items if entry.certify_items is None else entry.certify_items),
            shots=entry.shots,
            metric=entry.metric,
            group_by=entry.group_by,
            judge=entry.judge,
            bank_items=0 if role == SENTINEL else (evals.bank if entry.bank is None else entry.bank) or 0,
            kind=entry.kind,
            weight=entry.weight,
        )
        for role, entries in evals.roles.items()
        for entry in entries
    )


def _kept(given: int | float | Literal["spare"]) -> int | float:
    return SPARE if given == "spare" else given


def _items(given: int | float | Literal["rest"]) -> int | float:
    return REST if given == "rest" else given
