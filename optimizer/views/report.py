"""report.html: one file with everything a person needs to pick a point, readable without a network or this program.

Every name is escaped, no script but the two inlined ones may run (their hashes are in the page's policy), and nothing
is fetched from anywhere.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from string import Template

from evals.documents import read_text
from evals.guards import LEVEL
from evals.outcomes import HOLDOUT, SEARCH, SENTINEL
from optimizer.errors import RunError
from optimizer.masking import redacted
from optimizer.runs.atomic_file import write_atomically
from optimizer.runs.frames import rows_of
from optimizer.runs.front import SURE
from optimizer.runs.scored import ScoredRun
from optimizer.runs.trial import SEARCHED, TrialKind
from optimizer.views import figures, sentences
from optimizer.views.canvas import DARK, library_script
from optimizer.views.flips_page import flips_section
from optimizer.views.front_rows import FrontRow, front_rows, limit_rows, sentinel_rows, sentinel_titles
from optimizer.views.guard_tables import TITLES, guard_rows
from optimizer.views.markup import grid, inert
from optimizer.views.sensitivity_plot import heat_map
from optimizer.words import Interval, count, percent

WORDS = {
    "domain gain": "what a merge adds to the base on the domain's tasks, as a share of what the expert adds: the base "
    "has 0 %, the expert 100 %.",
    "forgetting": "what a merge loses of the base's ability on the general tasks, as a share of it (above chance, "
    "where there is a chance). The base forgets 0 %; what lies below is better than the base.",
    "interval": "95 % of bootstrap samples of the items fall in it; the same items are drawn for every merge.",
    "front": "the merges that no other merge beats in both. The search chose it on its own items; items it never saw "
    "judge it, so the second pair of figures is the one to trust. A learned merge was fitted to the search items and "
    "looks better by them than it is, so by them it beats no merge that was not.",
    "hypervolume": "the area between the front and a fixed corner: it grows whenever the front does.",
    "resamplings": "the items drawn anew at random, a thousand times, some twice and some not at all: how often a "
    "figure holds then says how much it hangs on which items there were.",
    "certificate": "a statement on one merge, tested on items that nothing had looked at before. At 90 % confidence, "
    "at most one of ten such statements is wrong.",
    "lost, won": "answers that were right for the base and are wrong for the merge, and the other way round.",
    "knee": "the point of the front farthest above the straight line from base to expert.",
    "uniform line, depth slope": "what needs no search: one weight for all layers (WiSE-FT), or one that rises with "
    "depth (LiNeS). Between their points we interpolate.",
}


def write_report(run: ScoredRun, path: Path | None = None) -> Path:
    """Write the report of a run, into its folder unless told otherwise, and return its path."""
    target = path or run.path / "report.html"
    write_atomically(target, report_html(run).encode("utf-8"))
    return target


def report_html(run: ScoredRun) -> str:
    """Write the report as one page."""
    page = Template(_part("report_page.html"))
    library, script = library_script(), _part("report_page.js")
    scored = not run.points().empty
    study = run.path / "study.yaml"
    return page.substitute(
        script_hashes=" ".join(f"'sha256-{_sha256(text)}'" for text in (library, script)),
        title=inert(f"{run.name} - merge front"),
        heading=inert(f"Merge front of {run.name}"),
        subheading=inert(_what_was_merged(run)),
        lead="".join(f"<p>{inert(line)}</p>" for line in _lead(run)),
        cards=_cards(run) + _limits(run) if scored else "",
        findings=_findings(run),
        figures=_figures(run) if scored else "",
        table=_table(run) + _guards(run) + _sentinels(run) if scored else "",
        words="".join(f"<li><b>{inert(word)}</b>: {inert(meaning)}</li>" for word, meaning in WORDS.items()),
        study=inert(redacted(read_text(study, error=RunError))) if study.exists() else "",
        data=_figure_data(run) if scored else "{}",
        plotly=library,
        script=script,
    )


def _part(name: str) -> str:
    """Read a part of the page that lies beside this module."""
    return files("optimizer.views").joinpath(name).read_text(encoding="utf-8")


def _what_was_merged(run: ScoredRun) -> str:
    states = run.trials()["state"]
    done = f"{int((states == 'complete').sum())} of {count(len(states), 'trial')} finished"
    tasks = ", ".join(task.name for task in run.tasks if task.role != SENTINEL)
    sentinels = ", ".join(task.name for task in run.tasks if task.role == SENTINEL)
    if not run.experts:
        return f"{done}."
    experts = "Experts" if len(run.experts) > 1 else "Expert"
    return f"{experts} {', '.join(run.experts)} merged into the base. {done}. Tasks: {tasks}." + (
        f" Sentinel tasks: {sentinels}." if sentinels else ""
    )


def _lead(run: ScoredRun) -> list[str]:
    if run.points().empty:
        return [sentences.summary(run)]
    knee = run.knee()
    said = (sentences.describe(run, knee), *sentences.certificates(run), *sentences.verdict(run))
    return [*said, *sentences.sentinels(run, knee)]


def _cards(run: ScoredRun) -> str:
    knee = run.knee()
    row = rows_of(run.points(run.suite_of(knee)))[knee]
    gain, loss = (Interval.of(row, name) for name in ("domain", "forgetting"))
    cards = [
        _card(gain.figure, gain.bounds, f"of the domain gain kept by trial {knee}, the knee"),
        _card(loss.figure, loss.bounds, "of the base's general ability forgotten by it"),
    ]
    pays = run.does_search_pay().dropna()
    for gap in rows_of(pays.head(1)).values():  # the tightest limit that both sides keep to
        difference, low, high = (f"{100 * gap[name]:+.0f}" for name in ("difference", "low", "high"))
        limit = f"for the limit of {percent(gap['limit'])} on forgetting"
        cards.append(
            _card(difference, f"[{low}, {high}]", f"points of domain gain over the best of the lines, {limit}")
        )
    if run.has_prepared_points:
        more = Interval(*run.what_pays().set_index("set").loc["all", ["share", "low", "high"]])
        what = f"hypervolume that {sentences.prepared_kinds(run)} points add"
        cards += [_card(more.figure, more.bounds, what)] if more.is_known else []
    return f'<div class="cards">{"".join(cards)}</div>'


def _card(value: str, interval: str, of: str) -> str:
    small = f"<small>{inert(interval)}</small>" if interval else ""
    return f'<div class="card"><b>{inert(value)} {small}</b><span class="soft">{inert(of)}</span></div>'


def _findings(run: ScoredRun) -> str:
    findings = sentences.findings(run)
    items = "".join(f"<li>{inert(finding)}</li>" for finding in findings)
    return f"<section><h2>Read with care</h2><ul>{items}</ul></section>" if findings else ""


def _figures(run: ScoredRun) -> str:
    options = "".join(
        f'<option value="{row.trial}"{" selected" if row.is_knee else ""}>{inert(_named(run, row))}</option>'
        for row in front_rows(run)
    )
    choice = (
        f'<p class="screen"><label>Look at a point of the front: <select id="choice">{options}</select></label></p>'
    )
    hint = '<p class="soft screen">Click a point of the front to see its weights and tasks below.</p>'
    return (
        f"<section>{_figure('front')}{hint}{_meanings(run.kinds[trial] for trial in run.points().index)}</section>"
        f"<section>{choice}{_figure('weights')}{_figure('retention')}</section>"
        f"{flips_section(run)}<section>{_figure('hypervolume')}</section>{_lessons(run)}{_sensitivities(run)}"
    )


def _lessons(run: ScoredRun) -> str:
    """Write what learning cost, and the losses before and after; empty where nothing was learned."""
    lessons = run.lessons()
    if lessons.empty:
        return ""
    titles = ("trial", "what", "p", "cost, candidates", "steps", "loss, items learned from", "loss, items kept apart")
    rows = [
        (
            trial,
            TrialKind(row["kind"]).label,
            _number(row["preference"], 2),
            _number(row["candidates"], 1),
            _number(row["steps"], 0),
            *(f"{_number(row[f'{side}_before'], 3)} → {_number(row[side], 3)}" for side in ("seen", "kept")),
        )
        for trial, row in rows_of(lessons).items()
    ]
    about = (
        "p is what the domain counts; the general tasks have the rest. Losses, before and after, are in shares of what "
        "lies between base and expert; where only that on items learned from falls, the weights know items by heart. "
        "A candidate is one reading of all search items."
    )
    return f'<section><h2>What was learned, and its price</h2><p class="soft">{about}</p>{grid(titles, rows)}</section>'


def _sensitivities(run: ScoredRun) -> str:
    """Write the places of the heat maps of where gain and loss come from."""
    return "".join(f"<section>{_figure(f'sensitivities-{name}')}</section>" for name in run.sensitivities())


def _number(value: float, digits: int) -> str:
    """Write a number of a lesson; empty where the study has none."""
    return f"{value:.{digits}f}" if math.isfinite(value) else ""


def _meanings(kinds: Iterable[TrialKind]) -> str:
    return "".join(f'<p class="soft">{inert(line)}</p>' for line in sentences.meanings(kinds))


def _figure(name: str) -> str:
    """Write a figure's place; its title and the line below stand in the page, where they wrap as text does."""
    return (
        f'<figure id="{name}"><figcaption><h2></h2><p class="soft"></p></figcaption><div class="figure"></div></figure>'
    )


