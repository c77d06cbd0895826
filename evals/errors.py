"""What may go wrong with tasks and their scores; a person can mend each of these."""

from __future__ import annotations


class TaskError(ValueError):
    """A task cannot be read, split, run or measured as asked."""


class ScoreError(TaskError):
    """A candidate gave no usable number (a NaN or infinite log-likelihood): a failed trial, never a score."""


def error_text(error: Exception) -> str:
    """Return an exception's message; a foreign one's after its kind."""
    return str(error) if isinstance(error, TaskError) else f"{type(error).__name__}: {shortened(error)}"


def shortened(value: object) -> str:
    """Return a value's text on one line, at most 200 characters of it."""
    text = " ".join(str(value).split())
    return text if len(text) <= 200 else f"{text[:200]}…"
