"""The one way to a person's terminal: whatever a name holds, what is written is text, and no order to the terminal.

Every console and every line of the command line comes from here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from optimizer.words import printable


class Terminal(Console):
    """A rich console that takes no name for markup and writes control characters out, as `printable` does.

    Only rich's own reach the terminal.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **settings})

    def render_str(self, text: str, **settings: Any) -> Text:
        """Render plain text, made printable before it is laid out."""
        return super().render_str(printable(text), **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render anything else, made printable as it is written."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def say(text: str, *, error: bool = False) -> None:
    """Write a line to stdout, or to stderr."""
    typer.echo(printable(text), err=error)
