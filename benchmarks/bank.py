"""Is the estimate from a bank of items honest, and what does it save?

    python benchmarks/bank.py [RUN] [--studies 1000]
    python benchmarks/bank.py RUN --race 30

A table for simulated studies and one for splits of a recorded run's outcomes: for n drawn items the root mean square
error of a candidate's score on all items by the paired difference to the base (the mean of n items, what the base has
on them taken off), by the regression on the anchors alone, by the corrected estimate, and by that moved towards the
regression, which is what a search goes by; what the last is of the first (aim: a third at n = 30); how often the 95 %
interval of the corrected estimate holds the truth (aim: 93 to 97 %), and that of the moved one (aim: 93 % or more).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from evals.bank import (
    Array,
    Seen,
    draw_order,
    estimate,
    foretell,
    inclusion_of,
    margins,
    regression_error,
    towards_regression,
)
from evals.objectives import draw_objectives
from evals.outcomes import HOLDOUT, SEARCH
from optimizer.run import open_run
from optimizer.runs.front import knee_of, losses, non_dominated
from optimizer.runs.posterior import knee_by_samples
from optimizer.runs.scored import ScoredRun
from optimizer.search.bank import Draw, draw_from
from optimizer.search.racing import REPLICATES, Verdict, verdict

DRAWS = (30, 60, 90)
ITEMS = 300
RECORDED_SPLITS = 40
LEAST_ITEMS = 60  # of a recorded task
LEAST_OTHERS = 5  # searched trials that answered all items of both suites, for these to be one bank
RACES = 10


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """One task's items as the anchors and as other candidates have them.

    Args:
        anchors: (N, k) margins or values, those of base and expert first.
        answers: (N, k) the anchors' values.
        signals, values: (N, T) of T other candidates.
    """

    anchors: Array
    answers: Array
    signals: Array
    values: Array
    are_margins: bool


@dataclass(frozen=True, slots=True)
class Row:
    """What came of one kind of case at one n; errors are root mean squares, in the score's unit."""

    case: str
    n: int
    paired: float
    regression: float
    corrected: float
    moved: float
    held: float
    held_moved: float

    @property
    def ratio(self) -> float:
        """The moved estimate's error as a share of the paired difference's."""
        return self.moved / self.paired


def simulated(kind: str, rng: np.random.Generator) -> Case:
    """Simulate one study's task: eight anchors and one candidate, merges of the same two models.

    Args:
        kind: "choices"; "texts" (bits); "written" (outcomes alone); "alike" (the anchors are one model); "adversary"
            (a candidate that is right where merges are wrong); "stranger" (a candidate of another family); "learner"
            (it has learned what the base got wrong); "mixed" (a third of its answers are another family's).
    """
    base, delta, other = rng.normal(0.6, 1.6, ITEMS), rng.normal(0.3, 1.2, ITEMS), rng.normal(0, 0.6, ITEMS)
    along = np.array([0, 1, 0.25, 0.5, 0.75, *rng.uniform(0, 1, 3)])
    aside = np.array([0, 0, 0.2, 0.3, 0.2, *rng.uniform(0, 1, 3)])
    noise = rng.normal(0, 0.25, (ITEMS, 8)) * (np.arange(8) > 1)
    anchors = base[:, None] + np.outer(delta, along) + np.outer(other, aside) + noise
    own = base + rng.uniform() * delta + rng.uniform() * other + rng.normal(0, 0.35, ITEMS)
    if kind == "alike":
        anchors = np.repeat(anchors[:, :1], 8, axis=1)
    elif kind == "adversary":
        own = -own
    elif kind == "stranger":
        own = rng.normal(0.6, 1.6, ITEMS)
    elif kind == "learner":
        own = np.where(base < 0, own + 2.0, own)
    elif kind == "mixed":
        own = np.where(rng.random(ITEMS) < 1 / 3, rng.normal(0.6, 1.6, ITEMS), own)
    if kind == "texts":
        sizes = rng.integers(40, 400, ITEMS)
        anchors, own = (1.2 - 0.05 * anchors) * sizes[:, None], (1.2 - 0.05 * own) * sizes
        return Case(anchors, anchors, own[:, None], own[:, None], are_margins=False)
    answers, outcome = (anchors > 0).astype(float), (own > 0).astype(float)[:, None]
    if kind == "written":
        return Case(answers, answers, outcome, outcome, are_margins=False)
    return Case(anchors, answers, own[:, None], outcome, are_margins=True)