def _limits(run: ScoredRun) -> str:
    """Write the best point for each of some limits on forgetting."""
    answers = limit_rows(run)
    if not answers:
        return ""
    items = "unseen items" if all(row.suite == HOLDOUT for row in answers) else "search items"
    titles = ("forgets at most", "trial", "what", f"domain gain, {items}", f"forgetting, {items}", "keeps to it in")
    rows = [
        (
            percent(row.limit),
            row.trial,
            kind_text(row.kind) or "searched",
            row.domain,
            row.forgetting,
            f"{percent(row.kept)} of resamplings",
        )
        for row in answers
    ]
    export = f"mergefront export {run.path.name} --max-forgetting {answers[0].limit:g}"
    return (
        "<section><h2>The most domain gain for a limit on forgetting</h2>"
        f'<p class="soft">Points that keep to it in {percent(SURE)} of resamplings of the search items.</p>'
        f"{grid(titles, rows)}{_meanings(row.kind for row in answers)}"
        f"<p>Write one as a model: <code>{inert(export)}</code></p></section>"
    )


def _table(run: ScoredRun) -> str:
    front, digests = front_rows(run), run.trials()["recipe"].to_dict()
    figures = [(suite, name) for suite, named in front[0].figures.items() for name in named]
    items = {SEARCH: "search items", HOLDOUT: "unseen items"}
    several = len(run.methods) > 1
    titles = [f"{_title(name)}, {items[suite]}" for suite, name in figures]
    columns = ("trial", "what", *(["method"] if several else []), *titles, "recipe")
    rows = [
        (
            row.trial,
            kind_text(row.kind),
            *([row.method] if several else []),
            *(row.figures[suite][name] for suite, name in figures),
            digests[row.trial],
        )
        for row in front
    ]
    table = grid(columns, rows, marked=next(place for place, row in enumerate(front) if row.is_knee))
    export = f"mergefront export {run.path.name} --trial {run.knee()}"
    return (
        f"<section><h2>The front, from least to most forgetting</h2>{table}"
        f"<p>Write a point as a model: <code>{inert(export)}</code></p></section>"
    )


