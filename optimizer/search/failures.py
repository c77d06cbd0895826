"""Failures of trials: which of them make going on senseless."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from evals.outcomes import Outcome
from optimizer.errors import SearchError
from optimizer.runs.trial import WORKER_DIED

FAILURES_IN_A_ROW = 5
FIRST_TRIALS = 20  # of which more than half may not fail


@dataclass(slots=True)
class Failures:
    """Counts what failed since this start, and ends a search whose trials keep failing."""

    streak: list[str] = field(default_factory=list)  # reasons of the latest failures in a row
    reasons: list[str] = field(default_factory=list)  # of all failures
    ended: int = 0  # trials told or failed

    def told(self) -> None:
        """Count a trial that was told."""
        self.streak.clear()
        self.ended += 1

    def failed(self, reason: str) -> None:
        """Count a failure.

        Raises:
            SearchError: too many in a row, or of the first trials.
        """
        self.streak.append(reason)
        self.reasons.append(reason)
        self.ended += 1
        if len(self.streak) >= FAILURES_IN_A_ROW:
            raise _too_many(f"the last {len(self.streak)} trials", self.streak)
        if self.ended <= FIRST_TRIALS < 2 * len(self.reasons):
            raise _too_many(f"{len(self.reasons)} of the first {self.ended} trials", self.reasons)


def not_finite(outcomes: Sequence[Outcome]) -> str:
    """Say where a value is NaN or infinite, in words; empty where none is."""
    for row in outcomes:
        if not math.isfinite(row.value):
            return f"score not finite: task {row.task}, item {row.item}"
    return ""


def _too_many(which: str, reasons: Sequence[str]) -> SearchError:
    """Make the error that ends a search whose trials fail: which did, the commonest reason and its latest example."""
    causes = Counter(WORKER_DIED if text.startswith(WORKER_DIED) else text for text in reasons)
    commonest, times = causes.most_common(1)[0]
    example = next(text for text in reversed(reasons) if text.startswith(commonest))
    return SearchError(
        f"{which} failed, {times} of them so: {example}\n"
        "Mend the cause and start the search again; finished trials are kept"
    )