KINDS = ("choices", "texts", "written", "alike", "adversary", "stranger", "learner", "mixed")


def simulation(kind: str, n: int, studies: int) -> Row:
    """Measure so many simulated studies of a kind, of which n items are drawn."""
    rng = np.random.default_rng((n, KINDS.index(kind)))
    return _measured(kind, n, partial(simulated, kind, rng), studies, rng)


def recorded(run: ScoredRun) -> Iterator[Row]:
    """Measure splits of a run's outcomes: all that a task has of both suites is its bank, searched trials are drawn."""
    for name, case in recorded_cases(run).items():
        for n in DRAWS:
            if 2 * n <= len(case.anchors):
                yield _measured(name, n, partial(replace, case), RECORDED_SPLITS, np.random.default_rng(n))


def recorded_cases(run: ScoredRun) -> dict[str, Case]:
    """Arrange a run's tasks: of both suites where enough trials answered both, else of the suite that most did."""
    known = {n for n, kind in run.kinds.items() if kind.is_anchor}

    def others(rows: pd.DataFrame) -> int:
        return len(set(rows["trial"]) - known)

    suites = [run.outcomes(SEARCH), run.outcomes(HOLDOUT)]
    both, *each = map(_whole, (pd.concat(suites, ignore_index=True), *suites))
    rows = both if others(both) >= LEAST_OTHERS else max(each, key=others)
    if not others(rows):
        raise SystemExit(f"{run.path}: only anchors answered every item, so no candidate's truth is known")
    cases = {}
    for task in run.tasks:
        mine = rows[rows["task"] == task.name]
        table = {n: found.set_index("item").sort_index() for n, found in _by_trial(mine).items()}
        if len(mine) < LEAST_ITEMS * max(len(table), 1):
            continue
        anchors, rest = sorted(known & table.keys()), sorted(table.keys() - known)
        values = {n: table[n]["value"].to_numpy() for n in table}
        signals = values if task.output_type != "multiple_choice" else _margins(table)
        cases[task.name] = Case(
            np.stack([signals[n] for n in anchors], axis=1),
            np.stack([values[n] for n in anchors], axis=1),
            np.stack([signals[n] for n in rest], axis=1),
            np.stack([values[n] for n in rest], axis=1),
            are_margins=signals is not values,
        )
    return cases


def _whole(rows: pd.DataFrame) -> pd.DataFrame:
    """Keep the trials that answered every item: with a bank most searched ones answer a few."""
    counts = rows.groupby("trial").size()
    return rows[rows["trial"].isin(counts.index[counts == counts.max()])]


def _by_trial(rows: pd.DataFrame) -> dict[int, pd.DataFrame]:
    """Give each trial its own rows, the first trial first."""
    return {int(trial): rows[rows["trial"] == trial] for trial in sorted(rows["trial"].unique().tolist())}


def _margins(table: dict[int, pd.DataFrame]) -> dict[int, Array]:
    """Compute every trial's margins; where no right answers are kept, they are what a trial that was right chose."""
    scores = np.stack([np.stack(frame["loglikelihoods"].to_list()) for frame in table.values()])  # (T, N, C)
    kept = next(iter(table.values()))["right"]
    if kept.notna().all():
        right = np.stack([np.isin(np.arange(scores.shape[2]), places) for places in kept])
    else:
        right = _guessed(scores, np.stack([frame["value"].to_numpy() for frame in table.values()]) == 1)
    return dict(zip(table, margins(scores, right[None]), strict=True))


