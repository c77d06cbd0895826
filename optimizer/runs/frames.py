"""Frames as plain rows, where a row is read by name."""

from __future__ import annotations

from typing import Any

import pandas as pd

from evals.outcomes import HOLDOUT, SEARCH
from optimizer.errors import RunError

Row = dict[str, Any]


def rows_of(frame: pd.DataFrame) -> dict[Any, Row]:
    """Return a frame's rows in order, by index: column name to value."""
    return {index: {str(name): value for name, value in row.items()} for index, row in frame.to_dict("index").items()}


def prefix_of(suite: str) -> str:
    """Return what stands before the names of a suite's figures in a frame that holds those of both."""
    if suite not in (SEARCH, HOLDOUT):
        raise RunError(f"a suite is {SEARCH} or {HOLDOUT}, not {suite}")
    return "holdout_" if suite == HOLDOUT else ""
