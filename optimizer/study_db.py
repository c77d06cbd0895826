"""The study's SQLite file: created with our mark, checked before Optuna sees it, copied before it is read.

Opening any SQLite file makes Optuna create its tables in it, so a stranger's file must be refused first; and a reader
works on a copy in memory, so that looking at a run never changes it.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

from optuna.storages import RDBStorage
from sqlalchemy.pool import QueuePool, StaticPool

from optimizer.errors import RunError

APPLICATION_ID = 0x4D464E54  # "MFNT"
BUSY_SECONDS = 30.0


def open_storage(database: Path) -> RDBStorage:
    """Open the study file for its one writer, created first where there is none, backed up first where there is one.

    WAL with synchronous=NORMAL: one fsync per checkpoint, and a killed process loses nothing that was committed.

    Raises:
        RunError: the file is damaged, or belongs to another program.
    """
    if os.path.lexists(database):
        with closing(snapshot(database)) as copy:
            _back_up(copy, database.with_name(database.name + ".bak"))
    else:
        _create(database)

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(database, timeout=BUSY_SECONDS, check_same_thread=False)
        connection.execute("PRAGMA synchronous=NORMAL")
        return connection

    # The creator keeps the path out of a URL, where "?", "%" and "{" would mean something.
    return RDBStorage("sqlite://", engine_kwargs={"creator": connect, "poolclass": QueuePool})


def read_storage(database: Path) -> RDBStorage:
    """A storage over a copy of the study file in memory, as it was at this moment, even while a search writes to it."""
    copy = snapshot(database)
    return RDBStorage("sqlite://", engine_kwargs={"creator": lambda: copy, "poolclass": StaticPool})


def snapshot(database: Path) -> sqlite3.Connection:
    """Copy a study file into memory and check that it is whole and ours; the file itself is never changed.

    Raises:
        RunError: the file is damaged, or belongs to another program.
    """
    try:
        copy = _copy_to_memory(database)
        verdict = copy.execute("PRAGMA quick_check(1)").fetchone()[0]
    except (sqlite3.Error, OSError) as error:
        raise _damaged(database, str(error)) from error
    if verdict != "ok":
        raise _damaged(database, verdict)
    if copy.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        raise RunError(f"{database} was not made by mergefront; it is left as it is. Name another run folder")
    return copy


def _copy_to_memory(database: Path) -> sqlite3.Connection:
    # Without a WAL file nobody has the database open. Said to be immutable, it is read without leaving files beside it,
    # and from a folder that may not be written to.
    in_use = database.with_name(database.name + "-wal").exists()
    uri = f"{database.absolute().as_uri()}?{'mode=ro' if in_use else 'immutable=1'}"
    with closing(sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS)) as source:
        copy = sqlite3.connect(":memory:", check_same_thread=False)
        source.backup(copy)
    return copy


def _create(database: Path) -> None:
    with closing(sqlite3.connect(database, timeout=BUSY_SECONDS)) as connection:
        connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
        connection.execute("PRAGMA journal_mode=WAL")


def _back_up(copy: sqlite3.Connection, target: Path) -> None:
    temporary = target.with_name(target.name + ".tmp")
    temporary.unlink(missing_ok=True)
    with closing(sqlite3.connect(temporary)) as connection:
        copy.backup(connection)
    os.replace(temporary, target)


def _damaged(database: Path, words: str) -> RunError:
    backup = database.with_name(database.name + ".bak")
    mend = f"restore the copy {backup.name} beside it" if backup.exists() else "name another run folder"
    return RunError(f"{database} is not a readable study (SQLite says: {words}); it is left as it is. {mend}")
