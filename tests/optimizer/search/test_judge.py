"""The judge also scores the front that there would be without derived and learned points."""

from __future__ import annotations

from optimizer.runs.trial import TrialKind
from optimizer.search.judge import front_without_prepared

POINTS = {
    0: ("base", (0.0, 0.0)),
    1: ("expert:clinical", (1.0, 0.4)),
    2: ("learned p=0.60", (0.9, 0.1)),
    3: ("search", (0.8, 0.2)),  # only the learned point beats it
    4: ("search", (0.7, 0.3)),
    5: ("derived fisher 0.4", (0.96, 0.29)),
    6: ("search", (0.95, 0.3)),
}


def test_what_only_learned_and_derived_points_beat_is_judged_too() -> None:
    values = {number: values for number, (_, values) in POINTS.items()}
    kinds = {number: TrialKind(kind) for number, (kind, _) in POINTS.items()}
    assert front_without_prepared(values, kinds, lambda _: False) == [0, 1, 3, 6]
