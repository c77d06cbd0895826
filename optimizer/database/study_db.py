"""The study's database: made with our mark, checked before Optuna sees it, copied before it is read.

Opening any database makes Optuna create its tables in it, so a stranger's must be refused first; and a reader works on
a copy in memory, so that looking at a run never changes it. `study_url` reads URLs, `study_server` is for servers.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import tempfile
from collections.abc import Callable, Iterable
from contextlib import closing
from functools import cache, partial
from pathlib import Path

from optuna.storages import RDBStorage
from optuna.storages._rdb.models import BaseModel
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import Pool, QueuePool, StaticPool

from evals.documents import KINDS
from optimizer.database.stored_trials import read_trials, readable
from optimizer.database.study_url import BUSY_SECONDS
from optimizer.errors import DamagedError, RunError, UnavailableError
from optimizer.masking import redacted
from optimizer.room import require_room

APPLICATION_ID = 0x4D464E54  # "MFNT"
MARK = "mergefront"  # an attribute of our studies: the run folder it belongs to
TABLES = frozenset({*BaseModel.metadata.tables, "alembic_version"})  # Optuna's
LARGEST = 2**30  # bytes; ten thousand trials take 13 MB
GROWTH = 2**20  # bytes a search may well add
IN_THE_WAY = {  # what SQLite says of things outside the file
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN,
}


def open_storage(database: Path, *, own: bool = True, busy_seconds: float = BUSY_SECONDS) -> RDBStorage:
    """Open the study file for its one writer, created first where there is none, checked first where there is one.

    WAL with synchronous=NORMAL: one fsync per checkpoint, and a killed process loses nothing that was committed.

    Args:
        own: it is the run folder's own study.db: it must have our mark, and is copied to study.db.bak first.
        busy_seconds: how long to wait for another program that has the file locked.

    Raises:
        DamagedError: the file is damaged, or holds anything but studies of ours.
        UnavailableError: there is no room for it, or another program has it.
    """
    try:
        if os.path.lexists(database):
            _check(database, own)
        else:
            require_room(database.parent, GROWTH)
            create(database)
        # The creator keeps the path out of a URL, where "?", "%" and "{" would mean something.
        connect = partial(_connected, database, busy_seconds)
        return _opened(connect, QueuePool)
    except (sqlite3.Error, SQLAlchemyError, OSError) as error:
        raise unwritable(database, error) from error


def read_storage(database: Path, *, own: bool = True) -> RDBStorage:
    """Open a storage over a copy of the study file in memory, as it is at this moment, even while a search writes."""
    return _over(snapshot(database, own=own), database)


def snapshot(database: Path, *, own: bool = True) -> sqlite3.Connection:
    """Copy a study file into memory and check that it is whole and Optuna's only; the file itself is never changed.

    Args:
        own: it must have our mark.

    Raises:
        DamagedError: the file is damaged, or belongs to another program.
        UnavailableError: another program has it, or there is no room for what SQLite writes beside it.
    """
    try:
        if problem := _no_file(database):
            raise _damaged(database, problem, own=own)
        copy = _copied(database, own)
        verdict = copy.execute("PRAGMA quick_check(1)").fetchone()[0]
    except (sqlite3.Error, OSError) as error:
        if isinstance(error, OSError) or getattr(error, "sqlite_errorcode", 0) & 0xFF in IN_THE_WAY:
            require_room(database.parent, room_needed(database))
            raise UnavailableError(f"{database} cannot be read now ({error}); it is left as it is") from error
        raise _damaged(database, f"SQLite says: {error}", own=own) from error
    if verdict != "ok":
        raise _damaged(database, f"SQLite says: {verdict}", own=own)
    return copy


def require_ours(storage: RDBStorage, where: object) -> None:
    """Refuse a database without our mark that somebody else keeps studies in, and that none of ours is in yet."""
    with readable(where):
        whose = {study.study_name: is_ours(storage, study.study_name) for study in storage.get_all_studies()}
    strangers = [f"study {name!r}" for name, ours in whose.items() if ours is False]
    if strangers and True not in whose.values():
        raise stranger(where, strangers)


def is_ours(storage: RDBStorage, name: str) -> bool | None:
    """Tell whether a study was made by a search; None for one without a trial, which is nobody's."""
    study_id = storage.get_study_id_from_name(name)
    if MARK in storage.get_study_user_attrs(study_id):
        return True
    try:
        first = storage.get_trial_id_from_study_id_trial_number(study_id, 0)
    except KeyError:
        return None
    return "kind" in storage.get_trial(first).user_attrs


