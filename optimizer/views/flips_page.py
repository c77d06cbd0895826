"""The report's section on answers that the recommended merge lost and won against the base, each with its text."""

from __future__ import annotations

from optimizer.runs.frames import Row, rows_of
from optimizer.runs.scored import ScoredRun
from optimizer.views.markup import grid, inert
from optimizer.words import one_line, percent

MOST_SHOWN = 100  # items of a task; `show --lost` lists them all
LONGEST = 600  # characters of a question or an answer


def flips_section(run: ScoredRun) -> str:
    """Write how many answers the knee lost and won against the base; nothing without a task of right and wrong."""
    knee = run.knee()
    rows = [
        (one_line(row["task"]), row["role"], row["items"], row["lost"], row["won"], *_flip_figures(row))
        for row in rows_of(run.flips(knee)).values()
    ]
    if not rows:
        return ""
    titles = ("task", "role", "items", "lost", "won", "flipped", "knowledge lost", "p")
    about = (
        "Lost answers were right for the base and are wrong now; won ones the other way round: equal accuracy can hide "
        "many of both. Knowledge lost is lost less won, with the chance of a guess taken off. p is how often chance "
        f"alone splits flips so unevenly (McNemar's exact test). They are listed by: "
        f"mergefront show {run.path.name} {knee} --lost"
    )
    return (
        f"<section><h2>Answers that trial {knee} lost and won against the base</h2>"
        f'<p class="soft">{inert(about)}</p>{grid(titles, rows)}{_items(run, knee)}</section>'
    )


def _flip_figures(row: Row) -> tuple[str, str, str]:
    return percent(row["flip_rate"]), percent(row["lost_knowledge"]), f"{row['p']:.2g}"


def _items(run: ScoredRun, knee: int) -> str:
    """List the items by task, those lost first: closed until somebody asks for a task."""
    frame = run.flipped_items(knee)
    return "".join(
        _of_task(task, list(rows_of(frame[frame["task"] == task].sort_values("change", kind="stable")).values()))
        for task in frame["task"].unique()
    )


def _of_task(task: str, rows: list[Row]) -> str:
    lost = sum(row["change"] == "lost" for row in rows)
    titles = ("", "question", "right", "base", "merge")
    cells = [
        (row["change"], *(_short(row[name]) for name in ("question", "right", "base", "merge")))
        for row in rows[:MOST_SHOWN]
    ]
    if not any(row["question"] or row["right"] for row in rows):
        return ""  # nothing but hashes
    more = f"<p>The first {MOST_SHOWN} of {len(rows)}.</p>" if len(rows) > MOST_SHOWN else ""
    summary = f"{one_line(task)}: {lost} lost, {len(rows) - lost} won"
    return f"<details><summary>{inert(summary)}</summary>{grid(titles, cells)}{more}</details>"


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
