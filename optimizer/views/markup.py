"""Parts of the report as HTML: text that is inert whatever it holds, and tables."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from optimizer.words import Change, Interval


def grid(titles: Sequence[str], rows: Sequence[Sequence[object]], *, marked: int | None = None) -> str:
    """Write a table that scrolls where it is too wide; on a narrow screen each row is a list of titles and cells.

    Args:
        marked: the place of the knee's row.
    """
    head = "".join(f"<th>{breakable(title).replace(', ', ',<br>')}</th>" for title in titles)
    body = []
    for place, row in enumerate(rows):
        cells = "".join(
            f'<td data-title="{inert(title)}">{_cell(value)}</td>' for title, value in zip(titles, row, strict=True)
        )
        body.append(f"<tr{' class=knee' if place == marked else ''}>{cells}</tr>")
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def _cell(value: object) -> str:
    """Write a cell; a figure may be broken from its interval only."""
    if isinstance(value, Interval | Change) and value.bounds:
        return f"<div><span>{inert(value.figure)}</span> <span>{inert(value.bounds)}</span></div>"
    text = value.text() if isinstance(value, Interval | Change) else str(value)
    return f"<div>{breakable(text)}</div>" if text else ""


def breakable(value: object) -> str:
    """Write a name that may be broken after its bars and dashes."""
    return re.sub("([-_])", r"\1<wbr>", inert(value))


def inert(value: object) -> str:
    """Write any value as inert text: escaped, control characters gone."""
    return html.escape("".join(c if c.isprintable() or c == "\n" else " " for c in str(value)))
