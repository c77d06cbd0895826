"""Which recipes a person accepts although a guard flags their answers: accepted.json of a run folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from evals.documents import DocumentError, read_json
from optimizer.errors import DamagedError
from optimizer.runs.atomic_file import write_atomically

FORMAT = 1
FILE = "accepted.json"
KINDS = {"trial": int, "recipe": str, "when": str, "flags": list}


def read_accepted(run: Path) -> dict[str, str]:
    """Read the digests of a run's accepted recipes, and when each was accepted.

    Raises:
        DamagedError: the file cannot be read.
    """
    return {str(entry["recipe"]): str(entry["when"]) for entry in _entries(run)}


def accept(run: Path, trial: int, digest: str, flags: Sequence[str]) -> None:
    """Write down that a person accepts a recipe; the caller holds the run's lock.

    Args:
        flags: what the guards said of it, as the person read it.
    """
    entry = {"trial": trial, "recipe": digest, "when": f"{datetime.now():%Y-%m-%d %H:%M:%S}", "flags": [*flags]}
    document = {"format": FORMAT, "accepted": [*_entries(run), entry]}
    write_atomically(run / FILE, (json.dumps(document, indent=1) + "\n").encode())


def _entries(run: Path) -> list[dict[str, Any]]:
    path = run / FILE
    if not path.exists():
        return []
    mend = "restore it, or remove it: then no flagged merge is on the front"
    try:
        document = read_json(path, finite=True)
    except DocumentError as error:
        raise DamagedError(f"{error}; {mend}") from None
    entries = document.get("accepted") if isinstance(document, dict) and document.get("format") == FORMAT else None
    if not isinstance(entries, list) or not all(_is_entry(entry) for entry in entries):
        raise DamagedError(f"{path} must hold format {FORMAT} and accepted, a list of {', '.join(KINDS)}; {mend}")
    return entries


def _is_entry(entry: object) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(key), kind) for key, kind in KINDS.items())
