"""What guards of written answers say of a trial, in words for a person."""

from __future__ import annotations

from evals.guards import CUT, EMPTY, LANGUAGE, LONGER, LOOPING, SHORTER
from optimizer.runs.frames import Row, rows_of
from optimizer.runs.measured import MeasuredRun
from optimizer.words import one_line, percent

WHAT = {
    CUT: "are broken off at the limit of tokens",
    EMPTY: "are empty",
    LOOPING: "repeat themselves",
    LANGUAGE: "are in another language or script than the base's",
    LONGER: "are more than twice as long as the base's",
    SHORTER: "are less than half as long as the base's",
}


def flags_of(run: MeasuredRun, trial: int) -> list[str]:
    """Say what each guard that flags a trial found: a clause with the share of its answers and of the base's."""
    rows = rows_of(run.guards(trial)).values()
    return [_clause(row) for row in rows if row["is_flagged"]]


def _clause(row: Row) -> str:
    before = "" if row["guard"] in (LONGER, SHORTER) else f" (of the base's {percent(row['base_share'])})"
    return f"{percent(row['share'])} of its answers on {one_line(row['task'])} {WHAT[row['guard']]}{before}"


def guard_sentence(run: MeasuredRun, trial: int) -> str:
    """Say what is wrong with a trial's written answers, and what that means; empty where no guard flags it."""
    flags = flags_of(run, trial)
    if not flags:
        return ""
    what = f"Written answers of trial {trial}: {'; '.join(flags)}"
    if when := run.accepted.get(trial):
        return f"{what}. A person has accepted that ({when})."
    return (
        f"{what}. A guard keeps it off the front until a person accepts that: mergefront accept {run.path.name} {trial}"
    )
