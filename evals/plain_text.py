"""A plain text file as items, so that a task needs neither a task file nor labels: cut where the text itself pauses."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from evals.documents import read_text
from evals.errors import TaskError

LARGEST_TEXT = 20_000_000  # bytes of a text file
LONGEST = 600  # characters of an item: some 150 tokens of prose
SHORTEST = 100  # of the last one; a shorter rest belongs to the item before it
LEAST_ITEMS = 10  # different ones: fewer cannot be shared out among search, holdout and certificates
PAUSES = (
    re.compile(r"\n[^\S\n]*\n\s*"),  # between paragraphs
    re.compile(r"[.!?\u2026][^\w\s]*\s+|[\u3002\uff01\uff1f]"),  # between sentences, also those of Chinese
    re.compile(r"\n\s*"),
    re.compile(r"\s+"),
)


class Piece(NamedTuple):
    """One item of a text, without the space around it, and the line of the file it begins in."""

    text: str
    line: int


def read_pieces(path: Path) -> list[Piece]:
    """Cut a UTF-8 text file into items of 300 to 600 characters, in the order of the file.

    An item ends at the last pause in its second half: between paragraphs, else sentences, else lines, else words. Line
    ends are newlines whatever the file's are, and a byte-order mark is no part of the text.

    Raises:
        TaskError: the file is none, is too large, is not UTF-8, or gives fewer than ten different items.
    """
    text = read_text(path, limit=LARGEST_TEXT, error=TaskError).removeprefix("\ufeff")
    pieces = list(_pieces(text.replace("\r\n", "\n").replace("\r", "\n")))
    if not pieces:
        raise TaskError(f"{path}: holds no text; give a file of some {LEAST_ITEMS * LONGEST:,} characters or more")
    if (found := len({piece.text for piece in pieces})) < LEAST_ITEMS:
        raise TaskError(
            f"{path}: a text must give {LEAST_ITEMS} different items of at most {LONGEST} characters; this one gives "
            f"{found}; take more text"
        )
    return pieces


def _pieces(text: str) -> Iterator[Piece]:
    start, line, at = 0, 1, 0
    while start < len(text):
        end = _end(text, start)
        piece = text[start:end]
        begins = start + len(piece) - len(piece.lstrip())
        line, at = line + text.count("\n", at, begins), begins
        if piece.strip():
            yield Piece(piece.strip(), line)
        start = end


def _end(text: str, start: int) -> int:
    """Find where the item that begins at `start` ends: after a pause, so that the next one begins with a word."""
    if len(text) - start <= LONGEST + SHORTEST:
        return len(text)
    for pause in PAUSES:
        ends = [found.end() for found in pause.finditer(text, start + LONGEST // 2, start + LONGEST)]
        if ends:
            return ends[-1]
    return start + LONGEST
