"""The draw of a search: the items of each task on which candidates that are no anchors are scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from evals.drawing import draw_items
from evals.outcomes import Outcome, TaskInfo


@dataclass(frozen=True, slots=True)
class Draw:
    """What a candidate is scored on: by task, the items' hashes and the probability with which each was drawn.

    Of a task without a bank it is all items.
    """

    items: Mapping[str, Mapping[str, float]]

    def beyond(self, have: pd.DataFrame) -> dict[str, tuple[str, ...]]:
        """Give the part of the draw that outcomes lack, by task."""
        there = set(zip(have["task"], have["item"], strict=True))
        return {task: tuple(i for i in items if (task, i) not in there) for task, items in self.items.items()}

    def stamped(self, outcomes: Sequence[Outcome]) -> tuple[Outcome, ...]:
        """Give each outcome the probability with which its item was drawn."""
        return tuple(replace(row, inclusion=self.items.get(row.task, {}).get(row.item, 1.0)) for row in outcomes)


def draw_from(outcomes: pd.DataFrame, tasks: Sequence[TaskInfo], *, blocks: int, seed: int) -> Draw:
    """Draw from the banks of a search.

    Args:
        outcomes: of base and experts on the search items.
        tasks: the study's.
        blocks: of as many items as a candidate is scored on at first.
        seed: of the draw.
    """
    numbers = {
        task.name: min(blocks * task.drawn_items or task.search_items, task.search_items)
        for task in tasks
        if task.search_items
    }
    return Draw({name: draw_items(outcomes, name, items=number, seed=seed) for name, number in numbers.items()})
