"""What the command line prints about a run: rich tables for people, plain documents for `--json` and front.json."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from evals.outcomes import SUITES
from optimizer.runs.frames import rows_of
from optimizer.runs.front import SURE
from optimizer.runs.limits import answer_to_limits
from optimizer.runs.measures import measures
from optimizer.runs.run_folder import is_locked
from optimizer.runs.scored import ScoredRun
from optimizer.runs.trial import TrialKind
from optimizer.views import sentences
from optimizer.views.front_rows import LimitRow, front_rows, limit_rows, sentinel_rows, sentinel_titles, share_of
from optimizer.views.guard_tables import MARK, MEANING, print_flagged, print_guards
from optimizer.views.plain_table import table
from optimizer.views.terminal import Terminal
from optimizer.words import Interval, percent, task_labels

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

WIDE = 10_000  # characters: no table is broken

SENTINELS = "Sentinel tasks"
CHANCE = "search\non front in"  # the share of resamplings


# --- the front -------------------------------------------------------------------------------------------------------


def print_front(run: ScoredRun, console: Console) -> None:
    """Print the front beside the anchors, the answer for some limits on forgetting, the tasks of the knee, the sentinel
    tasks, whether the search was worth it, and what was cut."""
    if not len(run.front()):
        console.print(sentences.summary(run), highlight=False, markup=False)
        return
    knee = run.knee()
    console.print(front_table(run, width=console.width))
    known = sentences.meanings(row.kind for row in front_rows(run, anchors=True))
    if known := [*known, *measures(run), *([MEANING] if run.flagged else [])]:
        console.print("\n".join(known), end="\n\n", highlight=False, markup=False)
    print_flagged(run, console)
    if answers := limit_rows(run):
        console.print(limits_table(answers, width=console.width))
    console.print(retention_table(run, knee, width=console.width))
    if titles := sentinel_titles(run):
        console.print(sentinels_table(run, titles, width=console.width))
    said = (sentences.describe(run, knee), *sentences.sentinels(run, knee), *sentences.verdict(run))
    words = (*said, *sentences.certificates(run), *sentences.guarded(run), *sentences.cut_short(run))
    for line in (*words, *sentences.lost(run)):
        console.print(line, highlight=False, markup=False)


def front_table(run: ScoredRun, *, width: int) -> Table:
    """Make a table of front and anchors from least to most forgetting, on both suites with 95 % intervals.

    Args:
        width: of the console, in characters; where it is narrow, intervals stand below their values.
    """
    figures = [(suite, name) for suite in SUITES for name in run.objectives]
    several = len(run.methods) > 1
    rows = front_rows(run, anchors=True)

    def cells(seam: str) -> Iterator[tuple[object, ...]]:
        for row in rows:
            mark = "*" if row.is_knee else "+" if row.on_front else MARK if row.is_flagged else ""
            method = [row.method] if several else []
            shares = (row.figures[suite][name].text(seam) for suite, name in figures)
            yield mark, row.trial, row.kind.label, *method, *shares, percent(row.chance)

    titles = [f"{suite}\n{name.replace('_', ' ').replace('domain', 'domain gain')}" for suite, name in figures]
    columns = ["", "trial", "kind", *(["method"] if several else []), *titles, CHANCE]
    title = f"Front of {run.name} (+) with its knee (*), and the anchors"
    return _fitted(title, columns, cells, right=["trial", *titles, CHANCE], width=width)


def limits_table(answers: Sequence[LimitRow], *, width: int) -> Table:
    """Make a table of the answer for each of some limits on forgetting.

    Args:
        answers: `limit_rows(run)`, with a row.
        width: of the console, in characters; where it is narrow, intervals stand below their values.
    """

    def cells(seam: str) -> Iterator[tuple[object, ...]]:
        for row in answers:
            shares = (figure.text(seam) for figure in (row.domain, row.forgetting))
            yield percent(row.limit), row.trial, row.kind.label, *shares, percent(row.kept)

    suites = " or ".join(dict.fromkeys(row.suite for row in answers))
    title = f"For a limit on forgetting, {percent(SURE)} sure by search items; judged on {suites} items"
    columns = ["at most", "trial", "kind", "domain gain", "forgetting", "keeps to it in"]
    return _fitted(title, columns, cells, right=["at most", "trial", *columns[3:]], width=width)


def sentinels_table(run: ScoredRun, titles: Mapping[str, str], *, width: int) -> Table:
    """Make the table of front and anchors on the sentinel tasks: won or lost against the base, with 95 % intervals.

    Args:
        titles: `sentinel_titles(run)`, with an entry.
        width: of the console, in characters; where it is narrow, intervals stand below their values.
    """
    columns = {task: title.replace(", ", "\n") for task, title in titles.items()}
    rows = sentinel_rows(run)

    def cells(seam: str) -> Iterator[tuple[object, ...]]:
        for row in rows:
            mark = "*" if row.is_knee else "+" if row.on_front else ""
            changes = (row.changes[task].text(seam) if task in row.changes else "" for task in titles)
            yield mark, row.trial, row.kind.label, *changes

    title = f"{SENTINELS}, unseen by search and learning: how far above or below the base (higher is better)"
    right = ["trial", *columns.values()]
    return _fitted(title, ["", "trial", "kind", *columns.values()], cells, right=right, width=width)


def _fitted(
    title: str,
    columns: Sequence[str],
    rows: Callable[[str], Iterable[Sequence[object]]],
    *,
    right: Sequence[str],
    width: int,
) -> Table:
    """Make a table whose values share a line with their intervals where the console is wide enough.

    In a narrow one intervals stand below their values, in a narrower one the words of titles below each other, too.

    Args:
        rows: given what stands between a value and its interval.
        width: of the console, in characters.
    """
    stacked = {column: column.replace(" ", "\n") for column in columns}
    made = [table(title, columns, rows(seam), right=right) for seam in (" ", "\n")]
    made.append(table(title, [*stacked.values()], rows("\n"), right=[stacked[column] for column in right]))
    return next((wide for wide in made if _width(wide) <= width), made[-1])


def _width(made: Table) -> int:
    """Say how many characters a table would like to take."""
    return Terminal(width=WIDE).measure(made).maximum


def front_document(run: ScoredRun) -> dict[str, Any]:
    """Return the front as plain values: shares with 95 % intervals, null where a trial was not scored on a suite."""
    rows = front_rows(run)
    knee = run.knee() if rows else None
    return {
        "run": run.name,
        "objectives": list(run.objectives),
        "reference": run.reference() if rows else None,
        "points": [
            {
                "trial": row.trial,
                "kind": row.kind.stored,
                "method": row.method,
                "knee": row.is_knee,
                "front_chance": plain(row.chance),
                **{suite: _plain_figures(figures) for suite, figures in row.figures.items()},
            }
            for row in rows
        ],
        "limits": _records(run.by_limit()),
        "asked_limits": None if (answer := answer_to_limits(run)) is None else answer.document(),
        "what_pays": _records(run.what_pays()),
        "lessons": _records(run.lessons().reset_index()),
        "sentinels": _records(run.sentinels()),
        "flagged": [
            {"trial": trial, "accepted": run.accepted.get(trial, ""), "guards": _records(run.guards(trial))}
            for trial in run.flagged
        ],
        "flipped": None if knee is None else {"trial": knee, "items": flipped_records(run, knee)},
        "findings": sentences.findings(run),
    }


def flipped_records(run: ScoredRun, trial: int) -> list[dict[str, Any]]:
    """Return the items that a trial lost and won, those lost first, with their texts as far as a report told them."""
    return _records(run.flipped_items(trial).sort_values(["change", "task"], kind="stable"))


def _plain_figures(figures: Mapping[str, Interval]) -> dict[str, float | None]:
    values: dict[str, float] = {}
    for name, figure in figures.items():
        values |= {name: figure.value, f"{name}_low": figure.low, f"{name}_high": figure.high}
    return {name: plain(value) for name, value in values.items()}


def plain(value: Any) -> Any:
    """Return a cell of a frame as a JSON value: NaN is null."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- one trial -------------------------------------------------------------------------------------------------------


