"""Which study in a database is a run folder's: it belongs to the folder, whatever the folder is called now.

In the folder's own study.db it is the one study there is. Elsewhere it has the name that tasks.json remembers, and says
which folder it belongs to: a copy of that folder gets a copy of the study.
"""

from __future__ import annotations

import os
import sqlite3
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import optuna
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from evals.documents import read_json
from optimizer.database.stored_trials import read_trials, readable
from optimizer.database.study_db import (
    MARK,
    create,
    is_ours,
    no_folder,
    open_storage,
    read_storage,
    stranger,
    unwritable,
)
from optimizer.database.study_server import look_at_server, open_server
from optimizer.database.study_url import busy_seconds, parsed_url, sqlite_file, storage_label
from optimizer.errors import DamagedError, RunError
from optimizer.masking import redacted

DATABASE = "study.db"


def new_name(folder: Path, url: str | None) -> str:
    """Choose a study's name: the folder's in a database of its own; among others, one that nobody else has."""
    return folder.name if url is None else f"{folder.name}-{uuid.uuid4().hex[:12]}"


def open_study_storage(folder: Path, url: str | None) -> RDBStorage:
    """Open a run folder's database for its one writer; it is made only where no trial was scored yet.

    Raises:
        DamagedError: the database is damaged, gone, or holds anything but studies of ours.
        UnavailableError: it cannot be written now.
        RunError: the URL is none, or its driver is not installed.
    """
    database = storage_file(folder, url)
    if database is not None:
        if not os.path.lexists(database) and has_outcomes(folder):
            raise _missing(folder, database)
        seconds = busy_seconds(parsed_url(url)) if url else None
        return open_storage(database) if seconds is None else open_storage(database, own=False, busy_seconds=seconds)
    assert url is not None
    return open_server(parsed_url(url), write=True)


def require_usable(url: str | None) -> None:
    """Look at a database outside the run folder before anything is made: it answers, and holds only studies of ours.

    Raises:
        As `open_study_storage`.
    """
    if url is None:
        return
    address = parsed_url(url)
    database = sqlite_file(address)
    if database is None:
        look_at_server(address)
    elif os.path.lexists(database):
        close(read_storage(database, own=False))
    elif not database.parent.is_dir():
        raise no_folder(database)


def close(storage: RDBStorage) -> None:
    """Let go of a database."""
    storage.remove_session()
    storage.engine.dispose()


def make_storage(folder: Path) -> None:
    """Put a study.db without a study into a run folder that is being made."""
    try:
        create(folder / DATABASE)
    except (sqlite3.Error, OSError) as error:
        raise unwritable(folder / DATABASE, error) from error


def take_study(
    storage: RDBStorage,
    folder: Path,
    manifest: Mapping[str, object],
    url: str | None,
    directions: Sequence[StudyDirection],
) -> tuple[optuna.Study, str]:
    """Take the run folder's study, for its one writer, and its name: made where no trial was scored yet.

    A folder that is a copy of the one the study belongs to gets a study of its own, with the same past; its name is to
    be remembered in tasks.json.

    Raises:
        DamagedError: the study is gone, damaged, or has other objectives.
    """
    where = _where(folder, url)
    name = _find(storage, folder, manifest, url)
    if name is None:
        if has_outcomes(folder):
            raise _gone(folder, where, manifest)
        name = str(manifest["study"])
    elif url is not None:
        read_trials(storage, name, where)  # a file in the folder was read through when it was opened
        if _is_copy(storage, name, folder, manifest):
            name = _copied(storage, name, new_name(folder, url))
    study = optuna.create_study(study_name=name, storage=storage, directions=directions, load_if_exists=True)
    if list(study.directions) != list(directions):
        raise DamagedError(f"{where} is damaged: its study has other objectives than this run; it is left as it is")
    home = str(folder.resolve())
    if url is not None and study.user_attrs.get(MARK) != home:
        study.set_user_attr(MARK, home)
    return study, name


