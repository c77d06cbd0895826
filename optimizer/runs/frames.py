"""Frames as plain rows, where a row is read by name."""

from __future__ import annotations

from typing import Any

import pandas as pd

Row = dict[str, Any]


def rows_of(frame: pd.DataFrame) -> dict[Any, Row]:
    """Return a frame's rows in order, by index: column name to value."""
    return {index: {str(name): value for name, value in row.items()} for index, row in frame.to_dict("index").items()}
