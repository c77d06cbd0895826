"""The point halfway between the neighbours on the front that are farthest apart.

Samplers enlarge the volume under a front and leave gaps in it, where a person may want a point; and what lies between
two good merges is mostly good.
"""

from __future__ import annotations

from collections.abc import Mapping

from optimizer.runs.front import widest_gaps
from optimizer.search.ledger import Ledger
from search_spaces.choice import Choice
from search_spaces.space import Space


def front_midpoint(ledger: Ledger, space: Space | Choice) -> dict[str, float | str] | None:
    """Give the params of the widest gap's midpoint whose recipe is not known yet; None where there is none."""
    params = {trial.number: trial.params for trial in ledger.trials() if trial.params}
    front = _within_limits(sorted(ledger.front() & params.keys(), key=lambda n: ledger.values[n][-1]), ledger)
    if len(front) < 2:  # derived and learned points, which have no params, may hold it alone
        return None
    for left, right in widest_gaps([ledger.values[number] for number in front]):
        between = _halfway(params[front[left]], params[front[right]])
        if between is not None and space.recipe(between).digest not in ledger.seen:
            return between
    return None


def _within_limits(front: list[int], ledger: Ledger) -> list[int]:
    """Leave those of a front that keep the study's limits, and the first beyond them: the limit lies in that gap."""
    beyond = [n for n in front if max(ledger.constraints(n).values(), default=0.0) > 0]
    return [n for n in front if n not in beyond[1:]]


def _halfway(one: Mapping[str, float | str], other: Mapping[str, float | str]) -> dict[str, float | str] | None:
    """Return params halfway between two trials'; None where they are of different methods."""
    if one.keys() != other.keys():
        return None
    between: dict[str, float | str] = {}
    for name, value in one.items():
        partner = other[name]
        if isinstance(value, str) or isinstance(partner, str):
            if value != partner:
                return None
            between[name] = value
        else:
            between[name] = (value + partner) / 2
    return between
