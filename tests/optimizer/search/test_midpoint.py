"""The widest gap of a front is halved between trials that have params, however few of them are on it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from optimizer.search.midpoint import front_midpoint
from search_spaces.space import Shape
from tests.optimizer.fakes import space_of

SPACE = space_of(("clinical",), Shape("uniform"), "task_arithmetic")


def everywhere(weight: float) -> dict[str, float]:
    return dict.fromkeys(SPACE.distributions(), weight)


def ledger_of(values: list[tuple[float, float]], params: list[dict[str, float]], *, limit: float = 9.0) -> Any:
    """Trials on a front, of which some have no params, and what is told of a limit on forgetting."""
    trials = [SimpleNamespace(number=i, params=given) for i, given in enumerate(params)]
    return SimpleNamespace(
        trials=lambda: trials,
        front=lambda: set(range(len(values))),
        values=dict(enumerate(values)),
        seen=set(),
        constraints=lambda number: {"max_forgetting": values[number][-1] - limit},
    )


@pytest.mark.parametrize("with_params", [0, 1])
def test_a_front_that_prepared_points_hold_has_no_midpoint(with_params: int) -> None:
    params = [everywhere(0.5)] * with_params + [{}] * (2 - with_params)
    assert front_midpoint(ledger_of([(0.9, 0.0), (1.0, 0.1)], params), SPACE) is None


def test_the_midpoint_lies_between_the_neighbours_farthest_apart() -> None:
    values = [(0.1, 0.0), (0.2, 0.1), (0.9, 0.5)]
    ledger = ledger_of(values, [everywhere(0.0), everywhere(0.25), everywhere(0.75)])
    assert front_midpoint(ledger, SPACE) == everywhere(0.5)


def test_with_a_limit_only_the_gaps_up_to_it_are_filled() -> None:
    values, params = [(0.0, 0.0), (0.3, 0.04), (0.4, 0.06), (1.0, 0.5)], [everywhere(w) for w in (0.0, 0.3, 0.4, 1.0)]
    free = front_midpoint(ledger_of(values, params), SPACE)
    limited = front_midpoint(ledger_of(values, params, limit=0.05), SPACE)
    assert free == pytest.approx(everywhere(0.7))
    assert limited == pytest.approx(everywhere(0.15))
