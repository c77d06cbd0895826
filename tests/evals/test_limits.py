"""What was cut short is counted and said; what was not recorded is not guessed."""

from __future__ import annotations

from dataclasses import asdict, replace

import pandas as pd

from evals.outcomes import Outcome
from evals.truncation import cut_short


def outcome(task: str, item: int, **changes: object) -> Outcome:
    return replace(Outcome(task, "search", f"{item:016x}", 1.0, 1.0, (), False, (3,)), **changes)  # type: ignore[arg-type]


def frame(*outcomes: Outcome) -> pd.DataFrame:
    return pd.DataFrame([asdict(row) for row in outcomes])


def test_nothing_cut_is_nothing_said() -> None:
    assert cut_short(frame(*(outcome("a", i) for i in range(4)))) == []
    assert cut_short(frame(outcome("a", 0)).iloc[:0]) == []


def test_items_are_counted_once_and_answers_for_each_trial() -> None:
    one_trial = [
        outcome("long", 0, truncated=True),
        *(outcome("long", i) for i in range(1, 5)),
        *(outcome("written", i, lengths=(64,), broken_off=True) for i in range(3)),
        *(outcome("written", i) for i in range(3, 5)),
    ]
    long, written = cut_short(frame(*one_trial, *one_trial))
    assert long.startswith("task long: 1 of 5 items was longer than the model's context and cut")
    assert written.startswith(
        "task written: 6 of 10 answers (all trials) were broken off at the limit of 64 tokens; raise"
    )


def test_answers_without_a_record_are_not_counted() -> None:
    recorded = frame(*(outcome("written", i, lengths=(9,), broken_off=i == 0) for i in range(4)))
    before = recorded.assign(lengths=None, broken_off=None)
    assert cut_short(before) == []
    assert (
        "1 of 4 answers (all trials) was broken off at the limit of 9 tokens"
        in cut_short(pd.concat([before, recorded]))[0]
    )
