"""The numbers of a run, each recomputed from the outcomes that are stored: points, front, retention, limits.

Points are trials by number; figures are shares (0.06 is 6 %).
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from evals.errors import TaskError
from evals.flips import flipped_items, flips
from evals.objectives import objectives, sentinel_changes, task_retention
from evals.outcomes import HOLDOUT, SEARCH, SENTINEL
from optimizer.errors import NoPointError, RunError
from optimizer.runs.comparison import COLUMNS as PAY_COLUMNS
from optimizer.runs.comparison import FOUND, compare_at_limits
from optimizer.runs.families import COLUMNS, PREPARED, fronts_by_set, what_sets_cover
from optimizer.runs.flipped import with_texts
from optimizer.runs.frames import prefix_of
from optimizer.runs.front import LIMITS, SURE, best_under, growth, hypervolume, knee_of, losses, non_dominated, on_front
from optimizer.runs.measured import MeasuredRun, losses_of
from optimizer.runs.posterior import front_chances, knee_by_samples
from optimizer.runs.trial import NO_ANCHORS, Role, roles_of
from optimizer.words import listed, percent

NO_TRIAL_YET = "No finished trial yet"
ENDS = ("", "_low", "_high")  # of a figure's column: its value, and the bounds of its 95 % interval


class ScoredRun(MeasuredRun):
    """A recorded run and the figures of its points."""

    # --- points --------------------------------------------------------------------------------------------------

    def points(self, suite: str | None = None) -> pd.DataFrame:
        """Return every scored trial by number; empty until base and experts are in.

        Args:
            suite: whose figures; None gives those of both, the holdout suite's with `holdout_` before their names.

        Returns:
            kind, method, the objectives with `_low`, `_high`, `_stderr` (NaN where it was not scored), `front`, and
            `front_chance`: the share of resamplings of the search items in which no other point beats it.
        """
        if suite is None:
            return self._points.copy()
        figures = self._points[[f"{prefix_of(suite)}{name}" for name in self._objective_columns()]]
        figures = figures.set_axis(self._objective_columns(), axis="columns")
        return pd.concat([self._points[["kind", "method"]], figures, self._points[["front", "front_chance"]]], axis=1)

    def front(self, suite: str = SEARCH) -> pd.DataFrame:
        """Return the points no other beats by a suite's figures, from least to most forgetting; columns as `points`.

        By the search items, to which they were fitted, learned points beat only one another.
        """
        points = self.points(suite)
        minimised = self._losses(suite).dropna()
        is_best = points["front"] if suite == SEARCH else minimised.index[non_dominated(minimised.to_numpy())]
        front = points.loc[is_best]
        return self._points.loc[front.sort_values(["forgetting", "domain"], kind="stable").index]

    def anchors(self) -> pd.DataFrame:
        """Return the points that were not searched: base, experts, the uniform line, the slopes, those derived and
        learned; columns as `points`."""
        return self._points[~self._roles.isin(NO_ANCHORS)].copy()

    def columns(self, suite: str) -> list[str]:
        """Return the names of a suite's objectives in the frames that hold those of both suites."""
        return [f"{prefix_of(suite)}{name}" for name in self.objectives]

    def suite_of(self, trial: int) -> str:
        """Return the suite that judges a trial: "holdout" where it was scored there, else "search"."""
        domain = self.points(HOLDOUT)["domain"]
        return HOLDOUT if trial in domain.index and bool(domain.notna()[trial]) else SEARCH

    @property
    def judging_suite(self) -> str:
        """The suite that judges the front: "holdout" where a trial was scored there, else "search"."""
        return HOLDOUT if self.points(HOLDOUT)["domain"].notna().any() else SEARCH

    @property
    def holdout_fault(self) -> str:
        """What keeps the stored holdout outcomes from being used; empty where nothing does."""
        return self._holdout[1] if self.references else ""

    @property
    def why_empty(self) -> str:
        """Why there is no point."""
        faults = self.lost_outcomes(SEARCH).items()
        if lost := [fault for number, fault in faults if self.kinds[number].is_reference]:
            return f"No figure without base and experts: {listed(lost)}."
        return f"{NO_TRIAL_YET}: the base and every expert must be scored first."

    def require_scored(self, trial: int) -> None:
        """Raise RunError where there is no such trial, or it has no figures."""
        self.require_trial(trial)
        if trial not in self._require_points().index:
            raise RunError(f"trial {trial} of run {self.name} is not scored: {self._ended(trial)}")

    # --- one trial's tasks ---------------------------------------------------------------------------------------

    def retention(self, trial: int, suite: str | None = None) -> pd.DataFrame:
        """Return what a trial won or lost on each task, on its holdout items where it has them.

        Returns:
            task, role, expert, metric, suite, base_score, score, share (domain: of the expert's gain; general: of the
            base's ability kept), and the share's 95 % interval low, high.
        """
        self.require_scored(trial)
        suite = suite or self.suite_of(trial)
        everyone = self._retention(suite)
        rows = everyone[everyone["trial"] == trial]
        if rows.empty:
            raise RunError(f"trial {trial} of run {self.name} has no {suite} scores")
        kept = rows["role"] == "general"
        frame = pd.DataFrame(
            {
                "task": rows["task"],
                "role": rows["role"],
                "expert": rows["expert"],
                "metric": rows["task"].map({task.name: task.metric for task in self.tasks}),
                "suite": suite,
                "base_score": rows["task"].map(self.scores(self._measured_from[0], suite)),
                "score": rows["score"],
                "share": rows["gain_share"].where(~kept, 1 - rows["forgetting"]),
                "low": rows["low"].where(~kept, 1 - rows["high"]),
                "high": rows["high"].where(~kept, 1 - rows["low"]),
            }
        )
        return frame.reset_index(drop=True)

    def sentinels(self) -> pd.DataFrame:
        """Return what front and anchors won or lost on the sentinel tasks, which neither search nor learning has seen.

        Returns:
            trial, task, metric, base_score, score, change (score minus the base's, in the metric's unit, turned so
            that higher is better), and the change's 95 % interval low, high. Empty where nothing was scored.
        """
        names = ["trial", "task", "metric", "base_score", "score", "change", "low", "high"]
        metrics = {task.name: task.metric for task in self.tasks if task.role == SENTINEL}
        if not metrics or self._points.empty or self.judging_suite != HOLDOUT:
            return pd.DataFrame(columns=names)
        changes = sentinel_changes(self.scale(HOLDOUT))
        shown = self._points.index[self._points["front"] | ~self._roles.isin(NO_ANCHORS)]
        changes["metric"] = changes["task"].map(metrics)
        changes["base_score"] = changes["task"].map(self.scores(self._measured_from[0], HOLDOUT))
        return changes.loc[changes["trial"].isin(shown), names].reset_index(drop=True)

    def flips(self, trial: int, suite: str | None = None) -> pd.DataFrame:
        """Count the answers that a trial lost and won against the base, on the items that judge it; columns as of
        `evals.flips.flips`. Tasks that have no right and wrong are left out."""
        self.require_scored(trial)
        return flips(self.scale(suite or self.suite_of(trial)), trial)

    def flipped_items(self, trial: int, suite: str | None = None) -> pd.DataFrame:
        """List the items that a trial lost or won against the base: task, item (its hash), change, and for the
        recommended merge what was asked and answered (`optimizer.runs.flipped.TEXTS`), where a report told it."""
        self.require_scored(trial)
        return with_texts(flipped_items(self.scale(suite or self.suite_of(trial)), trial), self.path, trial)

    @property
    def flagged(self) -> list[int]:
        """The trials that a guard flags, of the front, the anchors, and those that it keeps off the front."""
        if self._points.empty:
            return []
        shown = {*self._points.index[self._points["front"] | ~self._roles.isin(NO_ANCHORS)], *self.kept_off}
        return [int(trial) for trial in sorted(shown) if self.is_flagged(int(trial))]

    # --- picking a point -----------------------------------------------------------------------------------------

    def knee(self) -> int:
        """Find the front's point farthest above the line from base to expert (search items choose, holdout items
        judge). With a bank, the farthest one standard error below its estimate: of those that may be, the surest."""
        points = self._require_points()
        if self.is_estimated:
            front = np.flatnonzero(points["front"])
            is_expert = (self._roles == Role.EXPERT).to_numpy()
            return int(points.index[front[knee_by_samples(self._samples_of_losses, front, is_expert)]])
        rivals = losses_of(points, self.objectives)
        return int(rivals.index[knee_of(rivals, self._roles == Role.EXPERT, points["front"])])

    def best(self, max_forgetting: float, *, sure: float = SURE) -> int:
        """Find the front's point with the most domain gain that forgets at most so much, by the search items; never the
        base.

        Args:
            max_forgetting: a share: 0.05 is 5 %.
            sure: how sure that must be, a share of resamplings (see `within`). 0 asks for the measured value alone, and
                mostly finds the point whose items flattered it most.

        Raises:
            NoPointError: no point forgets so little.
            RunError: one of the two is not a share.
        """
        if not -1 <= max_forgetting <= 1:  # below 0: better than the base at what it could do
            raise RunError(f"a limit on forgetting is a share: 5 % is 0.05; given {max_forgetting:g}")
        if not 0 <= sure <= 1:
            raise RunError(f"how sure to be is a share: 90 % is 0.9; given {sure:g}")
        self._require_points()
        if (found := self._best(max_forgetting, sure)) is not None:
            return found
        front, asked = self._merges_on_front(), percent(max_forgetting)
        if sure and (front["forgetting"] <= max_forgetting).any():
            raise NoPointError(
                f"no point of run {self.name} forgets at most {asked} in {percent(sure)} of resamplings; "
                "allow more forgetting, be less sure (--sure), or measure more items"
            )
        least = f"the least is {percent(front['forgetting'].min())}" if len(front) else "the base beats them all"
        raise NoPointError(f"no point of run {self.name} forgets at most {asked}; {least}")

    def within(self, max_forgetting: float, suite: str) -> pd.Series[float]:
        """Count the share of resamplings of a suite's items in which each trial stays within a limit on forgetting."""
        draws = self._draws(suite)
        shares = (draws.samples["forgetting"] <= max_forgetting).mean(axis=0)
        return pd.Series(shares, index=pd.Index(draws.trials, name="trial"))

    def by_limit(self, sure: float = SURE) -> pd.DataFrame:
        """Find the best point for each of some limits on forgetting, and what the items that judge it say.

        Args:
            sure: as of `best`.

        Returns:
            limit, trial, kind, suite (that judges), domain and forgetting with `_low` and `_high`, and kept: the share
            of resamplings in which the limit is kept. Without a row for limits that no point keeps, or every expert.
        """
        names = [f"{name}{end}" for name in ("domain", "forgetting") for end in ENDS]
        most = self.reference()["forgetting"] if len(self._points) else 0.0
        rows = []
        for limit in (limit for limit in LIMITS if limit < most):
            if (trial := self._best(limit, sure)) is None:
                continue
            suite = self.suite_of(trial)
            row = self.points(suite).loc[trial]
            rows.append((limit, trial, row["kind"], suite, *row[names], self.within(limit, suite)[trial]))
        return pd.DataFrame(rows, columns=["limit", "trial", "kind", "suite", *names, "kept"])

    # --- the search as a whole -----------------------------------------------------------------------------------

    def reference(self) -> dict[str, float]:
        """Return the hypervolume's reference point: domain 0 (the base), forgetting of the expert that forgot most."""
        experts = self._points[self._roles == Role.EXPERT]
        return {**dict.fromkeys(self.objectives[:-1], 0.0), "forgetting": float(experts["forgetting"].max())}

    def hypervolume(self) -> pd.DataFrame:
        """Compute what the points so far cover, after each scored one: trial, kind, hypervolume (search items,
        `reference`)."""
        minimised = self._losses(SEARCH)
        covered = growth(minimised.to_numpy(), self._corner())
        kinds = [self.kinds[trial].stored for trial in minimised.index]
        return pd.DataFrame({"trial": minimised.index, "kind": kinds, "hypervolume": covered})

    def anchors_hypervolume(self) -> float:
        """Compute what the points that were not searched cover, with the same reference point."""
        minimised = self._losses(SEARCH)
        minimised = minimised[~self._roles[minimised.index].isin(NO_ANCHORS)]
        return hypervolume(minimised.to_numpy(), self._corner()) if len(minimised) else 0.0

    def does_search_pay(self, sure: float = SURE) -> pd.DataFrame:
        """Compare, for each of some limits on forgetting, the best point that was found with the best of the lines:
        chosen by the search items, and compared on the items that judge (`compare_at_limits`).

        Args:
            sure: as of `best`.

        Returns:
            limit, suite, line_trial, line_kind, line_domain, line_forgetting, trial, kind, domain, forgetting,
            difference (of the gain, as a share) and its 95 % interval low, high. -1 in place of a trial where no point
            of a side keeps to the limit. Without a row for limits that neither does, or every expert; empty where
            nothing was found: no point was derived, learned or searched.
        """
        if self._points.empty or not self._roles.isin(FOUND).any():
            return pd.DataFrame(columns=list(PAY_COLUMNS))
        suite, most = self.judging_suite, self.reference()["forgetting"]
        judged = self.points(suite)
        return compare_at_limits(
            self.points(SEARCH),
            self._roles,
            judged.drop(index=[trial for trial in judged.index[judged["domain"].notna()] if self.is_kept_off(trial)]),
            self._draws(suite),
            suite=suite,
            limits=[limit for limit in LIMITS if limit < most],
            kept=lambda limit: self.within(limit, SEARCH),
            sure=sure,
        )

    @property
    def has_prepared_points(self) -> bool:
        """Whether a point of it was derived or learned."""
        return bool(self._roles.isin(PREPARED).any())

    def what_pays(self) -> pd.DataFrame:
        """Compute what is covered by the anchors of the space, with those derived, with those learned, with those
        searched, and by all: each set's front by the search items, on the items that judge it.

        Returns:
            set ("anchors", "+ derived", "+ learned", "+ searched", "all"; without those that have no point), suite,
            points (on its front), hypervolume (`reference`), share (what it has more than anchors and searched points
            have, a share of theirs), and the share's 95 % interval low, high (paired by item).
        """
        return self._what_pays.copy()

    # --- recomputing ---------------------------------------------------------------------------------------------

    @cached_property
    def _points(self) -> pd.DataFrame:
        columns = self._objective_columns()
        if self.references is None:
            names = [f"{prefix_of(suite)}{name}" for suite in (SEARCH, HOLDOUT) for name in columns]
            empty = pd.DataFrame(columns=names, dtype=float)
            for column in ("method", "kind"):
                empty.insert(0, column, pd.Series(dtype=str))
            return empty.assign(front=pd.Series(dtype=bool), front_chance=np.nan).rename_axis("trial")
        frame = objectives(self._draws(SEARCH))
        rivals = losses_of(frame, self.objectives).drop(index=self._off_front, errors="ignore")
        mask = on_front(rivals.to_numpy(), rivals.index.isin([*self.fitted]))
        frame = frame.join(self._holdout[0].add_prefix(prefix_of(HOLDOUT)))
        frame.insert(0, "kind", [self.kinds[number].stored for number in frame.index])
        frame.insert(1, "method", [self.method(number) for number in frame.index])
        frame["front"] = frame.index.isin(rivals.index[mask])
        is_rival = ~frame.index.isin([*self.kept_off])
        frame["front_chance"] = 0.0
        frame.loc[is_rival, "front_chance"] = front_chances(self._samples_of_losses[:, is_rival])
        return frame

    @cached_property
    def _samples_of_losses(self) -> NDArray[np.float64]:
        """The objectives of every point on resampled search items: (B, T, m), all minimised."""
        return losses(np.stack([self._draws(SEARCH).samples[name] for name in self.objectives], axis=-1))

    @cached_property
    def _holdout(self) -> tuple[pd.DataFrame, str]:
        """The objectives by the holdout items, and what keeps the outcomes that are there from being used."""
        try:
            return objectives(self._draws(HOLDOUT)), ""
        except TaskError as error:
            fault = "" if self.outcomes(HOLDOUT).empty else str(error)
            return pd.DataFrame(columns=self._objective_columns(), dtype=float), fault

    @cached_property
    def _what_pays(self) -> pd.DataFrame:
        if self._points.empty:
            return pd.DataFrame(columns=["set", "suite", *COLUMNS[1:]])
        rivals = self._losses(SEARCH)
        fronts = fronts_by_set(rivals, self._roles[rivals.index], self.fitted)
        judged = self.points(HOLDOUT)["domain"].notna()
        is_judged = all(judged[trials].all() for trials in fronts.values())  # else a set would lack points
        suite = HOLDOUT if is_judged else SEARCH
        frame = what_sets_cover(self._draws(suite), fronts, names=self.objectives, corner=self._corner())
        frame.insert(1, "suite", suite)
        return frame

    @cached_property
    def _roles(self) -> pd.Series[Any]:
        """The role of every point."""
        return roles_of(self._points["kind"])

    def _objective_columns(self) -> list[str]:
        names = ["domain", *(name for name in self.objectives if name not in ("domain", "forgetting")), "forgetting"]
        return [*names, *(f"{name}_{end}" for name in names for end in ("low", "high", "stderr"))]

    def _losses(self, suite: str) -> pd.DataFrame:
        """Return what points are compared by, all minimised; without those that a race stopped or a guard keeps off."""
        return losses_of(self.points(suite), self.objectives).drop(index=self._off_front, errors="ignore")

    def _retention(self, suite: str) -> pd.DataFrame:
        if suite not in self._retentions:
            self._require_points()
            self._retentions[suite] = task_retention(self.scale(suite))
        return self._retentions[suite]

    @cached_property
    def _retentions(self) -> dict[str, pd.DataFrame]:
        return {}

    def _require_points(self) -> pd.DataFrame:
        if self._points.empty:
            raise NoPointError(f"run {self.name}: {self.why_empty}")
        return self._points

    def _best(self, max_forgetting: float, sure: float) -> int | None:
        front = self._merges_on_front()
        certain = front[self.within(max_forgetting, SEARCH)[front.index] >= sure]
        at = best_under(certain["domain"], certain["forgetting"], max_forgetting=max_forgetting)
        return None if at is None else int(certain.index[at])

    def _merges_on_front(self) -> pd.DataFrame:
        """Give the front without the base, which forgets nothing and is no answer."""
        front = self.front()
        return front[self._roles[front.index] != Role.BASE]

    def _corner(self) -> list[float]:
        reference = self.reference()
        return [float(loss) for loss in losses([reference[name] for name in self.objectives])]
