"""The experts that a study derives: made before the search by one of its workers, and found again by what made them.

A study that names them is planned with the expert each is derived from in its place, which has the same tensors. Once
made they are experts like any other, and the run folder's study names their folders.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.documents import DocumentError, read_bytes, read_json
from evals.outcomes import SEARCH
from evals.plain_text import LARGEST_TEXT
from optimizer.errors import MergeError
from optimizer.runs.atomic_file import write_atomically
from optimizer.study.experts import with_experts
from optimizer.study.space import space_of
from optimizer.workers.orders import Derivation
from optimizer.workers.pool import DeriveJob

if TYPE_CHECKING:
    from optimizer.search.plan import Ready
    from optimizer.study.derived import DerivedEntry
    from optimizer.study.schema import Study
    from optimizer.workers.pool import SerialPool
    from optimizer.workers.ray_pool import RayPool

KNOWN = "known"  # folder of the files that tell which derived folder was made of what
VERSION = 2
WAIT = 3600.0  # seconds

MakePool = Callable[["Study"], "SerialPool | RayPool"]


def said(entry: DerivedEntry) -> str:
    """Say what a derived expert is, as a source in a table."""
    return f"{entry.form} of {entry.from_} at {entry.lambda_:g}, made by the search"


def with_derived(ready: Ready, folder: Path, make_pool: MakePool, say: Callable[[str], None]) -> Ready:
    """Return what is ready with the derived experts made, or found, and opened.

    Args:
        ready: of a study that may name some; its requests are prepared.
        folder: where their folders lie.
        make_pool: starts workers for a study.
        say: tells a person what is being made.

    Raises:
        MergeError: an expert cannot be made; the key is named.
        CheckpointError: one that was made cannot be opened.
    """
    from optimizer.checkpoints.opening import open_checkpoint

    derived = ready.study.models.derived
    if not derived:
        return ready
    sources = {name: source for name, source in ready.study.models.experts.items() if name not in derived}
    plain = with_experts(ready.study, sources)
    keys = {name: _key(ready, entry) for name, entry in derived.items()}
    found = {name: _found(folder, key) for name, key in keys.items()}
    if missing := [name for name, path in found.items() if path is None]:
        one = plain.workers.model_copy(update={"count": min(1, plain.workers.count)})
        with make_pool(plain.model_copy(update={"workers": one})) as pool:
            for name in missing:
                say(f"deriving {name}: {derived[name].form} of {derived[name].from_} at {derived[name].lambda_:g}")
                found[name] = made = _made(pool, name, derived[name], folder)
                about = json.dumps({"folder": made.name, "expert": name}) + "\n"
                (folder / KNOWN).mkdir(exist_ok=True)
                write_atomically(_known(folder, keys[name]), about.encode())
    experts = sources | {name: str(path) for name, path in found.items()}
    study = with_experts(ready.study, experts)
    study = study.model_copy(update={"models": study.models.model_copy(update={"derived": {}})})
    opened = {name: open_checkpoint(experts[name], base=ready.base) for name in derived}
    space = space_of(study, ready.base.names)
    return replace(ready, study=study, experts={**ready.experts, **opened}, space=space)


def _made(pool: SerialPool | RayPool, name: str, entry: DerivedEntry, folder: Path) -> Path:
    """Have a worker make an expert."""
    given = entry.calibration
    texts = None if given is None else (Path(given.general), Path(given.domain))
    pool.submit(DeriveJob(0, Derivation(entry.form, entry.from_, (entry.lambda_,), folder, texts)))
    results = pool.wait(WAIT)
    if not results:
        raise MergeError(f"models.derived.{name}: it took more than {WAIT:.0f} s")
    if results[0].error:
        raise MergeError(f"models.derived.{name}: {results[0].error}")
    made: list[Path] = results[0].answer
    return made[0]


def _key(ready: Ready, entry: DerivedEntry) -> str:
    """Hash all that decides an expert's numbers, as far as it is known without a model in memory."""
    models = ready.base.fingerprint, ready.experts[entry.from_].fingerprint
    told: list[Any] = [VERSION, entry.form, entry.lambda_, *models, ready.study.evals.dtype]
    if entry.calibration is not None:
        files = entry.calibration.general, entry.calibration.domain
        told += [hashlib.sha256(read_bytes(file, limit=LARGEST_TEXT, error=MergeError)).hexdigest() for file in files]
    else:
        told += [entry.from_, [asdict(task) for task in ready.harness.infos], ready.harness.request_hashes()[SEARCH]]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def _known(folder: Path, key: str) -> Path:
    return folder / KNOWN / f"{key}.json"


def _found(folder: Path, key: str) -> Path | None:
    """Return the folder of an expert that was made before, if it is there and whole."""
    from optimizer.workers.deriver import MANIFEST

    try:
        told = read_json(_known(folder, key))
    except DocumentError:
        return None
    name = told.get("folder") if isinstance(told, dict) else None
    if not isinstance(name, str) or Path(name).name != name:
        return None
    return folder / name if (folder / name / MANIFEST).is_file() else None
