"""The writing side of a run folder: made whole or not at all, one writer, every file renamed into place.

runs/<name>/: study.yaml  study.db  tasks.json  outcomes/<trial>-<suite>.parquet  front.json  report.html  log.txt  lock
`recorded` is the reading side.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import socket
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import optuna
import pandas as pd
from optuna.storages import RDBStorage
from optuna.study import StudyDirection

from evals.outcomes import Outcome, TaskInfo
from optimizer.database.study_home import DATABASE, close, make_storage, new_name, open_study_storage, take_study
from optimizer.database.study_url import storage_label
from optimizer.errors import RunError, UnavailableError
from optimizer.masking import redacted
from optimizer.runs.atomic_file import sync_folder, unwritten, write_atomically
from optimizer.runs.differences import differences
from optimizer.runs.manifest import FORMAT, read_manifest, stored_study, task_entry
from optimizer.runs.outcome_files import outcomes_path, read_outcomes, sound_outcomes, write_outcomes
from optimizer.strict_yaml import parse_yaml
from optimizer.words import printable


@dataclass(frozen=True, slots=True)
class RunFolder:
    """One run's folder, as its only writer sees it.

    Args:
        path: the folder; it exists and holds a study.yaml and a tasks.json.
    """

    path: Path

    @classmethod
    def create_or_resume(
        cls,
        path: Path | str,
        study_yaml: str,
        fingerprint: Mapping[str, object],
        *,
        tasks: Sequence[TaskInfo],
        storage: str | None = None,
    ) -> RunFolder:
        """Make the folder, or take up one that was made from the same things.

        Args:
            study_yaml: the resolved study file; on resume it replaces the stored one (the budget may have grown).
            fingerprint: every setting a score depends on, as (nested) JSON values: checkpoints, items, dtype, space.
            storage: the URL of the study's database; None for study.db in the folder.

        Raises:
            RunError: the folder is not a run, cannot be written, or was made from other things; each is named.
        """
        folder = Path(path)
        manifest = {
            "format": FORMAT,
            "tasks": [task_entry(task) for task in tasks],
            "fingerprint": json.loads(json.dumps(fingerprint)),
            "study": new_name(folder, storage),
            "storage": storage_label(storage),
        }
        if not _holds_something(folder):
            _create(folder, study_yaml, manifest)
        _require_writable(folder)
        stored = read_manifest(folder)
        _require_same(folder, stored, manifest, study_yaml)
        if (folder / "tasks.json").read_bytes() != _as_json(stored):  # an earlier version's did not name the study
            write_atomically(folder / "tasks.json", _as_json(stored))
        write_atomically(folder / "study.yaml", redacted(study_yaml).encode())
        return cls(folder)

    @property
    def database(self) -> Path:
        return self.path / DATABASE

    def lock(self) -> RunLock:
        """Become the folder's one writer until the lock is released or this process ends, however it ends.

        Raises:
            UnavailableError: another process holds the lock; it is named.
            RunError: the folder cannot be written, or its lock is not a plain file.
        """
        return RunLock(self.path / "lock")

    def storage(self, url: str | None = None) -> RDBStorage:
        """Open the Optuna storage: checked first (and study.db copied to study.db.bak), created where there is none.

        Args:
            url: of a database outside the folder.
        """
        return open_study_storage(self.path, url)

    @contextmanager
    def opened_storage(self, url: str | None) -> Iterator[RDBStorage]:
        """Open the Optuna storage as `storage` does, closed at the end.

        Whoever closes the last connection to a SQLite file in WAL mode must sync it to the disk. A connection of our
        own that stays open spares every commit that wait.
        """
        storage = self.storage(url)
        try:
            with storage.engine.connect() as connection:
                if connection.dialect.name == "sqlite":
                    connection.exec_driver_sql("PRAGMA schema_version").fetchall()  # only a reader has the file open
                    connection.rollback()
                yield storage
        finally:
            close(storage)

    def study(self, storage: RDBStorage, url: str | None, directions: Sequence[StudyDirection]) -> optuna.Study:
        """Take this folder's study in its storage, made where there is none; see `take_study`."""
        manifest = read_manifest(self.path)
        study, name = take_study(storage, self.path, manifest, url, directions)
        if url is not None and name != manifest["study"]:
            write_atomically(self.path / "tasks.json", _as_json({**manifest, "study": name}))
            self.log(f"this folder is a copy: its study is now {name}, a copy of {manifest['study']}")
        return study

    def write_outcomes(self, trial: int, suite: str, digest: str, outcomes: Iterable[Outcome]) -> Path:
        """Write one trial's outcomes; they are on the disk, whole, when this returns.

        Args:
            digest: the recipe's digest, kept with the rows so that a resumed search can trust them.
        """
        return write_outcomes(self.path, trial, suite, digest, outcomes)

    def has_outcomes(self, trial: int, suite: str) -> bool:
        """Tell whether there is something under the name of a trial's outcomes, of whatever worth."""
        return os.path.lexists(outcomes_path(self.path, trial, suite))

    def outcomes_fault(self, trial: int, suite: str, *, digest: str, tasks: Sequence[TaskInfo]) -> str:
        """Say what keeps a trial's stored outcomes from use, in words that name the file; empty where nothing does.

        Args:
            digest, tasks: as of `sound_outcomes`.
        """
        try:
            sound_outcomes(self.path, trial, suite, digest=digest, tasks=tasks)
        except RunError as error:
            return str(error)
        return ""

    def read_outcomes(self, trial: int, suite: str) -> pd.DataFrame:
        """Read the stored outcomes of one trial: columns trial and OUTCOME_COLUMNS."""
        return read_outcomes(outcomes_path(self.path, trial, suite))

    def log(self, text: str) -> None:
        """Append a line with the time to log.txt, secrets blacked out."""
        line = f"{datetime.now():%Y-%m-%d %H:%M:%S} {printable(redacted(text))}\n"
        path = self.path / "log.txt"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise unwritten(path, len(line), error) from error


