"""The storage of a study as its one writer has it: in memory, and each step of a trial in one transaction on the disk.

Nobody else writes to the study, so nothing needs to be read twice. Parameters and attributes of a trial are kept back
until it is written (`write`) or changes its state, and are then on the disk together: a driver that is killed in
between leaves a trial without parameters, as it would have before the first of them.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Mapping, Sequence
from datetime import datetime
from typing import Any

from optuna.distributions import BaseDistribution, check_distribution_compatibility
from optuna.storages import BaseStorage, RDBStorage
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState

from optimizer.database.trial_rows import Changes, read_rows, write_changes

CONSTRAINT = "constraints:"  # Optuna's: the start of a system attribute's name


class WriterStorage(BaseStorage):
    """One study of a database, for its one writer; the trials that are read of it are not to be changed.

    Args:
        database: where it is; the caller closes it.
        study: its name.
    """

    def __init__(self, database: RDBStorage, study: str) -> None:
        self._database = database
        self._study_id = database.get_study_id_from_name(study)
        self._directions = database.get_study_directions(self._study_id)
        self._name = study
        self._trials = read_rows(database.engine, self._study_id)  # by number
        self._numbers = {trial._trial_id: trial.number for trial in self._trials}
        self._waiting = dict.fromkeys(trial.number for trial in self._trials if trial.state == TrialState.WAITING)
        self._unwritten: dict[int, Changes] = {}
        self._distributions = {name: d for trial in self._trials for name, d in trial.distributions.items()}

    # Studies: the database's -----------------------------------------------------------------------------------------

    def create_new_study(self, directions: Sequence[StudyDirection], study_name: str | None = None) -> int:
        return self._database.create_new_study(directions, study_name)

    def delete_study(self, study_id: int) -> None:
        raise NotImplementedError("the study of a running search stays")

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        self._database.set_study_user_attr(study_id, key, value)

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        self._database.set_study_system_attr(study_id, key, value)

    def get_study_id_from_name(self, study_name: str) -> int:
        return self._study_id if study_name == self._name else self._database.get_study_id_from_name(study_name)

    def get_study_name_from_id(self, study_id: int) -> str:
        return self._name if study_id == self._study_id else self._database.get_study_name_from_id(study_id)

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        self._require_study(study_id)
        return list(self._directions)

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        return self._database.get_study_user_attrs(study_id)

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        return self._database.get_study_system_attrs(study_id)

    def get_all_studies(self) -> list[FrozenStudy]:
        return self._database.get_all_studies()

    def remove_session(self) -> None:
        self._database.remove_session()

    # Trials: written through -----------------------------------------------------------------------------------------

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        self._require_study(study_id)
        trial_id = self._database.create_new_trial(study_id, template_trial)
        trial = _running() if template_trial is None else copy.deepcopy(template_trial)
        trial.number, trial._trial_id = len(self._trials), trial_id
        self._numbers[trial_id] = trial.number
        self._trials.append(trial)
        if trial.state == TrialState.WAITING:
            self._waiting[trial.number] = None
        return trial_id

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        trial = self._changing(trial_id)
        check_distribution_compatibility(self._distributions.setdefault(param_name, distribution), distribution)
        trial.params = {**trial.params, param_name: distribution.to_external_repr(param_value_internal)}
        trial.distributions = {**trial.distributions, param_name: distribution}
        self._new(trial_id).params[param_name] = (param_value_internal, distribution)
        self._put(trial)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        trial = self._changing(trial_id)
        trial.system_attrs = {**trial.system_attrs, key: value}
        self._new(trial_id).system[key] = value
        self._put(trial)

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        trial = self._changing(trial_id)
        trial.user_attrs = {**trial.user_attrs, key: value}
        self._new(trial_id).user[key] = value
        self._put(trial)

    def set_constraints(self, trial_id: int, excesses: Mapping[str, float]) -> None:
        """Give a trial the constraints that Optuna's samplers go by, in place of those it has; finished ones too.

        Args:
            excesses: by constraint, 0 or less where it is kept.
        """
        trial = copy.copy(self.get_trial(trial_id))
        new = {f"{CONSTRAINT}{key}": float(value) for key, value in excesses.items()}
        gone = tuple(key for key in trial.system_attrs if key.startswith(CONSTRAINT) and key not in new)
        kept = {key: value for key, value in trial.system_attrs.items() if key not in gone}
        changes = self._new(trial_id)
        changes.system, changes.dropped = {**changes.system, **new}, (*changes.dropped, *gone)
        trial.system_attrs = {**kept, **new}
        if trial.state.is_finished():
            self.write(trial_id)
        self._put(trial)

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        trial = self._changing(trial_id)
        if state == TrialState.RUNNING and trial.state != TrialState.WAITING:
            return False
        changes = self._new(trial_id)
        changes.state = trial.state = state
        if values is not None:
            changes.values = trial.values = list(values)
        if state == TrialState.RUNNING:
            changes.started = trial.datetime_start = datetime.now()
        if state.is_finished():
            changes.completed = trial.datetime_complete = datetime.now()
        self.write(trial_id)
        self._put(trial)
        return True

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        raise NotImplementedError("a search of several objectives reports no steps")

    def write(self, trial_id: int) -> None:
        """Have all that is known of a trial in the database."""
        if trial_id in self._unwritten:
            write_changes(self._database.engine, trial_id, self._unwritten[trial_id])
            del self._unwritten[trial_id]

    # Trials: read from memory ----------------------------------------------------------------------------------------

    def get_trial(self, trial_id: int) -> FrozenTrial:
        return self._trials[self._number_of(trial_id)]

    def get_trial_id_from_study_id_trial_number(self, study_id: int, trial_number: int) -> int:
        self._require_study(study_id)
        if not 0 <= trial_number < len(self._trials):
            raise KeyError(f"no trial has the number {trial_number}")
        return int(self._trials[trial_number]._trial_id)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        self._require_study(study_id)
        if states == (TrialState.WAITING,):  # asked for before each trial
            found = [self._trials[number] for number in self._waiting]
        else:
            found = [trial for trial in self._trials if states is None or trial.state in states]
        return copy.deepcopy(found) if deepcopy else found

    # -----------------------------------------------------------------------------------------------------------------

    def _changing(self, trial_id: int) -> FrozenTrial:
        """Give a copy of a trial that may be changed: who has read the trial before keeps it as it was."""
        trial = self.get_trial(trial_id)
        self.check_trial_is_updatable(trial_id, trial.state)
        return copy.copy(trial)

    def _put(self, trial: FrozenTrial) -> None:
        self._trials[trial.number] = trial
        if trial.state != TrialState.WAITING:
            self._waiting.pop(trial.number, None)

    def _new(self, trial_id: int) -> Changes:
        return self._unwritten.setdefault(trial_id, Changes())

    def _number_of(self, trial_id: int) -> int:
        if trial_id not in self._numbers:
            raise KeyError(f"no trial of the study has the id {trial_id}")
        return self._numbers[trial_id]

    def _require_study(self, study_id: int) -> None:
        if study_id != self._study_id:
            raise KeyError(f"the study has the id {self._study_id}; given {study_id}")


def _running() -> FrozenTrial:
    return FrozenTrial(
        number=-1,
        state=TrialState.RUNNING,
        value=None,
        datetime_start=datetime.now(),
        datetime_complete=None,
        params={},
        distributions={},
        user_attrs={},
        system_attrs={},
        intermediate_values={},
        trial_id=-1,
    )