def require_tables(names: Iterable[str], where: object) -> None:
    """Refuse a database that holds tables of another program than Optuna."""
    others = sorted(name for name in names if name not in TABLES)
    if others:
        raise stranger(where, [f"table {name!r}" for name in others])


def stranger(where: object, found: list[str]) -> DamagedError:
    """Make the error for a database in which something is not ours."""
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    what = f" (it holds the {', '.join(found[:3])}{more})" if found else ""
    return DamagedError(
        f"{where} was not made by mergefront{what}; it is left as it is. Name another run folder, or in "
        "search.storage a database of its own"
    )


def unwritable(database: Path | None, error: Exception) -> RunError:
    """Make the error that says why a study cannot be written: no room, or whatever the database says."""
    if database is not None:
        try:
            require_room(database.parent, room_needed(database))
        except UnavailableError as no_room:
            return no_room
    cause = " ".join(str(error.__cause__ or error).split())
    where = database or "the study's database"
    return UnavailableError(
        f"{where} cannot be written ({redacted(cause)}); nothing finished is lost. "
        "Free the disk or close the other program, and start the search again"
    )


def room_needed(database: Path) -> int:
    """Return the bytes of the largest file a search writes beside a study: its backup, or its log grown somewhat."""
    sizes = [path.stat().st_size for path in (database, _beside(database, "-wal")) if path.is_file()]
    return sum(sizes) + GROWTH


def no_folder(database: Path) -> RunError:
    """Make the error for a file that cannot be made, since its folder does not exist."""
    return RunError(f"search.storage: the folder {database.parent} does not exist; make it, or name another file")


def create(database: Path) -> None:
    """Make a study file without a study: Optuna's tables, in WAL mode and with our mark; it is whole as soon as it has
    its name."""
    if not database.parent.is_dir():
        raise no_folder(database)
    draft = _beside(database, f".{os.getpid()}.tmp")
    try:
        with closing(sqlite3.connect(draft)) as connection:
            _tables().backup(connection)
            connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
            connection.execute("PRAGMA journal_mode=WAL")
        os.replace(draft, database)
    finally:
        draft.unlink(missing_ok=True)


def _check(database: Path, own: bool) -> None:
    with closing(snapshot(database, own=own)) as copy:
        storage = _over(copy, database)
        require_room(database.parent, room_needed(database))
        if own:
            for study in storage.get_all_studies():
                read_trials(storage, study.study_name, database)
            _back_up(copy, _beside(database, ".bak"))


def _connected(database: Path, busy_seconds: float) -> sqlite3.Connection:
    connection = sqlite3.connect(database, timeout=busy_seconds, check_same_thread=False)
    if connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal":
        connection.execute("PRAGMA synchronous=NORMAL")
    return connection


def _over(copy: sqlite3.Connection, where: object) -> RDBStorage:
    """Open a storage over a copy in memory, in which all studies are ours."""
    with readable(where):
        storage = _opened(lambda: copy, StaticPool)
    if _mark(copy) != APPLICATION_ID:
        require_ours(storage, where)
    return storage


def _opened(connect: Callable[[], sqlite3.Connection], pool: type[Pool]) -> RDBStorage:
    """Open Optuna's storage; a file of tables that are this Optuna's is known by its version, for looking that up among
    Optuna's scripts takes longer than all else."""
    connection = connect()
    try:
        found = connection.execute("SELECT version_num FROM alembic_version").fetchall()
    except sqlite3.OperationalError:  # no such table: nothing was stored yet
        found = []
    if pool is not StaticPool:
        connection.close()
    is_ours = found == [(_head_version(),)]
    kwargs = {"creator": connect, "poolclass": pool}
    return RDBStorage("sqlite://", engine_kwargs=kwargs, skip_compatibility_check=is_ours, skip_table_creation=is_ours)


