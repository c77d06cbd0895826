"""Tasks that cannot carry a search: no gain, no ability of the base or no loss can be told from chance."""

from __future__ import annotations

from collections.abc import Mapping

from evals.objectives import Scale, experts_of, told_scores, turned
from evals.outcomes import TaskInfo
from evals.score_table import Table, table_of


def weak_tasks(scale: Scale) -> list[str]:
    """Say why some tasks cannot carry the search, in plain words; empty when all can.

    Two standard errors (paired over items) decide: a domain task must show the expert above the base; a general task
    must show the base above chance, and some expert below the base.
    """
    findings, rows = [], scale.rows
    for task in scale.measured_by:
        table = table_of(rows, task.name)
        why = _no_gain if task.role == "domain" else _no_loss
        findings += why(task, table, scale.base, scale.experts)
    return findings


def _no_gain(task: TaskInfo, table: Table, base: int, experts: Mapping[str, int]) -> list[str]:
    scores = turned(task, table.scores)
    findings = []
    for name in experts_of(task, experts):
        gain = scores[table.column(experts[name])] - scores[table.column(base)]
        error = table.stderr_of_difference(experts[name], base)
        if not gain > 2 * error:
            findings.append(
                f"domain task {task.name}: expert {name} does not beat the base by two standard errors "
                f"({_pair(task, table, base, experts[name], name)}, difference ± {error:.3g}); "
                "use more items, or a task nearer to what the expert learned"
            )
    return findings


def _no_loss(task: TaskInfo, table: Table, base: int, experts: Mapping[str, int]) -> list[str]:
    scores = turned(task, table.scores)
    at_base = scores[table.column(base)]
    error = float(table.stderr()[table.column(base)])
    margin = at_base - task.chance if task.chance else abs(at_base)
    if not margin > 2 * error:
        return [
            f"general task {task.name}: the base is at chance ({task.metric} {abs(at_base):.3f} ± {error:.3g}, "
            f"chance {task.chance:.3g}), so it cannot show forgetting; use an easier task"
        ]
    lost = {name: at_base - scores[table.column(trial)] for name, trial in experts.items()}
    if any(loss > 2 * table.stderr_of_difference(experts[name], base) for name, loss in lost.items()):
        return []
    pairs = "; ".join(_pair(task, table, base, trial, name) for name, trial in experts.items())
    return [
        f"general task {task.name}: no expert is below the base by two standard errors ({pairs}); "
        "there is little forgetting to avoid, or too few items to see it"
    ]


def _pair(task: TaskInfo, table: Table, base: int, trial: int, name: str) -> str:
    scores = told_scores(task, table, base)
    return f"{task.metric}: base {scores[table.column(base)]:.3f}, {name} {scores[table.column(trial)]:.3f}"