def stored_trials(folder: Path, manifest: Mapping[str, object], url: str | None) -> list[FrozenTrial]:
    """Read a run's trials, for a reader: nothing is written, neither in the folder nor in its database.

    Raises:
        DamagedError: the database or the study is gone, damaged or another program's.
        RunError: the run's study is at another URL.
    """
    if url is not None:
        parsed_url(url)
    if (label := storage_label(url)) != manifest["storage"]:
        at, given = (text or f"{DATABASE} in the folder" for text in (manifest["storage"], label))
        raise RunError(
            f"{folder}: the study of this run is at {at}; given {given}; set --storage (MERGEFRONT_STORAGE) to it, "
            "or where it is in the folder, to nothing"
        )
    database = storage_file(folder, url)
    if database is not None and not os.path.lexists(database):
        raise _missing(folder, database)
    if database is not None:
        storage = read_storage(database, own=url is None)
    else:
        assert url is not None
        storage = open_server(parsed_url(url), write=False)
    where = _where(folder, url)
    try:
        name = _find(storage, folder, manifest, url)
        if name is None and has_outcomes(folder):
            raise _gone(folder, where, manifest)
        return [] if name is None else read_trials(storage, name, where)
    finally:
        close(storage)


def has_outcomes(folder: Path) -> bool:
    """Tell whether any trial of a run was scored."""
    return any(folder.glob("outcomes/*.parquet"))


def storage_file(folder: Path, url: str | None) -> Path | None:
    """Return the file of a run's study; None where it is on a server."""
    return folder / DATABASE if url is None else sqlite_file(parsed_url(url))


def _where(folder: Path, url: str | None) -> str:
    return str(folder / DATABASE) if url is None else redacted(url)


def _find(storage: RDBStorage, folder: Path, manifest: Mapping[str, object], url: str | None) -> str | None:
    """Find the name of the run's study, or None where there is none."""
    where = _where(folder, url)
    known = (str(manifest["study"]), folder.resolve().name)
    with readable(where):
        names = optuna.get_all_study_names(storage)
        if url is not None and known[0] in names and is_ours(storage, known[0]) is False:
            raise stranger(where, [f"study {known[0]!r}"])
    if url is not None:
        return known[0] if known[0] in names else None
    if len(names) < 2:
        return names[0] if names else None
    for name in known:  # earlier versions began a second study in a folder that was renamed
        if name in names:
            return name
    raise DamagedError(
        f"{where} holds {len(names)} studies ({', '.join(names[:5])}), and none is called {known[1]}; "
        "give the folder the name of the one that counts"
    )


def _is_copy(storage: RDBStorage, name: str, folder: Path, manifest: Mapping[str, object]) -> bool:
    """Tell whether the study belongs to another folder that is still there, of which this one is a copy."""
    with readable(name):
        home = storage.get_study_user_attrs(storage.get_study_id_from_name(name)).get(MARK, manifest.get("home"))
    if not isinstance(home, str) or not os.path.isdir(home) or os.path.samefile(home, folder):
        return False
    try:
        return bool(read_json(Path(home) / "tasks.json", error=RunError).get("study", name) == name)
    except (RunError, AttributeError):
        return False


def _copied(storage: RDBStorage, name: str, new: str) -> str:
    optuna.copy_study(from_study_name=name, from_storage=storage, to_storage=storage, to_study_name=new)
    return new


def _missing(folder: Path, database: Path) -> DamagedError:
    backup = database.with_name(f"{database.name}.bak")
    if backup.is_file() and database.parent == folder:
        mend = f"copy {backup.name}, which is beside it, to that name"
    elif has_outcomes(folder):
        mend = "put it back, or name another run folder"
    else:
        mend = "no trial was scored yet: start the search again"
    return DamagedError(f"{database} is missing: the trials of this run are in it; {mend}")


def _gone(folder: Path, where: str, manifest: Mapping[str, object]) -> DamagedError:
    return DamagedError(
        f"{where} does not hold the study {manifest['study']} of {folder}, of which trials were scored; "
        "put the study back, or name another run folder"
    )