def _guards(run: ScoredRun) -> str:
    """Write what guards of written answers found of the trials that they flag; nothing where they flag none."""
    rows = guard_rows(run, run.flagged)
    if not rows:
        return ""
    about = (
        "Each guard marks answers of a merge and of the base to the same items. A trial is flagged where the merge has "
        f"more marks than noise explains: an exact sign test of the items that one of the two has alone, at "
        f"{percent(LEVEL)} for all guards of a trial together. It stays off the front until a person accepts it: "
        f"mergefront accept {run.path.name} TRIAL"
    )
    return (
        f'<section><h2>Guards of written answers</h2><p class="soft">{inert(about)}</p>{grid(TITLES, rows)}</section>'
    )


def _sentinels(run: ScoredRun) -> str:
    """Write what the front and the anchors won or lost on the sentinel tasks; nothing where there are none."""
    titles, rows = sentinel_titles(run), sentinel_rows(run)
    if not titles:
        return ""
    cells = [(row.trial, kind_text(row.kind), *(row.changes.get(task, "") for task in titles)) for row in rows]
    knee = next((place for place, row in enumerate(rows) if row.is_knee), None)
    table = grid(("trial", "what", *titles.values()), cells, marked=knee)
    return (
        "<section><h2>Sentinel tasks: ability kept, or a form learned</h2>"
        '<p class="soft">How far each merge is above or below the base on tasks of another form, which neither search '
        "nor learning has seen and which are in no other figure; higher is better.</p>"
        f"{table}</section>"
    )


def _title(name: str) -> str:
    return name.replace("domain_", "gain ").replace("domain", "domain gain")


def kind_text(kind: TrialKind) -> str:
    """Say what a trial is; nothing of a sampler's proposal."""
    return "" if kind == SEARCHED else kind.label


def _named(run: ScoredRun, row: FrontRow) -> str:
    name = sentences.named(run, row.trial)
    return f"{name} ({text})" if (text := kind_text(row.kind)) else name


def _figure_data(run: ScoredRun) -> str:
    trials = [row.trial for row in front_rows(run)]
    data = {
        "dark": DARK,
        "front": figures.front(run).to_plotly_json(),
        "hypervolume": figures.hypervolume(run).to_plotly_json(),
        "weights": {trial: figures.weights(run, trial).to_plotly_json() for trial in trials},
        "sensitivities": {
            f"sensitivities-{name}": heat_map(found).to_plotly_json() for name, found in run.sensitivities().items()
        },
        "retention": {trial: figures.retention(run, trial).to_plotly_json() for trial in trials},
    }
    return json.dumps(data, default=_plain).replace("<", "\\u003c").replace("\u2028", "\\u2028")


def _plain(value: object) -> object:
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a figure holds numbers and text, not {type(value)}")


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode()
