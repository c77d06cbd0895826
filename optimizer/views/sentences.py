"""A run in sentences: what a trial keeps and forgets, whether the search was worth it, what to know first."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from evals.outcomes import HOLDOUT, SEARCH
from evals.truncation import cut_short as cut_short_tasks
from evals.weak_tasks import weak_tasks
from optimizer.runs.certificates import answers
from optimizer.runs.comparison import NOBODY
from optimizer.runs.families import PREPARED
from optimizer.runs.frames import Row, rows_of
from optimizer.runs.guard_words import guard_sentence
from optimizer.runs.limits import ALL, answer_to_limits
from optimizer.runs.measures import measures
from optimizer.runs.scored import ScoredRun
from optimizer.runs.trial import NO_ANCHORS, NOT_COUNTED, Role, TrialKind, roles_of
from optimizer.views.front_rows import change_of
from optimizer.words import Interval, count, listed, one_line, percent

MEANINGS = {
    Role.LEARNED: "learned: one weight per tensor, found by gradients on the search items; p is the share that the "
    "domain counts.",
    Role.DERIVED: "derived: an expert made of base and expert by a closed form (K-FAC, RegMean, Fisher) over some "
    "search items.",
    Role.BETWEEN: "between: the mean of two trials' weights.",
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
    """Say whether searching was worth it: what the knee is, where it was not searched; a sentence for each pair of
    points that some limits on forgetting choose; and one on what derived and learned points add."""
    if run.points().empty:
        return []
    knee = knee_sentence(run) if run.kinds[run.knee()].is_anchor else []
    return [*limits(run), *knee, *what_search_gains(run), *what_prepared_points_add(run), *what_bank_saved(run)]


def limits(run: ScoredRun) -> list[str]:
    """Say which point keeps the study's limits with the most gain, or how near the nearest came."""
    answer = answer_to_limits(run)
    if answer is None:
        return []
    asked = answer.limits.text()
    if answer.trial is None:
        return [f"No point has a domain gain within the limits ({asked}): none has one at all."]
    if answer.is_kept:
        return [f"Within the limits ({asked}), by the search items: {describe(run, answer.trial)}"]
    what = "of all general tasks" if answer.name == ALL else f"of {answer.name}"
    beyond = f"{percent(answer.forgot)} {what}, where {percent(answer.limit)} is the limit"
    return [
        f"No point with a domain gain keeps the limits ({asked}). The nearest, {named(run, answer.trial)}, forgets "
        f"{beyond}, by the search items."
    ]


def what_bank_saved(run: ScoredRun) -> list[str]:
    """Say in one sentence, where there is a bank, how much of it searched trials were scored on, and how many a race
    stopped."""
    rows = run.outcomes(SEARCH)
    searched = {trial for trial in rows["trial"].unique() if not run.kinds[trial].is_anchor}
    if not run.is_estimated or not searched:
        return []
    share = rows["trial"].isin(searched).sum() / (len(searched) * sum(task.search_items for task in run.tasks))
    raced = f"; a race stopped {len(run.stopped)} of the {len(searched)}, which are beaten" if run.stopped else ""
    return [f"Searched trials were scored on {percent(share)} of the bank's items, and estimated on the others{raced}."]


def knee_sentence(run: ScoredRun) -> list[str]:
    """Say in one sentence that a knee was not searched."""
    kind = run.kinds[run.knee()]
    if kind.role not in PREPARED:
        return [f"The knee needs no search: it is {kind.stored}. The search found no better one."]
    how, _, what = kind.label.partition(" ")
    none_better = ": no searched point is better" if roles_of(run.points()["kind"]).isin(NO_ANCHORS).any() else ""
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
    """Name the points of a run that were derived or learned, and what lies between: `derived, learned and between`."""
    roles = {TrialKind(kind).role for kind in run.points()["kind"]}
    names = [role.name.lower() for role in (*PREPARED, Role.BETWEEN) if role in roles]
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def meanings(kinds: Iterable[TrialKind]) -> list[str]:
    """Say what kinds of points mean that no reader knows from elsewhere: a sentence for each of them that is there."""
    roles = {kind.role for kind in kinds}
    return [sentence for role, sentence in MEANINGS.items() if role in roles]


def what_search_gains(run: ScoredRun) -> list[str]:
    """Compare what was found with the lines, a sentence for each pair of points that some limits choose."""
    pairs: dict[tuple[int, int], list[Row]] = {}
    for row in rows_of(run.does_search_pay()).values():
        pairs.setdefault((row["trial"], row["line_trial"]), []).append(row)
    return [_gain_sentence(run, rows) for rows in pairs.values()]


def _gain_sentence(run: ScoredRun, rows: list[Row]) -> str:
    row, limits = rows[0], " or ".join(percent(row["limit"]) for row in rows)
    items = "items the search never saw" if row["suite"] == HOLDOUT else "the items the search used"
    found = f"{named(run, row['trial'])} ({run.kinds[row['trial']].label})" if row["trial"] != NOBODY else ""
    line = (
        f"{named(run, row['line_trial'])} ({run.kinds[row['line_trial']].label})" if row["line_trial"] != NOBODY else ""
    )
    if not line:
        return (
            f"To forget at most {limits}: no point of the lines, which need no search, is sure to; {found} is, with "
            f"{percent(row['domain'])} of the gain."
        )
    if not found:
        return (
            f"To forget at most {limits}: no point that was found is sure to; {line} is, with "
            f"{percent(row['line_domain'])} of the gain, so take that."
        )
    middle, low, high = (100 * row[name] for name in ("difference", "low", "high"))
    if low > 0:
        meaning = f"{middle:.0f} points more [{low:.0f}, {high:.0f}], so here the search pays"
    elif high < 0:
        meaning = f"{-middle:.0f} points less [{-high:.0f}, {-low:.0f}], so take the line's instead"
    else:
        meaning = f"{middle:+.0f} points [{low:+.0f}, {high:+.0f}], which does not show that the search pays"
    return (
        f"To forget at most {limits}: {found} keeps {percent(row['domain'])} of the gain, the best of the lines, "
        f"{line}, {percent(row['line_domain'])}; {meaning} (on {items})."
    )


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


def certificates(run: ScoredRun) -> list[str]:
    """Say what the run's certificates say, those that refuse too."""
    return [one_line(sentence) for _, sentence in answers(run.path)]


def cut_short(run: ScoredRun) -> list[str]:
    """Name tasks with items longer than the model's context, or answers that hit their limit of tokens: a sentence
    each, over all finished trials and both suites."""
    return cut_short_tasks(pd.concat([run.outcomes(suite) for suite in (SEARCH, HOLDOUT)], ignore_index=True))


def guarded(run: ScoredRun) -> list[str]:
    """Say of which trials a guard flags the written answers, and which of them it keeps off the front; for the knee,
    what is wrong."""
    flagged = run.flagged
    if not flagged:
        return []
    off = [trial for trial in flagged if trial in run.kept_off]
    said = [f"Guards of written answers flag {_trials(flagged)}"]
    if off:
        said.append(
            f"and keep {_trials(off)} off the front, until a person accepts one as it is: "
            f"mergefront accept {one_line(run.path.name)} {off[0]}"
        )
    knee = [guard_sentence(run, run.knee())] if run.knee() in flagged else []
    return [", ".join(said) + ("" if off else "."), *knee]


def _trials(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:10])) + (f" and {len(numbers) - 10} more" if len(numbers) > 10 else "")
    return f"trial{'' if len(numbers) == 1 else 's'} {shown}"


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
    notes += measures(run) + guarded(run) + cut_short(run)
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