def _guessed(scores: Array, was_right: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Find the right choice of each item: what a trial that was right chose, or the likeliest that none chose."""
    chosen = np.eye(scores.shape[2], dtype=bool)[scores.argmax(axis=2)]  # (T, N, C)
    of_right = (chosen & was_right[:, :, None]).any(axis=0)
    never = np.where(chosen.any(axis=0), -np.inf, scores.mean(axis=0)).argmax(axis=1)
    return np.where(of_right.any(axis=1)[:, None], of_right, np.eye(scores.shape[2], dtype=bool)[never])


def _measured(case: str, n: int, make: Callable[[], Case], repeats: int, rng: np.random.Generator) -> Row:
    """Draw n items again and again, and compare what each way says of each candidate with what it has on all."""
    found = np.vstack([_errors(make(), n, rng) for _ in range(repeats)])  # (R, 6): four errors, whether two are held
    return Row(case, n, *np.sqrt((found[:, :4] ** 2).mean(axis=0)).tolist(), *found[:, 4:].mean(axis=0).tolist())


def _errors(case: Case, n: int, rng: np.random.Generator) -> Array:
    count = len(case.anchors)
    order, strata = draw_order(case.anchors, are_margins=case.are_margins, seed=int(rng.integers(2**31)), task="t")
    places, plain = order[:n], rng.permutation(count)[:n]
    doubt = regression_error(case.anchors, case.answers, places, are_margins=case.are_margins)
    base, rows = case.answers[:, 0], []
    for signals, values in zip(case.signals.T, case.values.T, strict=True):
        seen = Seen(places, values[places], signals[places], inclusion_of(strata, places))
        found = estimate(case.anchors, seen, are_margins=case.are_margins)
        moved = towards_regression(found, case.anchors, seen, doubt, are_margins=case.are_margins)
        alone, _, _ = foretell(case.anchors, seen, are_margins=case.are_margins)
        alone[places] = values[places]
        truth = values.sum()
        paired = (values[plain] - base[plain]).mean() * count + base.sum()
        errors = np.array([paired, alone.sum(), found.total, moved.total]) - truth
        rows.append((*errors / count, *(abs(errors[2:]) <= 1.96 * found.stderr + 1e-9)))
    return np.array(rows, dtype=float)


@dataclass(frozen=True, slots=True)
class Race:
    """How one race over a run's searched trials ended; shares.

    Args:
        saved: of the items that all searched trials have.
        lost: true members of the front that were stopped.
        members: searched trials that are on the true front.
        by_estimate, by_error: how far the knee lies below the best of all trials, in heights above the line from base
            to expert, picked by the estimates of one block, and by these less a standard error.
    """

    saved: float
    lost: int
    members: int
    by_estimate: float
    by_error: float


class Races:
    """Races over a run whose searched trials were scored on all search items."""

    def __init__(self, run: ScoredRun, block: int) -> None:
        self.scale = run.scale(SEARCH)
        self.rows = {n: rows.assign(inclusion=1.0) for n, rows in _by_trial(self.scale.outcomes).items()}
        if len(set(map(len, self.rows.values()))) > 1:
            raise SystemExit(
                f"{run.path}: its searched trials answered some of the items, and races are judged by a run whose "
                "trials answered all of them: give one without evals.bank, such as benchmarks/second_conflict.py makes"
            )
        self.anchors = [n for n in self.rows if run.kinds[n].is_anchor]
        self.searched = [n for n in self.rows if n not in self.anchors]
        whole = draw_objectives(self.scale, replicates=0)
        self.names = run.objectives
        self.truth = losses(np.stack([whole.points[name] for name in self.names], axis=-1))
        self.trials = whole.trials.tolist()
        self.tasks = [replace(t, drawn_items=block if t.search_items > block else 0) for t in run.tasks]

    def draws(self, trials: Sequence[int], rows: Mapping[int, pd.DataFrame], replicates: int) -> tuple[Array, Array]:
        """Give samples (B, T, m) and points (T, m) of some trials, minimised, the anchors telling what others lack."""
        frame = pd.concat([rows.get(n, self.rows[n]) for n in {*self.anchors, *trials}], ignore_index=True)
        found = draw_objectives(replace(self.scale, outcomes=frame), replicates=replicates)
        columns = [found.column(n) for n in trials]
        samples = losses(np.stack([found.samples[name][:, columns] for name in self.names], axis=-1))
        return samples, losses(np.stack([found.points[name][columns] for name in self.names], axis=-1))

    def part(self, trial: int, draw: Draw) -> pd.DataFrame:
        """Give a trial's rows of a draw."""
        rows = self.rows[trial]
        kept = [draw.items.get(t, {i: 1.0}).get(i, 0.0) for t, i in zip(rows["task"], rows["item"], strict=True)]
        return rows.assign(inclusion=kept)[np.array(kept) > 0]

    def run(self, seed: int) -> Race:
        """Race every searched trial in the order of the run."""
        references = pd.concat([self.rows[n] for n in (self.scale.base, *self.scale.experts.values())])
        draws: dict[int, Draw] = {}
        parts: dict[int, pd.DataFrame] = {}
        first: dict[int, pd.DataFrame] = {}
        stopped = []
        front = list(self.anchors)
        for trial in self.searched:
            found, blocks = Verdict.GOES_ON, 0
            while found is Verdict.GOES_ON:
                blocks += 1
                if blocks not in draws:
                    draws[blocks] = draw_from(references, self.tasks, blocks=blocks, seed=seed)
                parts[trial] = self.part(trial, draws[blocks])
                first.setdefault(trial, parts[trial])
                samples, points = self.draws([*front, trial], parts, REPLICATES)
                found = verdict(samples, points, is_used_up=len(parts[trial]) == len(self.rows[trial]))
            if found is Verdict.STOPS:
                stopped.append(trial)
            front = [n for n, stays in zip((*front, trial), non_dominated(points), strict=True) if stays]
        true = {n for n, on_front in zip(self.trials, non_dominated(self.truth), strict=True) if on_front}
        everything = sum(len(self.rows[n]) for n in self.searched)
        saved = 1 - sum(len(parts[n]) for n in self.searched) / everything
        members = true & set(self.searched)
        return Race(saved, len(members & set(stopped)), len(members), *self.picks(first))

    def picks(self, first: Mapping[int, pd.DataFrame]) -> tuple[float, float]:
        """Give how far the knee lies below the best, by estimates and by estimates less a standard error."""
        samples, points = self.draws(self.trials, first, REPLICATES)
        is_expert = np.isin(self.trials, list(self.scale.experts.values()))
        most = self.truth[is_expert, -1].max()
        heights = -self.truth[:, :-1].mean(axis=1) - np.maximum(self.truth[:, -1], 0) / most
        front = np.flatnonzero(non_dominated(points))
        picked = knee_of(points, is_expert), front[knee_by_samples(samples, front, is_expert)]
        by_estimate, by_error = (float(heights.max() - heights[place]) for place in picked)
        return by_estimate, by_error


def print_races(run: ScoredRun, block: int, repeats: int) -> None:
    """Print what races with blocks of so many items save and lose."""
    races = Races(run, block)
    found = [races.run(seed) for seed in range(repeats)]
    members = sum(race.members for race in found)
    print(f"\n{repeats} races of {len(races.searched)} searched trials in blocks of {block}:")
    print(f"saved {100 * np.mean([r.saved for r in found]):.0f} % of their item evaluations")
    print(f"stopped {sum(r.lost for r in found)} of {members} true members of the front ({found[0].members} a race)")
    print(f"knee below the best: by estimate {np.mean([r.by_estimate for r in found]):.3f}", end=", ")
    print(f"less a standard error {np.mean([r.by_error for r in found]):.3f}")


def print_table(title: str, rows: Iterator[Row]) -> None:
    """Print one table as Markdown."""
    columns = ("", "n", "paired", "regression alone", "corrected", "moved", "share", "held", "held, moved")
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for row in rows:
        errors = " | ".join(f"{error:.4f}" for error in (row.paired, row.regression, row.corrected, row.moved))
        held = f"{100 * row.held:.1f} % | {100 * row.held_moved:.1f} %"
        print(f"| {row.case} | {row.n} | {errors} | {row.ratio:.2f} | {held} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--studies", type=int, default=1000)
    parser.add_argument("--race", type=int, metavar="ITEMS")
    arguments = parser.parse_args()
    if arguments.race is not None:
        print_races(open_run(arguments.run), arguments.race, RACES)
        return
    found = (simulation(kind, n, arguments.studies) for kind in KINDS for n in DRAWS)
    print_table(f"{arguments.studies} simulated studies of each kind, {ITEMS} items", found)
    if arguments.run is not None:
        print_table(f"Splits of {arguments.run.name}", recorded(open_run(arguments.run)))


if __name__ == "__main__":
    main()
