"""When a search starts no more trials, beside its number of trials: time, cost, or little left to gain."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from optimizer.errors import SearchError
from optimizer.runs.front import growth, losses
from optimizer.runs.trial import Role
from optimizer.search.cost import anchor_cost, form_cost, lesson_cost
from optimizer.search.ledger import Ledger
from optimizer.search.prepared import DERIVATIONS, LESSON, REQUEST
from optimizer.words import count, percent

if TYPE_CHECKING:
    from optimizer.study.schema import SearchSection
    from search_spaces.choice import Choice
    from search_spaces.space import Space


def require_budget(settings: SearchSection, space: Space | Choice) -> None:
    """Raise SearchError where the budget has no room for the base and each expert."""
    references = 1 + len(space.experts)
    if settings.trials < references:
        raise SearchError(
            f"search.trials must leave room for the base and each expert; given {settings.trials}, "
            f"needed {references} and some to search with"
        )


class Ends:
    """What a study says of its end; asked before each trial, and told of each that is finished."""

    def __init__(self, settings: SearchSection, ledger: Ledger) -> None:
        self._settings, self._ledger = settings, ledger
        self._deadline = time.monotonic() + 60 * (settings.timeout or math.inf)
        self._covered: list[float] | None = None  # the hypervolume after each searched trial; None: to be computed
        self._known = 0  # trials whose values are in it

    @property
    def is_late(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() >= self._deadline

    def reason(self, in_hand: Iterable[int]) -> str:
        """Say why no trial is started any more, in words; empty where one may be.

        Args:
            in_hand: trials that are not told yet; what they are expected to cost counts as spent.
        """
        settings = self._settings
        if self.is_late:
            return f"{settings.timeout:g} minutes are over (search.timeout)"
        if settings.candidates is not None and self._spent(in_hand) >= settings.candidates:
            return f"{settings.candidates:g} candidates are spent (search.candidates)"
        patience = settings.patience
        if patience is not None and (gained := self.gained(patience.trials)) is not None and gained <= patience.gain:
            last = count(patience.trials, "searched trial")
            return f"the last {last} added {percent(max(gained, 0.0))} to the hypervolume (search.patience)"
        return ""

    def _spent(self, in_hand: Iterable[int]) -> float:
        return self._ledger.spent + math.fsum(expected_cost(number, self._ledger) for number in in_hand)

    def gained(self, trials: int) -> float | None:
        """Compute what the last searched trials added to the hypervolume, a share of it; None before there are
        more of them.

        Its reference point is the base's gain and the most that an expert forgot.
        """
        values, kinds = self._ledger.values, self._ledger.kinds
        if self._covered is None or self._known != len(values):
            forgot = [values[n][-1] for kind, n in self._ledger.references.items() if kind.role is Role.EXPERT]
            if not forgot or any(n not in values for n in self._ledger.references.values()):
                return None
            order = sorted(values, key=lambda n: (not kinds[n].is_anchor, n))
            corner = [*([0.0] * (len(values[order[0]]) - 1)), max(forgot)]
            covered = growth(losses([values[n] for n in order]), corner)
            anchors = sum(kinds[n].is_anchor for n in order)
            self._covered, self._known = covered[anchors - 1 :], len(values)
        if len(self._covered) <= trials:
            return None
        now, before = self._covered[-1], self._covered[-1 - trials]
        return (now - before) / now if now > 0 else 0.0


def cost_of_trial(number: int, ledger: Ledger) -> float:
    """Compute what a trial that is scored cost, in candidates: what it read against what a searched trial reads first,
    and what its preparing cost; the first derived expert of a form paid for all of them."""
    first = sum(task.drawn_items or task.search_items for task in ledger.tasks)
    read = sum(len(rows.items) for rows in ledger.rows_of(number).values())
    return read / max(first, 1) + _preparing(number, ledger)


def expected_cost(number: int, ledger: Ledger) -> float:
    """Say what a trial that is not scored yet is expected to cost, in candidates."""
    read = anchor_cost(ledger.tasks) if ledger.kinds[number].is_anchor else 1.0
    return read + _preparing(number, ledger)


def _preparing(number: int, ledger: Ledger) -> float:
    """Say what a trial's preparing cost; what it is expected to, before it is done or where an earlier version did not
    write it down."""
    kind = ledger.kinds[number]
    if kind in DERIVATIONS:
        form, _ = DERIVATIONS[kind]
        of_form = [n for n, other in ledger.kinds.items() if other in DERIVATIONS and DERIVATIONS[other][0] == form]
        return form_cost(form, ledger.tasks) if number == min(of_form) else 0.0
    if kind.role is Role.LEARNED:
        with suppress(KeyError, ValueError, TypeError):
            return float(json.loads(ledger.attribute(number, LESSON))["candidates"])
        with suppress(KeyError, ValueError, TypeError):
            return lesson_cost(json.loads(ledger.attribute(number, REQUEST))["steps"], ledger.tasks)
    return 0.0
