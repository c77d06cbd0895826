"""A study on a database server: looked at before a byte is written, and by a reader never written to."""

from __future__ import annotations

from typing import Any

from optuna.storages import RDBStorage
from sqlalchemy import create_engine, inspect, text
from sqlalchemy.engine import URL

from optimizer.database.stored_trials import readable
from optimizer.database.study_db import TABLES, require_ours, require_tables
from optimizer.errors import DamagedError, RunError, UnavailableError
from optimizer.masking import redacted

ANSWER_SECONDS = 15
FILLED = ("version_info", "alembic_version")  # tables that Optuna writes once, as it makes them
WITH_TIMEOUT = ("psycopg", "psycopg2", "pymysql", "mysqldb")  # drivers that know connect_timeout


def open_server(url: URL, *, write: bool) -> RDBStorage:
    """Open the Optuna storage on a server; tables are made where there are none and `write` is given.

    Raises:
        DamagedError: it holds tables or studies of another program, or (for a reader) no study at all.
        UnavailableError: it does not answer.
    """
    where, is_ready = _name(url), look_at_server(url)
    if not is_ready and not write:
        raise DamagedError(f"{where} holds no study; name the database the search was started with")
    address = url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")  # optuna formats it
    with readable(where):
        storage = RDBStorage(address, engine_kwargs=_options(url), skip_table_creation=is_ready)
        require_ours(storage, where)
    return storage


def look_at_server(url: URL) -> bool:
    """Tell whether a server's database holds Optuna's tables, whole.

    Raises:
        DamagedError: it holds other tables.
        UnavailableError: it does not answer.
    """
    where, engine = _name(url), create_engine(url, **_options(url))
    try:
        names = set(inspect(engine).get_table_names())
        require_tables(names, where)
        if not names >= TABLES:
            return False
        with engine.connect() as connection:
            counts = [connection.execute(text(f"SELECT count(*) FROM {table}")).scalar() for table in FILLED]
        return all(counts)
    except RunError:
        raise
    except Exception as error:  # each driver has errors of its own
        cause = redacted(" ".join(str(getattr(error, "orig", None) or error).split()))
        raise UnavailableError(
            f"search.storage: {where} does not answer ({cause}); see that the server runs and that the user may log in"
        ) from error
    finally:
        engine.dispose()


def _name(url: URL) -> str:
    return redacted(url.render_as_string(hide_password=False))


def _options(url: URL) -> dict[str, Any]:
    patient = url.get_dialect().driver in WITH_TIMEOUT and "connect_timeout" not in url.query
    return {"connect_args": {"connect_timeout": ANSWER_SECONDS}} if patient else {}
