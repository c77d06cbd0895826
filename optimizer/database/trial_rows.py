"""The rows of a study's trials, read and written in few statements, in the tables that Optuna made.

Optuna reads a study through objects for each parameter of each trial, and writes each parameter in a transaction of its
own; ten thousand trials of sixty parameters take it a minute to read. What is written here Optuna reads as its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import groupby
from operator import itemgetter
from typing import Any, TypeVar

from optuna.distributions import BaseDistribution, distribution_to_json, json_to_distribution
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Connection, Engine, delete, insert, select, update

TRIALS = models.TrialModel.__table__
PARAMS = models.TrialParamModel.__table__
VALUES = models.TrialValueModel.__table__
STEPS = models.TrialIntermediateValueModel.__table__
USER, SYSTEM = models.TrialUserAttributeModel.__table__, models.TrialSystemAttributeModel.__table__

T = TypeVar("T")


@dataclass(slots=True)
class Changes:
    """What is new about a trial, to be written in one transaction.

    Args:
        params: of each name the number that Optuna stores, and the distribution.
        dropped: system attributes that are no more.
        values: objectives, in place of those there are.
    """

    params: dict[str, tuple[float, BaseDistribution]] = field(default_factory=dict)
    user: dict[str, Any] = field(default_factory=dict)
    system: dict[str, Any] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    state: TrialState | None = None
    values: Sequence[float] | None = None
    started: datetime | None = None
    completed: datetime | None = None


def write_changes(engine: Engine, trial_id: int, changes: Changes) -> None:
    """Write what is new about a trial, all or nothing."""
    with engine.begin() as connection:
        params = [
            {
                "trial_id": trial_id,
                "param_name": name,
                "param_value": number,
                "distribution_json": _as_json(distribution),
            }
            for name, (number, distribution) in changes.params.items()
        ]
        if params:
            connection.execute(insert(PARAMS), params)
        if changes.dropped:
            gone = SYSTEM.c.key.in_(changes.dropped)
            connection.execute(delete(SYSTEM).where(SYSTEM.c.trial_id == trial_id, gone))
        for table, attributes in ((USER, changes.user), (SYSTEM, changes.system)):
            _write_attributes(connection, table, trial_id, attributes)
        if changes.values is not None:
            _write_values(connection, trial_id, changes.values)
        if changes.state is not None:
            times = {"datetime_start": changes.started, "datetime_complete": changes.completed}
            given = {TRIALS.c[name]: _to_utc(time) for name, time in times.items() if time is not None}
            statement = update(TRIALS).where(TRIALS.c.trial_id == trial_id)
            connection.execute(statement.values({TRIALS.c.state: changes.state, **given}))


def read_rows(engine: Engine, study_id: int) -> list[FrozenTrial]:
    """Read all trials of a study by number, as Optuna does; distributions that are alike are one object."""
    with engine.connect() as connection:
        params = _params_by_trial(connection, study_id)
        user, system = (_attributes_by_trial(connection, table, study_id) for table in (USER, SYSTEM))
        values = _by_trial(connection, study_id, VALUES, ("objective", "value", "value_type"), _values)
        steps = _by_trial(
            connection, study_id, STEPS, ("step", "intermediate_value", "intermediate_value_type"), _steps
        )
        columns = [TRIALS.c[name] for name in ("trial_id", "number", "state", "datetime_start", "datetime_complete")]
        rows = connection.execute(select(*columns).where(TRIALS.c.study_id == study_id).order_by(TRIALS.c.trial_id))
        trials = []
        for trial_id, number, state, started, completed in rows:
            own, distributions = params.get(trial_id, ({}, {}))
            trials.append(
                FrozenTrial(
                    number=number,
                    state=state,
                    value=None,
                    values=values.get(trial_id),
                    datetime_start=_to_local(started),
                    datetime_complete=_to_local(completed),
                    params=own,
                    distributions=distributions,
                    user_attrs=user.get(trial_id, {}),
                    system_attrs=system.get(trial_id, {}),
                    intermediate_values=steps.get(trial_id, {}),
                    trial_id=trial_id,
                )
            )
    return sorted(trials, key=lambda trial: trial.number)


def _write_attributes(connection: Connection, table: Any, trial_id: int, attributes: Mapping[str, Any]) -> None:
    if not attributes:
        return
    own = table.c.trial_id == trial_id
    connection.execute(delete(table).where(own, table.c.key.in_(list(attributes))))
    rows = [{"trial_id": trial_id, "key": key, "value_json": json.dumps(value)} for key, value in attributes.items()]
    connection.execute(insert(table), rows)


def _write_values(connection: Connection, trial_id: int, values: Sequence[float]) -> None:
    connection.execute(delete(VALUES).where(VALUES.c.trial_id == trial_id))
    stored = [models.TrialValueModel.value_to_stored_repr(value) for value in values]
    rows = [
        {"trial_id": trial_id, "objective": place, "value": value, "value_type": kind}
        for place, (value, kind) in enumerate(stored)
    ]
    connection.execute(insert(VALUES), rows)


def _by_trial(
    connection: Connection, study_id: int, table: Any, columns: Sequence[str], read: Callable[[Iterator[Any]], T]
) -> dict[int, T]:
    """Read a table's rows of a study by trial, in the order in which they were written."""
    statement = (
        select(table.c.trial_id, *(table.c[name] for name in columns))
        .join(TRIALS, TRIALS.c.trial_id == table.c.trial_id)
        .where(TRIALS.c.study_id == study_id)
        .order_by(table.c.trial_id, *table.primary_key.columns)
    )
    return {trial: read(rows) for trial, rows in groupby(connection.execute(statement), key=itemgetter(0))}


def _params_by_trial(
    connection: Connection, study_id: int
) -> dict[int, tuple[dict[str, Any], dict[str, BaseDistribution]]]:
    known: dict[str, BaseDistribution] = {}

    def read(rows: Iterator[Any]) -> tuple[dict[str, Any], dict[str, BaseDistribution]]:
        params, distributions = {}, {}
        for _, name, number, text in rows:
            if text not in known:
                known[text] = json_to_distribution(text)
            distributions[name] = known[text]
            params[name] = known[text].to_external_repr(number)
        return params, distributions

    return _by_trial(connection, study_id, PARAMS, ("param_name", "param_value", "distribution_json"), read)


def _attributes_by_trial(connection: Connection, table: Any, study_id: int) -> dict[int, dict[str, Any]]:
    def read(rows: Iterator[Any]) -> dict[str, Any]:
        return {key: json.loads(text) for _, key, text in rows}

    return _by_trial(connection, study_id, table, ("key", "value_json"), read)


def _values(rows: Iterator[Any]) -> list[float]:
    found = {place: models.TrialValueModel.stored_repr_to_value(value, kind) for _, place, value, kind in rows}
    return [found[place] for place in range(len(found))]


def _steps(rows: Iterator[Any]) -> dict[int, float]:
    back = models.TrialIntermediateValueModel.stored_repr_to_intermediate_value
    return {step: back(value, kind) for _, step, value, kind in rows}


def _as_json(distribution: BaseDistribution) -> str:
    return str(distribution_to_json(distribution))


def _to_utc(time: datetime) -> datetime:
    return time.astimezone(UTC).replace(tzinfo=None)


def _to_local(time: datetime | None) -> datetime | None:
    return None if time is None else time.replace(tzinfo=UTC).astimezone().replace(tzinfo=None)
