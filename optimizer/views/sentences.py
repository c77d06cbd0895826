"""A run in sentences: what a trial keeps and forgets, whether the search was worth it, what to know first."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from evals.outcomes import HOLDOUT, SEARCH
from evals.truncation import cut_short as cut_short_tasks
from evals.weak_tasks import weak_tasks
from optimizer.runs.families import PREPARED
from optimizer.runs.frames import Row, rows_of
from optimizer.runs.scored import ScoredRun
from optimizer.runs.trial import NOT_COUNTED, SEARCHED, Role, TrialKind
from optimizer.views.front_rows import change_of
from optimizer.words import Interval, count, listed, one_line, percent

MEANINGS = {
    Role.LEARNED: "learned: one weight per tensor, found by gradients on the search items; p is the share that the "
    "domain counts.",
    Role.DERIVED: "derived: an expert made of base and expert by a closed form (RegMean, Fisher) over the search "
    "items.",
}


def named(run: ScoredRun, trial: int) -> str:
    """Name a trial as people call it: its number, and its method where the run has several."""
    method = run.method(trial) or "no recipe"
    return f"trial {trial} ({method})" if len(run.methods) > 1 else f"trial {trial}"


def titled(run: ScoredRun, trial: int) -> str:
    """Name a trial as people call it, at the start of a sentence."""
    return named(run, trial).replace("t", "T", 1)


def describe(run: ScoredRun, trial: int) -> str:
    """Say in one sentence what a trial keeps and forgets, with intervals, and on which items."""
    run.require_scored(trial)
    suite = run.suite_of(trial)
    row = rows_of(run.points(suite))[trial]
    gain, loss = (Interval.of(row, name).text() for name in ("domain", "forgetting"))
    items = "items the search never saw" if suite == HOLDOUT else "the items the search used"
    return f"{titled(run, trial)} keeps {gain} of the domain gain and forgets {loss}, measured on {items}."


def how_sure(run: ScoredRun, trial: int, max_forgetting: float) -> str:
    """Say in one sentence how sure it is that a trial forgets at most so much, by the items that judge it."""
    run.require_scored(trial)
    suite = run.suite_of(trial)
    share = run.within(max_forgetting, suite)[trial]
    return f"In {percent(share)} of resamplings of the {suite} items it forgets at most {percent(max_forgetting)}."


def verdict(run: ScoredRun) -> list[str]:
    """Say whether searching was worth it, judged at the knee: a sentence for each line of anchors, and one on what
    derived and learned points add."""
    if run.points().empty:
        return []
    gaps = [gap_sentence(gap) for gap in rows_of(run.does_search_pay()).values()]
    return [*(knee_sentence(run) if run.kinds[run.knee()].is_anchor else gaps), *what_prepared_points_add(run)]


def knee_sentence(run: ScoredRun) -> list[str]:
    """Say in one sentence that a knee was not searched."""
    kind = run.kinds[run.knee()]
    if kind.role not in PREPARED:
        return [f"The knee needs no search: it is {kind.stored}. The search found no better one."]
    how, _, what = kind.label.partition(" ")
    none_better = ": no searched point is better" if (run.points()["kind"] == SEARCHED.stored).any() else ""
    return [f"The knee is {how} ({what}){none_better}."]


def what_prepared_points_add(run: ScoredRun) -> list[str]:
    """Say in one sentence what derived and learned points add to the hypervolume of the others, where there are
    some."""
    if not run.has_prepared_points:
        return []
    rows = {row["set"]: row for row in rows_of(run.what_pays()).values()}
    who = prepared_kinds(run).capitalize()
    others = "anchors and searched points" if "+ searched" in rows else "the anchors"
    more = Interval(*(rows["all"][name] for name in ("share", "low", "high")))
    items = f"on {rows['all']['suite']} items"
    if not more.is_known:
        return []
    if more.low > 0:
        return [f"{who} points add {more.text()} to the hypervolume of {others}, {items}."]
    what = "that is a loss" if more.high < 0 else "that does not show a gain"
    return [f"{who} points change the hypervolume of {others} by {more.text()}, {items}: {what}."]


def prepared_kinds(run: ScoredRun) -> str:
    """Name the points of a run that were derived or learned: `derived and learned`."""
    roles = {TrialKind(kind).role for kind in run.points()["kind"]}
    return " and ".join(role.name.lower() for role in PREPARED if role in roles)


def meanings(kinds: Iterable[TrialKind]) -> list[str]:
    """Say what kinds of points mean that no reader knows from elsewhere: a sentence for each of them that is there."""
    roles = {kind.role for kind in kinds}
    return [sentence for role, sentence in MEANINGS.items() if role in roles]


def gap_sentence(gap: Row) -> str:
    """Compare a searched trial with a line of anchors, a row of `ScoredRun.does_search_pay`, in one sentence."""
    line = {"uniform": "one weight for all layers", "slope": "a weight that rises with depth"}[gap["line"]]
    middle, low, high = (100 * gap[name] for name in ("difference", "low", "high"))
    if low > 0:
        meaning = f"the search keeps {middle:.0f} points more [{low:.0f}, {high:.0f}], so here it pays"
    elif high < 0:
        meaning = f"the search keeps {-middle:.0f} points less [{-high:.0f}, {-low:.0f}], so take that instead"
    else:
        meaning = f"the difference, {middle:+.0f} points [{low:+.0f}, {high:+.0f}], does not show that search pays"
    kept = f"keeps {percent(gap['line_domain'])} of the gain; {meaning}."
    if gap["line_forgetting"] > gap["forgetting"]:
        return f"No point with {line} forgets so little; the nearest, at {percent(gap['line_forgetting'])}, {kept}"
    return f"At the same forgetting, {line} {kept}"


def sentinels(run: ScoredRun, trial: int) -> list[str]:
    """Say in one sentence whether the sentinel tasks show ability kept or a form learned; nothing without them."""
    frame = run.sentinels()
    changes = {row["task"]: change_of(row) for row in rows_of(frame[frame["trial"] == trial]).values()}
    if not changes:
        return []
    told = ", ".join(f"{change.from_base} on {one_line(task)}" for task, change in changes.items())
    won_general = rows_of(run.points(HOLDOUT))[trial]["forgetting_high"] < 0
    if any(change.high < 0 for change in changes.values()):
        meaning = "there it lost ability"
    elif any(change.low > 0 for change in changes.values()):
        meaning = "there it won ability too" if won_general else "there it won ability"
    else:
        meaning = "what it won on the general tasks may be their form" if won_general else "that shows no loss"
    return [f"Sentinel tasks, which neither search nor learning has seen: {named(run, trial)} is {told}; {meaning}."]


def cut_short(run: ScoredRun) -> list[str]:
    """Name tasks with items longer than the model's context, or answers that hit their limit of tokens: a sentence
    each, over all finished trials and both suites."""
    return cut_short_tasks(pd.concat([run.outcomes(suite) for suite in (SEARCH, HOLDOUT)], ignore_index=True))


def lost(run: ScoredRun) -> list[str]:
    """Name finished trials whose stored outcomes are missing or damaged and that every figure leaves out: a sentence
    for each suite, naming the files."""
    found = [(suite, faults) for suite in (SEARCH, HOLDOUT) if (faults := run.lost_outcomes(suite))]
    return [
        f"Without the {suite} outcomes of {count(len(faults), 'trial')}, until `mergefront search` scores them "
        f"again: {listed(list(faults.values()))}."
        for suite, faults in found
    ]


def findings(run: ScoredRun) -> list[str]:
    """Say what a reader should know first, in plain words: tasks that cannot carry a measurement, what was cut short,
    lost outcomes, failed trials."""
    notes = lost(run)
    if run.references is None:
        notes.append(run.why_empty)
    else:
        notes += weak_tasks(run.scale(SEARCH))
    notes += cut_short(run)
    notes += [f"The holdout scores cannot be used: {fault}"] if (fault := run.holdout_fault) else []
    trials = run.trials()
    failed = trials[(trials["state"] == "fail") & ~trials["reason"].str.startswith(NOT_COUNTED)]
    if len(failed):
        notes.append(f"{count(len(failed), 'trial')} failed; most often: {failed['reason'].mode().iloc[0]}")
    return notes


def summary(run: ScoredRun) -> str:
    """Tell the run in a few plain sentences."""
    states = run.trials()["state"]
    done, total = int((states == "complete").sum()), len(states)
    head = f"Run {run.name}: {done} of {count(total, 'trial')} finished"
    if run.points().empty:
        return f"{head}. {run.why_empty}"
    return f"{head}, {count(len(run.front()), 'point')} on the front. {describe(run, run.knee())}"