class RunLock:
    """An exclusive flock: the kernel frees it when the process dies, so a leftover file means nothing."""

    def __init__(self, path: Path) -> None:
        self._file = _opened_lock(path)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise UnavailableError(
                f"one search at a time may write to {path.parent}; it is in use by {holder}. "
                "Wait for it to end, or name another run folder"
            ) from None
        except OSError as error:
            self._file.close()
            raise RunError(f"{path} cannot be locked ({error}); put the run folder on a local disk") from error
        command = redacted(shlex.join(sys.argv))
        about = (
            f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S} ({command})\n"
        )
        try:
            self._file.truncate(0)
            self._file.write(about)
            self._file.flush()
        except OSError as error:
            with suppress(OSError):  # what was not written is tried again
                self._file.close()
            raise unwritten(path, len(about), error) from error

    def release(self) -> None:
        """Give the folder back; releasing twice does nothing."""
        if not self._file.closed:
            self._file.truncate(0)
            self._file.close()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def is_run(folder: Path) -> bool:
    """Tell whether a folder is a run's, sound or not."""
    return (folder / "tasks.json").is_file()


def is_locked(folder: Path) -> bool:
    """Tell whether a search writes to a run folder now; asking leaves the folder as it is."""
    try:
        descriptor = os.open(folder / "lock", os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def _opened_lock(path: Path) -> IO[str]:
    """Open the lock file, made where there is none. A link would let us empty another file; a pipe would wait."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o644)
    except OSError as error:
        if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
            raise _no_lock(path) from error
        raise RunError(
            f"a search must write to {path.parent}: {error.strerror}; `report` and `front` still work"
        ) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _no_lock(path)
    return open(descriptor, "a+", encoding="utf-8")


def _no_lock(path: Path) -> RunError:
    return RunError(f"{path} must be a plain file, made by `mergefront search`; remove what is there")


def renew_fingerprints(folder: Path, renewed: Mapping[str, str]) -> None:
    """Store today's fingerprints of checkpoints where an earlier version stored others, with times, for the same files.

    Args:
        folder: a run's, or none yet.
        renewed: today's fingerprint for each that an earlier version would have given.
    """
    if not (folder / "tasks.json").is_file():
        return
    manifest = read_manifest(folder)
    stored = manifest["fingerprint"]
    assert isinstance(stored, dict)

    old = {key: stored[key] for key in ("base", "experts") if key in stored}
    new = {key: _renewed(value, renewed) for key, value in old.items()}
    if new != old:
        manifest["fingerprint"] = {**stored, **new}
        write_atomically(folder / "tasks.json", _as_json(manifest))


def _renewed(given: object, renewed: Mapping[str, str]) -> object:
    if isinstance(given, dict):
        return {name: _renewed(inner, renewed) for name, inner in given.items()}
    return renewed.get(given, given) if isinstance(given, str) else given


def _as_json(manifest: Mapping[str, object]) -> bytes:
    return json.dumps(manifest, indent=1).encode()


def _holds_something(folder: Path) -> bool:
    if not os.path.lexists(folder):
        return False
    if not folder.is_dir():
        raise RunError(f"a run needs a folder, but {folder} is a file; name another run folder")
    return any(folder.iterdir())


def _create(folder: Path, study_yaml: str, manifest: Mapping[str, object]) -> None:
    """Fill a folder beside the final one and rename it, so that a run folder is whole as soon as it has its name."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name[:64]}.", suffix=".tmp"))
    except OSError as error:
        raise RunError(f"cannot make a run folder in {folder.parent}: {error.strerror}") from error
    try:
        draft.chmod(0o755)
        (draft / "outcomes").mkdir()
        write_atomically(draft / "study.yaml", redacted(study_yaml).encode())
        write_atomically(draft / "tasks.json", _as_json(manifest))
        if manifest["storage"] is None:
            make_storage(draft)
        os.rename(draft, folder)
    except OSError as error:
        if not folder.is_dir():  # else another process made it first: resume that one
            raise RunError(f"cannot make the run folder {folder}: {error.strerror}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    sync_folder(folder.parent)


def _require_writable(folder: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RunError(f"a search must write to {folder}: {error.strerror}; `report` and `front` still work") from error


def _require_same(folder: Path, stored: Mapping[str, Any], given: Mapping[str, Any], study_yaml: str) -> None:
    """Refuse another study, naming all that differs; the stored study file has the paths, a manifest only digests."""
    new_study = parse_yaml(redacted(study_yaml), "the study") or {}
    changed = differences(stored, given, old_study=stored_study(folder), new_study=new_study)
    if changed:
        lines = "".join(f"  {line}\n" for line in changed)
        raise RunError(
            f"{folder} was made from another study, and scores from both would not compare; what changed:\n{lines}"
            "change it back to resume, or name another run folder"
        )