def print_trial(run: ScoredRun, trial: int, console: Console) -> None:
    """Print one trial: its weights, and where it is scored what it won and kept, and what guards say of its answers."""
    console.print(run.recipe(trial).short(), highlight=False, markup=False)
    console.print(weights_table(run, trial))
    if trial in run.points().index:
        console.print(sentences.describe(run, trial), highlight=False, markup=False)
        console.print(retention_table(run, trial, width=console.width))
        print_guards(run, trial, console)
    else:
        about = run.trials().loc[trial]
        said = f"trial {trial} is not scored ({about['state']}) {about['reason']}".rstrip()
        console.print(said, highlight=False, markup=False, soft_wrap=True)


def weights_table(run: ScoredRun, trial: int) -> Table:
    """Make one row per layer: the weight of each expert and module kind; embed and head on rows of their own."""
    rows: dict[str, dict[str, str]] = {}
    titles: dict[str, None] = {}
    for cell in _records(run.weights(trial)):
        in_layer = cell["layer"] >= 0
        title = f"{cell['expert']}\n{cell['kind'] if in_layer else 'outer'}"
        titles[title] = None
        rows.setdefault(str(cell["layer"]) if in_layer else cell["kind"], {})[title] = f"{cell['weight']:.3f}"
    columns = sorted(titles, key=lambda title: title.endswith("\nouter"))  # stable: as they came, the outer last
    cells = ((place, *(row.get(title, "") for title in columns)) for place, row in rows.items())
    return table(f"Weights of trial {trial}", ["layer", *columns], cells, right=columns)


