"""The events of a search: what a person may want to hear of it, and who tells them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optimizer.words import listed

if TYPE_CHECKING:
    from optimizer.search.ledger import Ledger


@dataclass(frozen=True, slots=True)
class Event:
    """What a person may want to hear.

    Args:
        kind: "start", "trial", "retry", "failed", "holdout", "done" or "note".
        trial: its number, where it is about one.
        done, total: finished trials and the budget; for "holdout" trials judged and to be judged.
        objectives: of a "trial", in the study's order.
        label: what the trial is: "base", "expert:<name>", another anchor's name, or "search".
        known: of a "start": label and objectives of each trial that was finished before.
    """

    kind: str
    trial: int | None
    text: str
    done: int
    total: int
    objectives: tuple[float, ...] | None = None
    label: str = ""
    known: tuple[tuple[str, tuple[float, ...]], ...] = ()


@dataclass(frozen=True, slots=True)
class Reporter:
    """Tells a listener of each step, with the ledger's figures.

    Args:
        budget: trials that the search may finish.
    """

    listener: Callable[[Event], None]
    ledger: Ledger
    budget: int

    def start(self, text: str) -> None:
        """Tell that a search begins or goes on, and what is known already."""
        known = tuple((self.ledger.kinds[number].stored, values) for number, values in self.ledger.values.items())
        self.listener(Event("start", None, text, self.ledger.finished, self.budget, known=known))

    def trial(self, kind: str, number: int, text: str, objectives: tuple[float, ...] | None = None) -> None:
        """Tell of a trial, beside the finished trials and the budget."""
        label = self.ledger.kinds[number].stored
        self.listener(Event(kind, number, text, self.ledger.finished, self.budget, objectives, label))

    def judged(self, kind: str, number: int, text: str, *, done: int, total: int) -> None:
        """Tell of a trial on the holdout suite, beside the judged trials and those to be judged."""
        self.listener(Event(kind, number, text, done, total, None, self.ledger.kinds[number].stored))

    def lost(self, faults: Sequence[str]) -> None:
        """Tell which outcomes are lost and scored again."""
        if faults:
            self.say("note", f"{listed(faults)}; what is lost is scored again")

    def say(self, kind: str, text: str) -> None:
        """Tell of the search as a whole: a "note", or that it is "done"."""
        self.listener(Event(kind, None, text, self.ledger.finished, self.budget))