@cache
def _tables() -> sqlite3.Connection:
    """Make a database in memory with Optuna's tables and nothing in them."""
    made = sqlite3.connect(":memory:", check_same_thread=False)
    RDBStorage("sqlite://", engine_kwargs={"creator": lambda: made, "poolclass": StaticPool}).remove_session()
    return made


@cache
def _head_version() -> str:
    """Look up the version of the tables that this Optuna makes."""
    return str(_tables().execute("SELECT version_num FROM alembic_version").fetchone()[0])


def _copied(database: Path, own: bool) -> sqlite3.Connection:
    try:
        return _copy_to_memory(database, own)
    except sqlite3.OperationalError as error:
        if getattr(error, "sqlite_errorcode", 0) != sqlite3.SQLITE_READONLY_ROLLBACK:
            raise
    # A writer without WAL was killed in mid-commit: what it began must be taken back, which is done on a copy.
    with tempfile.TemporaryDirectory() as folder:
        twin = Path(folder) / database.name
        for path, target in ((_beside(database, "-journal"), _beside(twin, "-journal")), (database, twin)):
            shutil.copyfile(path, target)
        with closing(sqlite3.connect(twin)) as source:
            source.execute("PRAGMA trusted_schema=OFF")
            source.execute("SELECT count(*) FROM sqlite_master").fetchone()
        return _copy_to_memory(twin, own)


def _copy_to_memory(database: Path, own: bool) -> sqlite3.Connection:
    # In WAL mode and without a WAL file, nobody has the database open. Said to be immutable, it is read without leaving
    # files beside it, and from a folder that may not be written to.
    quiet = _is_wal(database) and not _beside(database, "-wal").exists()
    uri = f"{database.absolute().as_uri()}?{'immutable=1' if quiet else 'mode=ro'}"
    with closing(sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS)) as source:
        source.execute("PRAGMA trusted_schema=OFF")
        _require_optunas(source, database, own)
        copy = sqlite3.connect(":memory:", check_same_thread=False)
        source.backup(copy)
    return copy


def _require_optunas(source: sqlite3.Connection, database: Path, own: bool) -> None:
    """Refuse a stranger's file before any of its rows is read: views and triggers are programs."""
    objects = source.execute("SELECT type, name, sql FROM sqlite_master").fetchall()
    mark = _mark(source)
    if mark != APPLICATION_ID and (own or mark != 0 or not objects):
        raise stranger(database, [])
    require_tables((name for kind, name, _ in objects if kind == "table" and not name.startswith("sqlite_")), database)
    others = [f"{kind} {name!r}" for kind, name, sql in objects if not _is_plain(kind, sql)]
    if others:
        raise stranger(database, others)


def _is_plain(kind: str, sql: str | None) -> bool:
    return kind == "index" or (kind == "table" and str(sql).upper().startswith("CREATE TABLE"))


def _mark(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA application_id").fetchone()[0])


def _is_wal(database: Path) -> bool:
    with database.open("rb") as file:
        return file.read(20)[18:20] == b"\2\2"


def _no_file(database: Path) -> str:
    """Say why a path cannot be a study's file; empty where it can."""
    about = database.stat()
    if not stat.S_ISREG(about.st_mode):
        return f"it is {KINDS.get(stat.S_IFMT(about.st_mode), 'something else')}, not a file"
    return f"it has {about.st_size:,} bytes; a study may have {LARGEST:,}" if about.st_size > LARGEST else ""


def _back_up(copy: sqlite3.Connection, target: Path) -> None:
    temporary = _beside(target, ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        with closing(sqlite3.connect(temporary)) as connection:
            copy.backup(connection)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


def _damaged(database: Path, words: str, *, own: bool) -> DamagedError:
    backup = _beside(database, ".bak")
    mend = "name another run folder" if own else "name another database in search.storage"
    if own and backup.is_file():
        mend = f"restore the copy {backup.name} beside it"
    return DamagedError(f"{database} is not a readable study ({words}); it is left as it is. {mend}")
