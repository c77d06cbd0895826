"""The texts of items that the recommended merge lost or won, as front.json keeps them for readers without the tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from evals.documents import DocumentError, read_json

LARGEST = 64_000_000  # bytes of front.json
TEXTS = ("question", "right", "base", "merge")  # what was asked, the right answers, what base and merge answered


def with_texts(flipped: pd.DataFrame, run: Path, trial: int) -> pd.DataFrame:
    """Add columns `TEXTS` to a trial's flipped items: empty where front.json has none of them.

    Args:
        flipped: columns task, item, change.
    """
    known = _stored(run, trial)
    keys = zip(flipped["task"], flipped["item"], strict=True)
    texts = [known.get(key, dict.fromkeys(TEXTS, "")) for key in keys]
    return flipped.assign(**{name: [text[name] for text in texts] for name in TEXTS})


def _stored(run: Path, trial: int) -> dict[tuple[str, str], dict[str, str]]:
    """Read what front.json keeps of a trial's items; nothing where it is of another, or written by hand."""
    path = run / "front.json"
    if not path.is_file():
        return {}
    try:
        document = read_json(path, limit=LARGEST)
    except DocumentError:
        return {}
    part = document.get("flipped") if isinstance(document, dict) else None
    rows = part.get("items") if isinstance(part, dict) and part.get("trial") == trial else None
    return {(row["task"], row["item"]): row for row in rows or () if _is_sound(row)} if isinstance(rows, list) else {}


def _is_sound(row: Any) -> bool:
    return isinstance(row, dict) and all(isinstance(row.get(name), str) for name in ("task", "item", *TEXTS))
