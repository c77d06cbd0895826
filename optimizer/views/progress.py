"""What a person sees while a search runs: one live bar on a terminal, plain lines elsewhere.

Listens to the events of `optimizer.search.events`; decides nothing.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from optimizer.runs.trial import Role, TrialKind
from optimizer.words import one_line, percent

if TYPE_CHECKING:
    from rich.console import Console

    from optimizer.search.events import Event


class Progress:
    """A listener for search events, to be used in a `with` statement.

    Args:
        console: where to write; a live bar needs a terminal, and CI set in the environment means there is none.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tally = _Tally()
        self._bar: Bar | None = None
        if console.is_terminal and not os.environ.get("CI"):
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[news]}"),
            )
            self._bar = Bar(*columns, console=console, transient=True)
            self._line = self._bar.add_task("search", total=None, news="starting workers")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, event: Event) -> None:
        """Take in one event and show it."""
        self._tally.add(event)
        if self._bar is None:
            self._console.print(self._plain(event), highlight=False, markup=False, soft_wrap=True)
            return
        stage = "holdout" if event.kind == "holdout" else "search"
        news = escape(self._tally.news())
        self._bar.update(self._line, description=stage, completed=event.done, total=event.total or None, news=news)
        if event.kind in ("failed", "retry", "note", "start"):
            self._bar.console.print(event_text(event), highlight=False, markup=False)

    def _plain(self, event: Event) -> str:
        now = time.strftime("%H:%M:%S")
        count = f"{event.done}/{event.total} " if event.kind in ("trial", "holdout") else ""
        news = f" ({self._tally.news()})" if event.kind == "trial" else ""
        return f"{now} {count}{event_text(event)}{news}"


class _Tally:
    """The running figures of the whole study: time left, the front so far, failures."""

    def __init__(self) -> None:
        self._points: list[tuple[str, tuple[float, ...]]] = []  # label and objectives
        self._failed = 0
        self._first: tuple[float, int] | None = None  # when counting began, and what was done then
        self._left = ""

    def add(self, event: Event) -> None:
        now = time.monotonic()
        if self._first is None or event.kind == "start":
            self._first = now, event.done
        if event.kind == "start":
            self._points = list(event.known)
            self._failed = event.done - len(event.known)
        if event.objectives is not None and event.kind == "trial":
            self._points.append((event.label, event.objectives))
        self._failed += event.kind == "failed"
        since, done_then = self._first
        finished = event.done - done_then
        remaining = event.total - event.done
        self._left = _span((now - since) / finished * remaining) if finished > 0 and remaining > 0 else ""

    def news(self) -> str:
        """Say how far it is, such as "3 min left, front 5, best 71 % at 4 %, 1 failed"."""
        parts = [f"{self._left} left"] if self._left else []
        if self._points:
            parts += self._front()
        parts += [f"{self._failed} failed"] if self._failed else []
        return ", ".join(parts)

    def _front(self) -> list[str]:
        from optimizer.runs.front import knee_of, losses, non_dominated

        points = losses([objectives for _, objectives in self._points])
        *lost, loss = points[knee_of(points, [TrialKind(label).role is Role.EXPERT for label, _ in self._points])]
        knee = f"knee {percent(-sum(lost) / len(lost))} domain at {percent(loss)} forgetting"
        return [f"front {non_dominated(points).sum()}", knee]


def event_text(event: Event) -> str:
    """Say one event in words, without the time."""
    name = "" if event.trial is None else f"trial {event.trial}"
    label = one_line(event.label)
    label = f" ({label})" if label and name else label
    text = event.text or ("judged on the holdout items" if event.kind == "holdout" else "")
    if event.objectives is not None:
        *gains, forgetting = event.objectives
        text = f"domain {', '.join(percent(gain) for gain in gains)}, forgetting {percent(forgetting)}"
    return ": ".join(part for part in (f"{name}{label}", text) if part)


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
