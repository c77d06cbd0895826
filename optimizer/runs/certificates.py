"""The certificates of a run folder: what was to be tested, written before it was, what came of it, and what is spent.

runs/<name>/certificates/<n>/: ledger.json (before the first item is scored)  certificate.json (at the end)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.certificates import BUDGET
from evals.documents import DocumentError, read_json
from optimizer.errors import DamagedError, RunError
from optimizer.runs.atomic_file import write_atomically
from optimizer.words import count, percent

FORMAT = 1
LEDGER, CERTIFICATE = "ledger.json", "certificate.json"
LARGEST = 200_000_000  # bytes: every loss and bet of a test is in it
SLACK = 1e-9
MEND = "restore the file: without it nobody knows which items are spent"


def exactly(share: float) -> str:
    """Write a share that a person gave in per cent, with all its digits: `0.01 %`."""
    return f"{100 * share:.8g} %"


@dataclass(frozen=True, slots=True)
class Question:
    """What a person wants certified.

    Args:
        max_forgetting: a share, above 0 and below 1.
        min_gain: a share of the expert's gain, above 0 and at most 1; None: no matter.
        each_task: the limit holds on every general task, not for their mean alone.
        delta: how often the answer may be wrong.
    """

    max_forgetting: float
    min_gain: float | None
    each_task: bool
    delta: float

    def __post_init__(self) -> None:
        shares = {"--max-forgetting": self.max_forgetting, "--delta": self.delta}
        for option, given in shares.items():
            if not 0 < given < 1:
                raise RunError(f"{option} is a share between 0 and 1: 5 % is 0.05; given {given:g}")
        if self.min_gain is not None and not 0 < self.min_gain <= 1:
            raise RunError(f"--min-gain is a share of the expert's gain, up to 1: half is 0.5; given {self.min_gain:g}")

    @property
    def words(self) -> str:
        """What a recipe is said to do: `forgets at most 5 % of general ability`."""
        where = "of its ability on each general task" if self.each_task else "of general ability"
        gain = "" if self.min_gain is None else f", and keeps at least {exactly(self.min_gain)} of the domain gain"
        return f"forgets at most {exactly(self.max_forgetting)} {where}{gain}"

    @property
    def confidence(self) -> str:
        """How sure a certificate is: `90 %`."""
        return exactly(1 - self.delta)

    def document(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {name: getattr(self, name) for name in ("max_forgetting", "min_gain", "each_task", "delta")}


@dataclass(frozen=True, slots=True)
class Record:
    """One certificate's folder, and what is in it; no certificate while it is open."""

    folder: Path
    ledger: Mapping[str, Any]
    certificate: Mapping[str, Any] | None

    @property
    def delta(self) -> float:
        """The error that it took of the run's budget."""
        return float(self.ledger["question"]["delta"])


def read_records(run: Path) -> list[Record]:
    """Read the certificates of a run, in the order they were asked for.

    Raises:
        DamagedError: one of the files cannot be read.
    """
    folder = run / "certificates"
    found = sorted(folder.glob("*/" + LEDGER)) if folder.is_dir() else []
    return [_record(path.parent) for path in found]


def _record(folder: Path) -> Record:
    ledger = _read(folder / LEDGER, {"items": dict, "blocks": int, "candidates": list})
    if not (folder / CERTIFICATE).exists():
        return Record(folder, ledger, None)
    kinds = {"sentence": str, "digest": str, "trial": (int, type(None)), "tested": list, "spent": dict, "budget": dict}
    certificate = _read(folder / CERTIFICATE, kinds)
    rows = [certificate["budget"].get("left"), certificate["budget"].get("all")]
    rows += [row.get(key) for row in certificate["spent"].values() if isinstance(row, dict) for key in ("used", "of")]
    if not all(type(number) in (int, float) for number in rows):
        raise DamagedError(f"{folder / CERTIFICATE}: spent and budget must hold numbers; {MEND}")
    return Record(folder, ledger, certificate)


def _read(path: Path, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Read a JSON file that has these keys, with values of these kinds, beside its format and the question."""
    try:
        document = read_json(path, limit=LARGEST, finite=True)
    except DocumentError as error:
        raise DamagedError(f"{error}; {MEND}") from None
    kinds = {"format": int, "question": dict, **kinds}
    if not isinstance(document, dict) or not set(kinds) <= set(document) or document["format"] != FORMAT:
        raise DamagedError(f"{path} is none of format {FORMAT} with the keys {', '.join(kinds)}; {MEND}")
    if wrong := [key for key, kind in kinds.items() if not isinstance(document[key], kind)]:
        raise DamagedError(f"{path}: {', '.join(wrong)} holds another kind of value than `certify` wrote; {MEND}")
    try:
        Question(**document["question"])
    except (TypeError, RunError) as error:
        raise DamagedError(f"{path}: question holds no limits ({error}); {MEND}") from None
    return document


def left_of_budget(records: list[Record]) -> float:
    """Return the error that further certificates of a run may have together."""
    return max(0.0, BUDGET - sum(record.delta for record in records))


def require_budget(records: list[Record], delta: float) -> None:
    """Raise RunError where the certificates of a run have used up what error they may have together."""
    left = left_of_budget(records)
    if delta > left + SLACK:
        before = f"{count(len(records), 'certificate')} took {percent(BUDGET - left)}"
        mend = f"ask with --delta {left:.2g} or less, or certify" if left > SLACK else "certify"
        raise RunError(
            f"all certificates of a run share one error of {percent(BUDGET)}, since they look at the same items: "
            f"{before}, {percent(left)} is left, and {percent(delta)} was asked for; {mend} on a run with other items "
            "(evals.seed)"
        )


def new_record(run: Path, ledger: Mapping[str, Any]) -> Record:
    """Write a ledger into a folder of its own; it is on the disk when this returns."""
    folder = run / "certificates" / f"{len(read_records(run)) + 1:04d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make {folder}: {error.strerror}") from error
    write_atomically(folder / LEDGER, _json(ledger))
    return _record(folder)


def close_record(record: Record, certificate: Mapping[str, Any]) -> Record:
    """Write what came of a certificate beside its ledger."""
    write_atomically(record.folder / CERTIFICATE, _json(certificate))
    return _record(record.folder)


def answers(run: Path) -> list[tuple[str, str]]:
    """Return what the certificates of a run say: of each the digest of its recipe, empty where none was certified, and
    its sentence. Nothing where the files are damaged."""
    try:
        records = read_records(run)
    except DamagedError:
        return []
    found = (record.certificate for record in records if record.certificate is not None)
    return [(str(one["digest"]), str(one["sentence"])) for one in found]


def certified(run: Path, digest: str) -> list[str]:
    """Return what is certified of a recipe, a sentence for each certificate."""
    return [sentence for of, sentence in answers(run) if of == digest]


def _json(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=1, allow_nan=False) + "\n").encode()
