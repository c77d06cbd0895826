"""What a run's trials are measured by: base and experts, objectives on resampled items, and guards of what is written.

Between what a run folder holds (`recorded`) and the figures of its points (`scored`).
"""

from __future__ import annotations

from functools import cached_property

import pandas as pd

from evals.guards import Guards
from evals.objectives import Draws, Scale, draw_objectives, objectives
from evals.outcomes import SEARCH, SUITES
from optimizer.runs.acceptances import read_accepted
from optimizer.runs.front import front_without, losses
from optimizer.runs.recorded import RecordedRun
from optimizer.runs.trial import fitted


class MeasuredRun(RecordedRun):
    """A recorded run, and what its trials are held against."""

    @property
    def _measured_from(self) -> tuple[int, dict[str, int]]:
        assert self.references is not None, "base and experts are scored"
        return self.references

    def scale(self, suite: str) -> Scale:
        """Return a suite's outcomes, and the base and experts that they are measured by."""
        return Scale(self.outcomes(suite), self.tasks, suite, *self._measured_from)

    def _draws(self, suite: str) -> Draws:
        if suite not in self._drawn:
            self._drawn[suite] = draw_objectives(self.scale(suite))
        return self._drawn[suite]

    @cached_property
    def _drawn(self) -> dict[str, Draws]:
        return {}

    # --- guards of written answers ------------------------------------------------------------------------------

    def guards(self, trial: int) -> pd.DataFrame:
        """Compare a trial's written answers with the base's, on the items of both suites; columns as of
        `evals.guards.Guards.of`, without a row where no task has its answers written."""
        self.require_trial(trial)
        return self._guards_of(trial).copy()

    def is_kept_off(self, trial: int) -> bool:
        """Tell whether a guard flags a trial's answers and no person has accepted it."""
        return self.is_flagged(trial) and trial not in self.accepted

    def is_flagged(self, trial: int) -> bool:
        """Tell whether a guard flags a trial's answers."""
        return self._base_answers.is_needed and bool(self._guards_of(trial)["is_flagged"].any())

    @cached_property
    def kept_off(self) -> frozenset[int]:
        """The trials that a guard keeps off the front: without guards, they would be on it."""
        if self.references is None or not self._base_answers.is_needed:
            return frozenset()
        points = objectives(self._draws(SEARCH)).drop(index=[*self.stopped], errors="ignore")
        rivals = losses_of(points, self.objectives)
        is_fitted = rivals.index.isin([*self.fitted])
        _, off = front_without(rivals.to_numpy(), lambda place: self.is_kept_off(int(rivals.index[place])), is_fitted)
        return frozenset(int(trial) for trial in rivals.index[off])

    @cached_property
    def fitted(self) -> frozenset[int]:
        """The trials whose weights were fitted to the search items."""
        return fitted(self.kinds)

    @cached_property
    def _off_front(self) -> list[int]:
        return [*(self.stopped | self.kept_off)]

    @cached_property
    def _base_answers(self) -> Guards:
        return Guards(self._answers_of(self._measured_from[0]), self.tasks)

    def _guards_of(self, trial: int) -> pd.DataFrame:
        if trial not in self._guarded:
            self._guarded[trial] = self._base_answers.of(self._answers_of(trial))
        return self._guarded[trial]

    def _answers_of(self, trial: int) -> pd.DataFrame:
        """Return the outcomes of a trial on both suites."""
        frames = [self.outcomes(suite) for suite in SUITES]
        return pd.concat([frame[frame["trial"] == trial] for frame in frames], ignore_index=True)

    @cached_property
    def _guarded(self) -> dict[int, pd.DataFrame]:
        return {}

    @cached_property
    def accepted(self) -> dict[int, str]:
        """Trials whose recipe a person has accepted whatever the guards say, and when."""
        found = read_accepted(self.path)
        return {n: found[d] for n in self._methods if (d := self.recipe(n).digest) in found} if found else {}


def losses_of(points: pd.DataFrame, names: tuple[str, ...]) -> pd.DataFrame:
    """Return the objectives, those to be maximised negated: (n, m), all minimised, forgetting last."""
    return pd.DataFrame(losses(points[list(names)]), index=points.index, columns=list(names))
