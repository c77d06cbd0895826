"""What the command line prints about a run: rich tables for people, plain documents for `--json` and front.json."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from rich import box
from rich.table import Table
from rich.text import Text

from evals.outcomes import SUITES
from optimizer.runs.frames import rows_of
from optimizer.runs.front import SURE
from optimizer.runs.run_folder import is_locked
from optimizer.runs.trial import TrialKind
from optimizer.words import percent, printable, tasks_said

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

    from optimizer.run import Run

PREFIX = {"search": "", "holdout": "holdout_"}
ENDS = ("", "_low", "_high")


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Sequence[str] = ()) -> Table:
    """A plain table; every cell is shown as it stands, without markup, and in a narrow terminal no word is broken.

    Args:
        right: columns of numbers, set flush right.
    """
    made = Table(
        title=Text(printable(title), style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        show_header=any(columns),
    )
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    for column, *below in zip(map(printable, columns), *cells, strict=True):
        side: Literal["left", "right"] = "right" if column in right else "left"
        made.add_column(Text(column), justify=side, overflow="fold", no_wrap=not _breaks([column, *below]))
    for row in cells:
        made.add_row(*map(Text, row))
    return made


def _breaks(texts: Iterable[str]) -> bool:
    """Whether lines of these texts can be broken between words, or are paths."""
    return any(" " in text or "/" in text for text in texts)


# --- the front -------------------------------------------------------------------------------------------------------


def print_front(run: Run, console: Console) -> None:
    """Print the front beside the anchors, the answer for some limits on forgetting, the tasks of the knee, whether the
    search was worth it, and what was cut."""
    if not len(run.front()):
        console.print(run.summary(), highlight=False, markup=False)
        return
    console.print(front_table(run, width=console.width))
    if len(answers := run.by_limit()):
        console.print(limits_table(answers, width=console.width))
    console.print(retention_table(run, run.knee(), width=console.width))
    for line in (run.describe(run.knee()), *run.verdict(), *run.cut_short(), *run.lost()):
        console.print(line, highlight=False, markup=False)


def front_table(run: Run, *, width: int) -> Table:
    """Front and anchors from least to most forgetting, on both suites with 95 % intervals.

    Args:
        width: of the console, in characters; where it is narrow, intervals stand below their values.
    """
    front, knee = set(run.front().index), run.knee()
    chosen = sorted(front | set(run.anchors().index))
    shown = run.points().loc[chosen].sort_values(["forgetting", "domain"], kind="stable")
    figures = [(suite, name) for suite in SUITES for name in run.objectives]
    several = len(run.methods) > 1
    seam = " [" if width >= 30 + 18 * len(figures) else "\n["
    rows = (
        (
            "*" if row["trial"] == knee else "+" if row["trial"] in front else "",
            row["trial"],
            TrialKind(row["kind"]).label,
            *([row["method"]] if several else []),
            *(_interval(row, *figure).replace(" [", seam) for figure in figures),
        )
        for row in _records(shown.reset_index())
    )
    titles = [f"{suite}\n{name.replace('_', ' ').replace('domain', 'domain gain')}" for suite, name in figures]
    title = f"Front of {run.name} (+) with its knee (*), and the anchors"
    return table(
        title, ["", "trial", "kind", *(["method"] if several else []), *titles], rows, right=["trial", *titles]
    )


def limits_table(answers: pd.DataFrame, *, width: int) -> Table:
    """The answer for each of some limits on forgetting.

    Args:
        answers: `Run.by_limit()`, with a row.
        width: of the console, in characters; where it is narrow, intervals stand below their values.
    """
    seam = " [" if width >= 78 else "\n["
    rows = (
        (
            percent(row["limit"]),
            row["trial"],
            TrialKind(row["kind"]).label,
            *(_share(*(row[f"{name}{end}"] for end in ENDS)).replace(" [", seam) for name in ("domain", "forgetting")),
            percent(row["kept"]),
        )
        for row in _records(answers)
    )
    suites = " or ".join(answers["suite"].unique())
    title = f"For a limit on forgetting, {percent(SURE)} sure by search items; judged on {suites} items"
    columns = ["at most", "trial", "kind", "domain gain", "forgetting", "keeps to it in"]
    return table(title, columns, rows, right=["at most", "trial", *columns[3:]])


def front_document(run: Run) -> dict[str, Any]:
    """The front as plain values: shares with 95 % intervals, null where a trial was not scored on a suite."""
    points, knee = _front(run)
    return {
        "run": run.name,
        "objectives": list(run.objectives),
        "reference": run.reference() if points else None,
        "points": [
            {
                "trial": row["trial"],
                "kind": row["kind"],
                "method": row["method"],
                "knee": row["trial"] == knee,
                **{suite: _figures(run, row, suite) for suite in SUITES},
            }
            for row in points
        ],
        "limits": _records(run.by_limit()),
        "findings": run.findings(),
    }


def _front(run: Run) -> tuple[list[dict[str, Any]], int | None]:
    """The front's rows and the knee's trial."""
    rows = _records(run.front().reset_index())
    return rows, run.knee() if rows else None


def _interval(row: Mapping[str, Any], suite: str, name: str) -> str:
    return _share(*(row[f"{PREFIX[suite]}{name}{end}"] for end in ENDS))


def _share(value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return ""
    return percent(value) if low is None or high is None else percent(value, low, high)


def _figures(run: Run, row: Mapping[str, Any], suite: str) -> dict[str, float | None]:
    names = dict.fromkeys(["domain", *run.objectives])
    return {f"{name}{end}": row[f"{PREFIX[suite]}{name}{end}"] for name in names for end in ENDS}


def plain(value: Any) -> Any:
    """A cell of a frame as a JSON value: NaN is null."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- one trial -------------------------------------------------------------------------------------------------------


