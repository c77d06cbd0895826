"""A trial in figures, as it is told."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Measured:
    """One trial in figures.

    Args:
        values: its objectives, in the study's order.
        by_task: what it forgot of each general task.
        stderr: of each objective; () where it was not asked for.
    """

    values: tuple[float, ...]
    by_task: dict[str, float]
    stderr: tuple[float, ...]
