"""Which trials a guard of written answers keeps off the front, asked while a search goes on."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from evals.guards import WRITTEN, Guards
from evals.outcomes import SUITES, TaskInfo
from optimizer.errors import RunError
from optimizer.runs.acceptances import read_accepted
from optimizer.runs.run_folder import RunFolder


class AnswerWatch:
    """The written answers of a run's trials beside the base's, as far as they are stored."""

    def __init__(self, run: RunFolder, tasks: Sequence[TaskInfo]) -> None:
        self._run, self._tasks = run, tasks
        self.is_needed = any(task.output_type == WRITTEN for task in tasks)  # else none is kept off
        self._accepted = read_accepted(run.path) if self.is_needed else {}
        self._guards: dict[tuple[str, ...], Guards] = {}  # by the suites that the base is scored on
        self._flagged: dict[tuple[int, tuple[str, ...]], bool] = {}

    def is_kept_off(self, trial: int, digest: str, *, base: int | None) -> bool:
        """Tell whether a guard flags a trial that no person has accepted; not where its outcomes are lost.

        Args:
            digest: of its recipe.
            base: the trial that is the base; None: not scored yet.
        """
        if not self.is_needed or base in (None, trial) or digest in self._accepted:
            return False
        suites = tuple(suite for suite in SUITES if self._run.has_outcomes(trial, suite))
        if (trial, suites) not in self._flagged:
            try:
                found = self._guards_of(base).of(self._rows(trial))
            except RunError:
                return False
            self._flagged[trial, suites] = bool(found["is_flagged"].any())
        return self._flagged[trial, suites]

    def _guards_of(self, base: int) -> Guards:
        suites = tuple(suite for suite in SUITES if self._run.has_outcomes(base, suite))
        if suites not in self._guards:
            self._guards[suites] = Guards(self._rows(base), self._tasks)
        return self._guards[suites]

    def _rows(self, trial: int) -> pd.DataFrame:
        there = [suite for suite in SUITES if self._run.has_outcomes(trial, suite)]
        return pd.concat([self._run.read_outcomes(trial, suite) for suite in there], ignore_index=True)
