"""What may go wrong with tasks and their scores; a person can mend each of these."""

from __future__ import annotations


class TaskError(ValueError):
    """A task cannot be read, split, run or measured as asked."""


class ScoreError(TaskError):
    """A candidate gave no usable number (a NaN or infinite log-likelihood): a failed trial, never a score."""
