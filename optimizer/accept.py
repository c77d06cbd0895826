"""What `accept` does: a person takes a merge as it is, although a guard flags its written answers."""

from __future__ import annotations

from pathlib import Path

from evals.outcomes import HOLDOUT
from optimizer.errors import RunError
from optimizer.run import open_run
from optimizer.run_study import finish
from optimizer.runs.acceptances import accept
from optimizer.runs.guard_words import flags_of, guard_sentence
from optimizer.runs.run_folder import RunFolder
from optimizer.study.study_file import stored_storage


def accept_trial(path: Path, trial: int, *, storage: str | None = None) -> list[str]:
    """Write down that a person accepts a flagged trial, and write the report anew.

    Args:
        storage: as of `open_run`; None: the study's own.

    Returns:
        What to tell the person, a line each.

    Raises:
        RunError: no guard flags the trial, or it is accepted already.
    """
    storage = storage or stored_storage(path)
    with RunFolder(path).lock():
        run = open_run(path, storage=storage)
        run.require_scored(trial)
        flags = flags_of(run, trial)
        if not flags:
            raise RunError(f"no guard flags trial {trial} of run {run.name}: there is nothing to accept")
        if when := run.accepted.get(trial):
            raise RunError(f"trial {trial} of run {run.name} is accepted already ({when})")
        accept(path, trial, run.recipe(trial).digest, flags)
        accepted = open_run(path, storage=storage)
        finish(accepted)
    lines = [guard_sentence(accepted, trial), accepted.describe(trial)]
    if accepted.judging_suite == HOLDOUT != accepted.suite_of(trial):
        lines.append("The holdout items have not judged it yet: `mergefront search` does that.")
    return lines
