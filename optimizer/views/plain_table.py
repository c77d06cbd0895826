"""A plain table of the terminal: cells as they stand, without markup."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from rich import box
from rich.table import Table
from rich.text import Text

from optimizer.words import printable


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Sequence[str] = ()) -> Table:
    """Make a plain table; cells are shown as they stand, without markup, and no narrow terminal breaks a word.

    Args:
        right: columns of numbers, set flush right; what is said on one line of a cell stays on it.
    """
    made = Table(
        title=Text(printable(title), style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        show_header=any(columns),
    )
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    for column, *below in zip(map(printable, columns), *cells, strict=True):
        side: Literal["left", "right"] = "right" if column in right else "left"
        made.add_column(
            Text(column), justify=side, overflow="fold", no_wrap=column in right or not _breaks([column, *below])
        )
    for row in cells:
        made.add_row(*map(Text, row))
    return made


def _breaks(texts: Iterable[str]) -> bool:
    """Tell whether lines of these texts can be broken between words, or are paths."""
    return any(" " in text or "/" in text for text in texts)
