"""`search.storage`: the URL of a study kept outside the run folder. Which forms are taken, and how it is shown."""

from __future__ import annotations

import math
from pathlib import Path

from sqlalchemy.engine import URL, make_url

from optimizer.errors import RunError
from optimizer.masking import redacted

BUSY_SECONDS = 30.0
FORMS = "sqlite:////folder/file.db, postgresql://user:password@host/database or mysql://..., as SQLAlchemy has it"
PACKAGES = {"MySQLdb": "mysqlclient", "psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary"}


def storage_problem(text: str) -> str:
    """Say what is wrong with a storage URL, in words; empty where nothing is."""
    try:
        url = make_url(text)
        dialect = url.get_dialect()
    except Exception:  # SQLAlchemy raises ArgumentError, ValueError or whatever a plug-in does
        return f"must be the URL of a database, such as {FORMS}"
    if url.get_backend_name() != "sqlite":
        return ""
    if dialect.driver != "pysqlite" or url.host or url.username or url.port:
        return "a SQLite URL must be sqlite:///file.db (from here) or sqlite:////folder/file.db"
    if not url.database or url.database.startswith((":memory:", "file:")) or "\0" in url.database:
        return "a SQLite URL must name a file, such as sqlite:////folder/file.db"
    if set(url.query) - {"timeout"}:
        return f"a SQLite URL may have ?timeout=SECONDS and nothing else; given {', '.join(sorted(url.query))}"
    return "" if _seconds(url) else "a SQLite URL's timeout must be a number of seconds"


def parsed_url(text: str) -> URL:
    """Parse the URL; its driver is there.

    Raises:
        RunError: it is none, or its driver is not installed.
    """
    if problem := storage_problem(text):
        raise RunError(f"search.storage: {problem}; given {redacted(text)!r}")
    url = make_url(text)
    dialect = url.get_dialect()
    try:
        dialect.import_dbapi()
    except ImportError as error:
        package = PACKAGES.get(error.name or "", error.name)
        raise RunError(
            f"search.storage: {redacted(text)} needs the driver {error.name or dialect.driver}, which cannot be "
            f"imported; install it with `pip install {package}`, or name one that is there, such as "
            f"{url.get_backend_name()}+DRIVER://"
        ) from error
    return url


def sqlite_file(url: URL) -> Path | None:
    """Return the file of a SQLite URL; None for a server's."""
    if url.get_backend_name() != "sqlite":
        return None
    assert url.database
    return Path(url.database).absolute()


def busy_seconds(url: URL) -> float:
    """Return how long to wait for another program that has a SQLite file locked."""
    return _seconds(url) or BUSY_SECONDS


def absolute_url(text: str) -> str:
    """Return the URL with a SQLite file by its whole path, so that it means the same from every folder."""
    if storage_problem(text):
        return text
    url = make_url(text)
    file = sqlite_file(url)
    timeout = f"?timeout={url.query['timeout']}" if "timeout" in url.query else ""
    return text if file is None else f"sqlite:///{file}{timeout}"


def storage_label(text: str | None) -> str | None:
    """Return a storage as it is stored and compared: without user and password, a SQLite file by its whole path."""
    return text and redacted(absolute_url(text)).split("?timeout=")[0]


def _seconds(url: URL) -> float | None:
    """Return the timeout a SQLite URL gives, or ours; None where it is no positive number."""
    try:
        seconds = float(str(url.query.get("timeout", BUSY_SECONDS)))
    except ValueError:
        return None
    return seconds if 0 < seconds < math.inf else None
