"""A PostgreSQL server of our own, on a socket in a folder, where its programs are on this machine."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PLACES = ("/usr/lib/postgresql", "/usr/local/pgsql", "/opt/homebrew/opt")  # Debian's, a build's, Homebrew's
OWNERS = ("postgres", "nobody")  # who runs it where we are root, which it refuses


def programs() -> Path | None:
    """Find the folder of initdb and pg_ctl; None where there is none."""
    found = [Path(path).resolve().parent for path in [shutil.which("initdb")] if path]
    found += sorted((p.parent for place in PLACES for p in Path(place).glob("**/bin/initdb")), reverse=True)
    return next((folder for folder in found if (folder / "pg_ctl").exists()), None)


@contextmanager
def postgres() -> Iterator[str]:
    """Run a server; give the URL of its database, for the driver psycopg.

    Raises:
        FileNotFoundError: the programs are not there.
    """
    folder = programs()
    if folder is None:
        raise FileNotFoundError("no initdb on this machine; Debian's package is postgresql")
    place = Path(tempfile.mkdtemp(prefix="pg-"))
    user = _user()
    if user is not None:
        os.chown(place, user.pw_uid, user.pw_gid)

    def run(program: str, *words: str) -> None:
        options = {} if user is None else {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        with (place / "output.txt").open("ab") as output:
            subprocess.run([folder / program, *words], check=True, stdout=output, stderr=output, cwd=place, **options)  # type: ignore[call-overload]

    data, name = str(place / "data"), "mergefront"
    try:
        run("initdb", "-D", data, "-U", name, "-A", "trust", "--no-sync")
        settings = f"-k {place} -c listen_addresses='' -c fsync=off"
        run("pg_ctl", "-D", data, "-o", settings, "-w", "-l", str(place / "log.txt"), "start")
        try:
            run("createdb", "-h", str(place), "-U", name, name)
            yield f"postgresql+psycopg://{name}@/{name}?host={place}"
        finally:
            run("pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _user() -> pwd.struct_passwd | None:
    """Return who is to run the server where we are root."""
    if os.geteuid():
        return None
    for name in OWNERS:
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    return None
