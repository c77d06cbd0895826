"""What guards of written answers found, as rows and as a table: of a trial, or of all trials that one flags."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from optimizer.runs.frames import rows_of
from optimizer.runs.guard_words import WHAT, guard_sentence
from optimizer.runs.scored import ScoredRun
from optimizer.views.plain_table import table
from optimizer.words import one_line, percent

if TYPE_CHECKING:
    from rich.console import Console

TITLES = ("trial", "what", "task", "answers that", "the merge's", "the base's", "so far")
NUMBERS = ("trial", "the merge's", "the base's")
MARK = "!"  # before a trial that a guard flags
MEANING = f"{MARK} a guard of written answers flags it: see below."
OFF, ACCEPTED, FLAGGED, QUIET = "off the front", "accepted", "flagged", ""


def guard_rows(run: ScoredRun, trials: Iterable[int], *, whole: bool = False) -> list[tuple[str, ...]]:
    """Return a row of `TITLES` for each guard that flags one of some trials.

    Args:
        whole: those that do not flag it, too.
    """
    return [
        (
            str(trial),
            run.kinds[trial].label,
            one_line(row["task"]),
            WHAT[row["guard"]],
            percent(row["share"]),
            percent(row["base_share"]),
            _so_far(run, trial) if row["is_flagged"] else QUIET,
        )
        for trial in trials
        for row in rows_of(run.guards(trial)).values()
        if whole or row["is_flagged"]
    ]


def _so_far(run: ScoredRun, trial: int) -> str:
    if trial in run.accepted:
        return ACCEPTED
    return OFF if trial in run.kept_off else FLAGGED


def print_flagged(run: ScoredRun, console: Console) -> None:
    """Print what guards found of the trials that they flag; nothing where they flag none."""
    if rows := guard_rows(run, run.flagged):
        title = "Guards of written answers: what went wrong more often than noise explains"
        console.print(table(title, TITLES, rows, right=NUMBERS))


def print_guards(run: ScoredRun, trial: int, console: Console) -> None:
    """Print all guards of a trial, and in a sentence what they mean where one flags it."""
    if rows := guard_rows(run, [trial], whole=True):
        console.print(table(f"Guards of the written answers of trial {trial}", TITLES, rows, right=NUMBERS))
        if said := guard_sentence(run, trial):
            console.print(said, highlight=False, markup=False)