def weights_table(run: Run, trial: int) -> Table:
    """One row per layer: the weight of each expert and module kind; embed and head on rows of their own."""
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


def retention_table(run: Run, trial: int, *, width: int) -> Table:
    """Each task's score of base, experts and trial, and what the trial won or kept of it, with 95 % intervals.

    Args:
        width: of the console, in characters; where it is narrow, intervals stand below their values.
    """
    tasks = run.retention(trial)
    suite = tasks["suite"].iloc[0]
    names = {number: TrialKind(row["kind"]).expert_name for number, row in rows_of(run.points()).items()}
    experts = {name: run.scores(number, suite) for number, name in names.items() if name and number != trial}
    seam = " [" if width >= 78 + 12 * len(experts) else "\n["
    records = _records(tasks)
    rows = (
        (
            name,
            row["metric"],
            f"{row['base_score']:.3f}",
            *(f"{scores[row['task']]:.3f}" for scores in experts.values()),
            f"{row['score']:.3f}",
            ("won " if row["role"] == "domain" else "kept ")
            + _share(row["share"], row["low"], row["high"]).replace(" [", seam),
        )
        for name, row in zip(tasks_said(records), records, strict=True)
    )
    title = f"Tasks of trial {trial} on {suite} items: gain won, skill kept"
    numbers = ["base", *experts, f"trial {trial}"]
    return table(title, ["task", "metric", *numbers, "share"], rows, right=numbers)


def trial_document(run: Run, trial: int) -> dict[str, Any]:
    """One trial as plain values: recipe, weights, and tasks where it was scored."""
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
    }


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): plain(value) for name, value in row.items()} for row in frame.to_dict("records")]


# --- the run ---------------------------------------------------------------------------------------------------------


def status_document(run: Run) -> dict[str, Any]:
    """How far a run is, as plain values."""
    trials = run.trials()
    states, methods = trials["state"].value_counts(), trials["method"].value_counts(sort=False)
    return {
        "run": run.name,
        "path": str(run.path),
        "running": is_locked(run.path),
        "trials": {str(state): int(number) for state, number in states.items()},
        "methods": {name: int(methods[name]) for name in run.methods},
        "front": len(run.front()),
        "findings": run.findings(),
    }
