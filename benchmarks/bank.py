"""Is the estimate from a bank of items honest, and what does it save?

    python benchmarks/bank.py [RUN] [--studies 1000]

A table for simulated studies and one for splits of a recorded run's outcomes: for n drawn items the root mean square
error of a candidate's score on all items by the paired difference to the base (the mean of n items, what the base has
on them taken off), by the regression on the anchors alone, and by the corrected estimate; what the last is of the first
(aim: a third at n = 30); and how often its 95 % interval holds the truth (aim: 93 to 97 %).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from evals.bank import Array, Seen, draw_order, estimate, foretell, inclusion_of, margins
from evals.outcomes import HOLDOUT, SEARCH
from optimizer.run import open_run
from optimizer.runs.scored import ScoredRun
from optimizer.runs.trial import Role

DRAWS = (30, 60, 90)
ITEMS = 300
RECORDED_SPLITS = 40
LEAST_ITEMS = 60  # of a recorded task


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """One task's items as the anchors and as other candidates have them.

    Args:
        anchors: (N, k) margins or values, those of base and expert first.
        base: (N,) the base's values.
        signals, values: (N, T) of T other candidates.
    """

    anchors: Array
    base: Array
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
    bank: float
    coverage: float

    @property
    def ratio(self) -> float:
        """The bank's error as a share of the paired difference's."""
        return self.bank / self.paired


def simulated(kind: str, rng: np.random.Generator) -> Case:
    """Simulate one study's task: eight anchors and one candidate, merges of the same two models.

    Args:
        kind: "choices"; "texts" (bits); "written" (outcomes alone); "alike" (the anchors are one model); "adversary"
            (a candidate that is right where merges are wrong); "stranger" (a candidate of another family).
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
    if kind == "texts":
        sizes = rng.integers(40, 400, ITEMS)
        anchors, own = (1.2 - 0.05 * anchors) * sizes[:, None], (1.2 - 0.05 * own) * sizes
        return Case(anchors, anchors[:, 0], own[:, None], own[:, None], are_margins=False)
    answers, outcome = (anchors > 0).astype(float), (own > 0).astype(float)[:, None]
    if kind == "written":
        return Case(answers, answers[:, 0], outcome, outcome, are_margins=False)
    return Case(anchors, answers[:, 0], own[:, None], outcome, are_margins=True)


KINDS = ("choices", "texts", "written", "alike", "adversary", "stranger")


def simulations(studies: int) -> Iterator[Row]:
    """Measure so many simulated studies of each kind at each n."""
    for kind in KINDS:
        for n in DRAWS:
            rng = np.random.default_rng((n, KINDS.index(kind)))
            yield _measured(kind, n, lambda rng=rng, kind=kind: simulated(kind, rng), studies, rng)  # type: ignore[misc]


def recorded(run: ScoredRun) -> Iterator[Row]:
    """Measure splits of a run's outcomes: all that a task has of both suites is its bank, searched trials are drawn."""
    for name, case in recorded_cases(run).items():
        for n in DRAWS:
            if 2 * n <= len(case.anchors):
                yield _measured(name, n, lambda case=case: case, RECORDED_SPLITS, np.random.default_rng(n))  # type: ignore[misc]


def recorded_cases(run: ScoredRun) -> dict[str, Case]:
    """Arrange a run's tasks: of both suites where enough searched trials are scored on both, else of the search's."""
    searched = {n for n, kind in run.kinds.items() if kind.role is Role.SEARCHED}
    frames, trials = [run.outcomes(SEARCH)], set(run.outcomes(SEARCH)["trial"])
    judged = trials & set(run.outcomes(HOLDOUT)["trial"])
    if len(judged & searched) >= 10:
        frames, trials = [*frames, run.outcomes(HOLDOUT)], judged
    rows = pd.concat(frames, ignore_index=True)
    known = {n for n, kind in run.kinds.items() if kind.is_anchor}
    cases = {}
    for task in run.tasks:
        mine = rows[(rows["task"] == task.name) & rows["trial"].isin(trials)]
        table = {n: group.set_index("item").sort_index() for n, group in mine.groupby("trial")}
        if len(mine) < LEAST_ITEMS * max(len(table), 1):
            continue
        anchors, others = sorted(known & table.keys()), sorted(table.keys() - known)
        values = {n: table[n]["value"].to_numpy() for n in table}
        signals = values if task.output_type != "multiple_choice" else _margins(table)
        cases[task.name] = Case(
            np.stack([signals[n] for n in anchors], axis=1),
            values[anchors[0]],
            np.stack([signals[n] for n in others], axis=1),
            np.stack([values[n] for n in others], axis=1),
            are_margins=signals is not values,
        )
    return cases


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
    found = np.vstack([_errors(make(), n, rng) for _ in range(repeats)])  # (R, 4): three errors, and whether it is held
    paired, regression, bank = np.sqrt((found[:, :3] ** 2).mean(axis=0))
    return Row(case, n, float(paired), float(regression), float(bank), float(found[:, 3].mean()))


def _errors(case: Case, n: int, rng: np.random.Generator) -> Array:
    count = len(case.anchors)
    order, strata = draw_order(case.anchors, are_margins=case.are_margins, seed=int(rng.integers(2**31)), task="t")
    places, plain = order[:n], rng.permutation(count)[:n]
    rows = []
    for signals, values in zip(case.signals.T, case.values.T, strict=True):
        seen = Seen(places, values[places], signals[places], inclusion_of(strata, places))
        found = estimate(case.anchors, seen, are_margins=case.are_margins)
        alone, _, _ = foretell(case.anchors, seen, are_margins=case.are_margins)
        alone[places] = values[places]
        truth = values.sum()
        paired = (values[plain] - case.base[plain]).mean() * count + case.base.sum()
        error = found.total - truth
        rows.append((paired - truth, alone.sum() - truth, error, abs(error) <= 1.96 * found.stderr + 1e-9))
    scale = np.array([count, count, count, 1])
    return np.array(rows, dtype=float) / scale


def print_table(title: str, rows: Iterator[Row]) -> None:
    """Print one table as Markdown."""
    print(f"\n{title}\n\n| | n | paired | regression alone | bank | share | held |\n|---|---|---|---|---|---|---|")
    for row in rows:
        errors = f"{row.paired:.4f} | {row.regression:.4f} | {row.bank:.4f}"
        print(f"| {row.case} | {row.n} | {errors} | {row.ratio:.2f} | {100 * row.coverage:.1f} % |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--studies", type=int, default=1000)
    arguments = parser.parse_args()
    print_table(f"{arguments.studies} simulated studies of each kind, {ITEMS} items", simulations(arguments.studies))
    if arguments.run is not None:
        print_table(f"Splits of {arguments.run.name}", recorded(open_run(arguments.run)))


if __name__ == "__main__":
    main()