def retention_table(run: ScoredRun, trial: int, *, width: int) -> Table:
    """Make a table of each task's score of base, experts and trial, and what the trial won or kept, with intervals.

    Args:
        width: of the console, in characters; where it is narrow, intervals stand below their values.
    """
    tasks = run.retention(trial)
    suite = tasks["suite"].iloc[0]
    names = {number: TrialKind(row["kind"]).expert_name for number, row in rows_of(run.points()).items()}
    experts = {name: run.scores(number, suite) for number, name in names.items() if name and number != trial}
    records, flipped = list(rows_of(tasks).values()), {row["task"]: row for row in rows_of(run.flips(trial)).values()}

    def cells(seam: str) -> Iterator[tuple[object, ...]]:
        for name, row in zip(task_labels(records), records, strict=True):
            scores = [row["base_score"], *(of_expert[row["task"]] for of_expert in experts.values()), row["score"]]
            share = f"{'won' if row['role'] == 'domain' else 'kept'} {share_of(row).text(seam)}"
            told = seam.join(filter(None, (share, flips_of(flipped.get(row["task"]), seam))))
            yield name, row["metric"], *(f"{score:.3f}" for score in scores), told

    title = f"Tasks of trial {trial} on {suite} items: gain won, skill kept, answers lost and won"
    numbers = ["base", *experts, f"trial {trial}"]
    return _fitted(title, ["task", "metric", *numbers, "share"], cells, right=numbers, width=width)


def flips_of(row: Mapping[str, Any] | None, seam: str) -> str:
    """Write how many answers were lost and won against the base, and the share of items that flipped."""
    return "" if row is None else f"{row['lost']} lost, {row['won']} won{seam}({percent(row['flip_rate'])} flipped)"


def trial_document(run: ScoredRun, trial: int) -> dict[str, Any]:
    """Return one trial as plain values: recipe, weights, and tasks where it was scored."""
    scored = trial in run.points().index
    recipe, about = run.recipe(trial), run.trials().loc[trial]
    return {
        "run": run.name,
        "trial": trial,
        **{name: plain(about[name]) for name in ("state", "kind", "method", "seconds", "reason")},
        "digest": recipe.digest,
        "recipe": json.loads(recipe.to_json()),
        "weights": _records(run.weights(trial)),
        "tasks": _records(run.retention(trial)) if scored else [],
        "flips": _records(run.flips(trial)) if scored else [],
        "guards": _records(run.guards(trial)) if scored else [],
        "kept_off": scored and run.is_kept_off(trial),
    }


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): plain(value) for name, value in row.items()} for row in frame.to_dict("records")]


# --- the run ---------------------------------------------------------------------------------------------------------


def status_document(run: ScoredRun) -> dict[str, Any]:
    """Say how far a run is, as plain values."""
    trials = run.trials()
    states, methods = trials["state"].value_counts(), trials["method"].value_counts(sort=False)
    return {
        "run": run.name,
        "path": str(run.path),
        "running": is_locked(run.path),
        "trials": {str(state): int(number) for state, number in states.items()},
        "methods": {name: int(methods[name]) for name in run.methods},
        "front": len(run.front()),
        "findings": sentences.findings(run),
    }
