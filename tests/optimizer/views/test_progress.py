"""Progress says each event once in plain words where there is no terminal, and keeps one live bar where there is."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from optimizer.search.events import Event
from optimizer.views.progress import Progress, event_text

EVENTS = [
    Event("start", None, "4 trials", 0, 4),
    Event("trial", 0, "", 1, 4, (0.0, 0.0), "base"),
    Event("trial", 1, "", 2, 4, (1.0, 0.2), "expert:clinical"),
    Event("retry", 2, "attempt 1 of 2: worker process 7 died", 2, 4, None, "search"),
    Event("trial", 2, "", 3, 4, (0.8, 0.061), "search"),
    Event("failed", 3, "nonfinite: tensor [b]x[/b]", 4, 4, None, "search"),
    Event("holdout", 2, "judged", 1, 3, None, "search"),
    Event("done", None, "4 trials finished, 3 on the front", 4, 4),
]


def shown(events: list[Event], *, terminal: bool) -> str:
    stream = io.StringIO()
    with Progress(Console(file=stream, force_terminal=terminal, width=100)) as progress:
        for event in events:
            progress(event)
    return stream.getvalue()


def test_without_a_terminal_each_event_is_one_line() -> None:
    lines = [line.split(" ", 1)[1] for line in shown(EVENTS, terminal=False).splitlines()]
    assert len(lines) == len(EVENTS)
    assert lines[0] == "4 trials"
    assert lines[1].startswith("1/4 trial 0 (base): domain 0.0 %, forgetting 0.0 % (")
    assert "trial 2 (search): domain 80 %, forgetting 6.1 %" in lines[4]
    assert "front 3, knee 80 % domain at 6.1 % forgetting" in lines[4]
    assert lines[5] == "trial 3 (search): nonfinite: tensor [b]x[/b]"
    assert lines[7] == "4 trials finished, 3 on the front"


def test_failures_are_counted() -> None:
    lines = shown([*EVENTS[:6], Event("trial", 4, "", 4, 5, (0.1, 0.1), "search")], terminal=False).splitlines()
    assert "1 failed" in lines[-1]
    assert "1 failed" not in lines[4]


def test_on_a_terminal_there_is_a_bar_and_only_trouble_gets_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    text = shown(EVENTS, terminal=True)
    assert "4/4" in text
    assert "front 3, knee 80 % domain at 6.1 % forgetting, 1 failed" in text
    assert "nonfinite: tensor [b]x[/b]" in text
    assert "trial 2 (search): domain" not in text


def test_in_ci_there_is_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    assert len(shown(EVENTS, terminal=True).splitlines()) == len(EVENTS)


def test_time_left_is_from_trials_done_since_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 160.0, 220.0])
    monkeypatch.setattr("optimizer.views.progress.time.monotonic", lambda: next(clock))
    resumed = [
        Event("start", None, "10 of 20 trials are finished", 10, 20),
        Event("trial", 10, "", 11, 20, (0.1, 0.1), "search"),
        Event("trial", 11, "", 12, 20, (0.2, 0.2), "search"),
    ]
    lines = shown(resumed, terminal=False).splitlines()
    assert "9 min left" in lines[1]
    assert "8 min left" in lines[2]


def test_after_a_resume_front_knee_and_failures_are_of_the_whole_study() -> None:
    known = (("base", (0.0, 0.0)), ("expert:clinical", (1.0, 0.2)), ("search", (0.8, 0.061)))
    resumed = [
        Event("start", None, "4 of 6 trials are finished", 4, 6, known=known),
        Event("trial", 4, "", 5, 6, (0.1, 0.1), "search"),
    ]
    assert "front 3, knee 80 % domain at 6.1 % forgetting, 1 failed" in shown(resumed, terminal=False)


def test_the_knee_is_measured_from_the_experts_whatever_else_forgets_more() -> None:
    points = [("base", (0.0, 0.0)), ("expert:a", (1.0, 0.2)), ("search", (0.75, 0.08)), ("search", (1.1, 0.7))]
    events = [Event("trial", i, "", i + 1, 5, values, label) for i, (label, values) in enumerate(points)]
    assert "knee 75 % domain at 8.0 % forgetting" in shown(events, terminal=False).splitlines()[-1]


def test_several_experts_each_have_a_figure() -> None:
    event = Event("trial", 3, "", 1, 9, (0.5, 0.25, 0.1), "search")
    assert event_text(event) == "trial 3 (search): domain 50 %, 25 %, forgetting 10 %"
