"""The trials in a study's database: a database comes from anywhere, so what a reader relies on is checked first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import OperationalError

from optimizer.database.trial_rows import read_rows
from optimizer.errors import DamagedError, RunError, UnavailableError
from optimizer.masking import redacted
from search_spaces.recipe import Recipe

ATTRIBUTES: dict[str, type | tuple[type, ...]] = {
    "kind": str,
    "lesson": str,
    "outcomes": str,
    "recipe": str,
    "reason": str,
    "request": str,
    "retry_of": int,
    "seconds": (int, float),
    "candidates": (int, float),
    "stderr": list,
}
LONGEST_SHOWN = 200  # characters
MEND = "it is left as it is. Restore a copy of it, or name another run folder"


def read_trials(storage: RDBStorage, study: str, where: object) -> list[FrozenTrial]:
    """Read the trials of a study by number, each as `search` writes them.

    Args:
        study: its name.
        where: what the database is called in messages.

    Raises:
        DamagedError: a trial is not one that `search` wrote; the database is named.
        UnavailableError: another program has the database, or a server is gone.
    """
    with readable(where):
        study_id = storage.get_study_id_from_name(study)
        objectives = len(storage.get_study_directions(study_id))
        trials = read_rows(storage.engine, study_id)
        for number, trial in enumerate(trials):
            if problem := f"is numbered {trial.number}" if trial.number != number else _problem(trial, objectives):
                raise DamagedError(f"{where} is damaged: trial {number} {problem}; {MEND}")
    return trials


@contextmanager
def readable(where: object) -> Iterator[None]:
    """Turn whatever reading a database brings up into DamagedError or UnavailableError, naming the database."""
    try:
        yield
    except RunError:
        raise
    except OperationalError as error:
        raise UnavailableError(f"{where} cannot be read now: {_brief(error.orig)}") from error
    except Exception as error:  # rows made by hand bring any error out of optuna and SQLAlchemy
        raise DamagedError(
            f"{where} is not a readable study ({type(error).__name__}: {_brief(error)}); {MEND}"
        ) from error


def _problem(trial: FrozenTrial, objectives: int) -> str:
    """Say what no trial of ours has, in words that follow its number; empty where there is nothing."""
    for name, kinds in ATTRIBUTES.items():
        value = trial.user_attrs.get(name)
        if name in trial.user_attrs and (not isinstance(value, kinds) or isinstance(value, bool)):
            return f"has the {name} {_brief(value)!r}, which is a {type(value).__name__}"
    for name in ("seconds", "candidates"):
        if not math.isfinite(trial.user_attrs.get(name, 0.0)):
            return f"took {trial.user_attrs[name]} {name}"
    numbers = [value for value in trial.params.values() if not isinstance(value, str)]
    if not all(isinstance(value, float | int) and math.isfinite(value) for value in numbers):
        return "has parameters that are neither words nor finite numbers"
    if not isinstance(trial.system_attrs.get("fixed_params", {}), dict):
        return "is queued with parameters that are no table"
    values = trial.values or []
    if (trial.state == TrialState.COMPLETE and len(values) != objectives) or not all(map(math.isfinite, values)):
        return f"has the objectives {_brief(values)}; there are {objectives}, all finite"
    if "recipe" in trial.user_attrs:
        return _recipe_problem(trial.user_attrs["recipe"])
    return "is finished without a recipe" if trial.state == TrialState.COMPLETE else ""


def _recipe_problem(text: str) -> str:
    try:
        digest_of(text)
    except Exception as error:  # a parser given nonsense
        return f"has a recipe that cannot be read: {_brief(error)}"
    return ""


@lru_cache(maxsize=2**14)
def digest_of(text: str) -> str:
    """Read a recipe and give its digest; a driver asks for each trial's twice, as it checks and as it recalls them.

    Raises:
        SpaceError: it is none.
    """
    return Recipe.from_json(text).digest


def _brief(value: object) -> str:
    text = redacted(" ".join(str(value).split()))
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"
