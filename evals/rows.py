"""The items of a data file of JSON lines: read within bounds, made into lm-eval's dataset, and found again by line.

lm-eval would leave such files to `datasets`, whose errors name no line and whose cache workers would share and lock.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from evals.documents import parse_json, read_text
from evals.errors import TaskError

LARGEST_DATA = 250_000_000  # bytes of a data file
MOST_ROWS = 1_000_000
MOST_COLUMNS = 1_000


class Row(NamedTuple):
    """One item as it was written, and where."""

    values: dict[str, Any]
    path: Path
    line: int

    @property
    def place(self) -> str:
        return f"{self.path}, line {self.line}"


class Rows:
    """The rows of a task by split; called by lm-eval for its dataset."""

    def __init__(self, splits: Mapping[str, Sequence[Row]]) -> None:
        self.splits = splits

    def __call__(self, **_: object) -> datasets.DatasetDict:
        return datasets.DatasetDict({split: _dataset(rows) for split, rows in self.splits.items()})

    def __deepcopy__(self, _: object) -> Rows:
        return self  # lm-eval copies settings, and need not copy the data

    def as_written(self, split: str, n: int) -> dict[str, Any]:
        """Return a row before its numbers took the kind of their column."""
        rows = self.splits[split]
        return dict.fromkeys(_columns(rows)) | rows[n].values


def read_rows(path: Path) -> list[Row]:
    """Read the items of a file of JSON lines, or of one JSON list.

    Raises:
        TaskError: naming the file and the line.
    """
    if not path.exists():
        raise TaskError(f"no data file {path} (dataset_kwargs.data_files)")
    text = read_text(path, limit=LARGEST_DATA, error=TaskError)
    rows: list[Row] = []
    for n, value in _list(text, path) if text.lstrip()[:1] == "[" else _lines(text, path):
        if not isinstance(value, dict):
            raise TaskError(f"each item must be a JSON object: {path}, line {n}")
        if len(rows) == MOST_ROWS:
            raise TaskError(f"{path}: a data file may have {MOST_ROWS:,} items; given more; take a part of them")
        rows.append(Row(value, path, n))
    if not rows:
        raise TaskError(f"no item in {path}")
    return rows


def _list(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    return enumerate(parse_json(text, str(path), finite=True, error=TaskError), 1)


def _lines(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    start, n = 0, 0
    while start < len(text):
        end = text.find("\n", start)
        end = len(text) if end < 0 else end
        line, start, n = text[start:end], end + 1, n + 1
        if line.strip():
            yield n, parse_json(line, f"{path}, line {n}", finite=True, error=TaskError)


def _columns(rows: Sequence[Row]) -> list[str]:
    columns: dict[str, None] = {}
    for row in rows:
        columns |= dict.fromkeys(row.values)
        if len(columns) > MOST_COLUMNS:
            raise TaskError(f"{row.place}: items may have {MOST_COLUMNS:,} different keys; these have more")
    return list(columns)


def _dataset(rows: Sequence[Row]) -> datasets.Dataset:
    columns = {key: [row.values.get(key) for row in rows] for key in _columns(rows)}
    try:
        return datasets.Dataset.from_dict(columns)
    except Exception as error:  # pyarrow has an exception for each kind of mismatch
        raise TaskError(_misfit(rows, columns) or str(error)) from error


def _misfit(rows: Sequence[Row], columns: Mapping[str, list[Any]]) -> str:
    """Find which value does not fit the column it stands in, by halves."""
    for key, values in columns.items():
        if _fits(key, values):
            continue
        low, high = 0, len(values)  # the first `low` values fit, the first `high` do not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if _fits(key, values[:middle]) else (low, middle)
        return (
            f"{rows[low].place}: {key} must be of one kind in all items, and numbers of 64 bits; "
            f"given {_short(values[low])} after {_short(next((v for v in values[:low] if v is not None), None))}"
        )
    return ""


def _fits(key: str, values: list[Any]) -> bool:
    try:
        datasets.Dataset.from_dict({key: values})
    except Exception:  # as above
        return False
    return True


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
