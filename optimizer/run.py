"""The reading side of a run folder: every number is recomputed from what is stored, also while a search is writing.

Needs neither torch nor ray nor lm-eval, and changes nothing. What is read is kept: open the run again to see it grow.
"""

from __future__ import annotations

import html
import os
from dataclasses import astuple, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from optuna.trial import TrialState

from evals.errors import TaskError
from evals.objectives import Draws, carries, draw_objectives, objectives, task_retention, task_scores
from evals.outcomes import HOLDOUT, SEARCH
from evals.truncation import cut_short
from optimizer.errors import NoPointError, RunError
from optimizer.runs.comparison import Gap, gap_to_line
from optimizer.runs.frames import Row, rows_of
from optimizer.runs.front import LIMITS, SURE, best_under, hypervolume, knee_of, non_dominated
from optimizer.runs.manifest import read_manifest, tasks_of
from optimizer.runs.outcome_files import FRAME_COLUMNS, outcomes_frame, outcomes_path, sound_outcomes
from optimizer.runs.study_home import stored_trials
from optimizer.runs.trial import BASE, NOT_COUNTED, Role, TrialKind, roles_of
from optimizer.words import count, listed, percent
from search_spaces.errors import SpaceError
from search_spaces.groups import flow_order, kind_of, layer_of
from search_spaces.parameters import METHODS
from search_spaces.recipe import Recipe

if TYPE_CHECKING:
    import plotly.graph_objects as go

NOTHING_YET = "No finished trial yet: the base and every expert must be scored first"
LINES = {"uniform": Role.UNIFORM, "slope": Role.SLOPE}
TRIAL_COLUMNS = ("state", "kind", "method", "seconds", "reason", "recipe")


def open_run(path: Path | str, *, storage: str | None = None) -> Run:
    """Open a run folder for reading.

    Args:
        storage: the Optuna URL of a study that is not kept in the folder's own study.db.

    Raises:
        RunError: the folder is not a run, or its study is damaged or not ours.
    """
    return Run(Path(path), storage)


class Run:
    """A run as it was when it was opened. Points are trials by number; figures are shares (0.06 is 6 %)."""

    def __init__(self, path: Path, storage: str | None = None) -> None:
        if not path.exists():
            raise RunError(f"{path} does not exist; a run folder is made by `mergefront search`")
        if not path.is_dir():
            raise RunError(f"{path} is a file, not a run folder")
        self.path = path
        self.name = path.resolve().name
        manifest = read_manifest(path)
        self.tasks = tasks_of(manifest, path / "tasks.json")
        self._frozen = {trial.number: trial for trial in stored_trials(path, manifest, storage)}

    # --- trials and points ---------------------------------------------------------------------------------------

    def trials(self) -> pd.DataFrame:
        """Every trial by number: state, kind ("base", "expert:…", an anchor's name, "search"), merge method, seconds,
        reason of failure or of why a complete trial has no figures, and the recipe's digest."""
        rows = {
            number: (
                trial.state.name.lower(),
                self._kinds[number].stored,
                self._methods.get(number, ""),
                trial.user_attrs.get("seconds", np.nan),
                self._reason(number),
                self.recipe(number).digest if "recipe" in trial.user_attrs else "",
            )
            for number, trial in self._frozen.items()
        }
        frame = pd.DataFrame.from_dict(rows, orient="index", columns=list(TRIAL_COLUMNS))
        return frame.rename_axis("trial")

    def points(self) -> pd.DataFrame:
        """Every scored trial by number: kind, method, the objectives with `_low`, `_high`, `_stderr`, the same again
        with `holdout_` before (NaN where it was not scored there), and `front`. Empty until base and experts are in."""
        return self._points.copy()

    def front(self, suite: str = SEARCH) -> pd.DataFrame:
        """The points no other point beats by a suite's figures, from least to most forgetting; columns as `points`."""
        prefix = _prefix(suite)
        losses = self._losses(prefix).dropna()
        front = self._points.loc[losses.index[non_dominated(losses.to_numpy())]]
        return front.sort_values([f"{prefix}forgetting", f"{prefix}domain"], kind="stable")

    def anchors(self) -> pd.DataFrame:
        """The points every study scores first: base, experts, the uniform line, the slopes; columns as `points`."""
        return self._points[self._roles != Role.SEARCHED].copy()

    @property
    def objectives(self) -> tuple[str, ...]:
        """The objectives' column names: domain (one per expert where there are several), forgetting."""
        names = self.experts
        return (*(["domain"] if len(names) < 2 else [f"domain_{name}" for name in names]), "forgetting")

    @property
    def methods(self) -> tuple[str, ...]:
        """The merge methods of its trials, in order of appearance."""
        return tuple(dict.fromkeys(self._methods.values()))

    @property
    def experts(self) -> tuple[str, ...]:
        """The experts' names."""
        return tuple(name for name, _ in self._any_recipe.experts) if self._any_recipe else ()

    # --- one trial -----------------------------------------------------------------------------------------------

    def recipe(self, trial: int) -> Recipe:
        """The recipe of a trial."""
        self._require_trial(trial)
        if "recipe" not in self._frozen[trial].user_attrs:
            raise RunError(f"trial {trial} of run {self.name} has no recipe: it is {self._ended(trial)}")
        try:
            return Recipe.from_json(self._frozen[trial].user_attrs["recipe"])
        except SpaceError as error:
            raise RunError(f"run {self.name}: the recipe of trial {trial} cannot be read: {error}") from error

    def weights(self, trial: int) -> pd.DataFrame:
        """How much of each expert a trial took in each group: group, kind, layer (-1 for embed and head), expert,
        weight; groups in the order data flows through them."""
        recipe = self.recipe(trial)
        spec = METHODS[recipe.method]
        parameter = spec.parameter(spec.scale)
        assert parameter is not None, "the scale is one of the method's parameters"
        groups = sorted({setting.group for setting in recipe.settings if setting.group}, key=flow_order)
        rows = []
        for name, _ in recipe.experts:
            for group in groups:
                layer = layer_of(group)
                owner = name if parameter.scope == "expert" else ""
                weight = recipe.value(parameter.name, expert=owner, group=group)
                rows.append((group, kind_of(group), -1 if layer is None else layer, name, weight))
        return pd.DataFrame(rows, columns=["group", "kind", "layer", "expert", "weight"])

    def retention(self, trial: int, suite: str | None = None) -> pd.DataFrame:
        """What a trial won or lost on each task, on its holdout items where it has them.

        Returns:
            task, role, expert, metric, suite, base_score, score, share (domain: of the expert's gain; general: of the
            base's ability kept), and the share's 95 % interval low, high.
        """
        self._require_scored(trial)
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

    def scores(self, trial: int, suite: str) -> dict[str, float]:
        """A trial's score on each task of a suite, in the metric's own unit."""
        outcomes = self._outcomes(suite)
        scores = task_scores(outcomes[outcomes["trial"] == trial], suite)
        return dict(zip(scores["task"], scores["score"], strict=True))

    def named(self, trial: int) -> str:
        """A trial as people call it: its number, and its method where the run has several."""
        self._require_trial(trial)
        return f"trial {trial} ({self._methods.get(trial, 'no recipe')})" if len(self.methods) > 1 else f"trial {trial}"

    def suite_of(self, trial: int) -> str:
        """The suite that judges a trial: "holdout" where it was scored there, else "search"."""
        scored = trial in self._points.index and bool(self._points["holdout_domain"].notna()[trial])
        return HOLDOUT if scored else SEARCH

    def describe(self, trial: int) -> str:
        """One sentence on what a trial keeps and forgets, with intervals, and on which items."""
        self._require_scored(trial)
        prefix = _prefix(self.suite_of(trial))
        row = rows_of(self._points)[trial]
        gain, loss = (_said(row, f"{prefix}{name}") for name in ("domain", "forgetting"))
        items = "items the search never saw" if prefix else "the items the search used"
        return f"{self._titled(trial)} keeps {gain} of the domain gain and forgets {loss}, measured on {items}."

    # --- picking a point -----------------------------------------------------------------------------------------

    def knee(self) -> int:
        """The front's point farthest above the line from base to expert (search items choose, holdout items judge)."""
        points = self._require_points()
        return int(points.index[knee_of(self._losses(""), self._roles == Role.EXPERT)])

    def best(self, max_forgetting: float, *, sure: float = 0.0) -> int:
        """The front's point with the most domain gain that forgets at most so much, by the search items.

        Args:
            max_forgetting: a share: 0.05 is 5 %.
            sure: how sure that must be, a share of resamplings (see `within`); 0 asks for the measured value alone.

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
        front, asked = self.front(), percent(max_forgetting)
        if sure and (front["forgetting"] <= max_forgetting).any():
            raise NoPointError(
                f"no point of run {self.name} forgets at most {asked} in {percent(sure)} of resamplings; "
                "allow more forgetting, be less sure, or measure more items"
            )
        raise NoPointError(
            f"no point of run {self.name} forgets at most {asked}; the least is {percent(front['forgetting'].min())}"
        )

    def within(self, max_forgetting: float, suite: str) -> pd.Series[float]:
        """How sure it is that each trial forgets at most so much: the share of resamplings of a suite's items."""
        draws = self._draws(suite)
        shares = (draws.samples["forgetting"] <= max_forgetting).mean(axis=0)
        return pd.Series(shares, index=pd.Index(draws.trials, name="trial"))

    def how_sure(self, trial: int, max_forgetting: float) -> str:
        """One sentence on how sure it is that a trial forgets at most so much, by the items that judge it."""
        self._require_scored(trial)
        suite = self.suite_of(trial)
        share = self.within(max_forgetting, suite)[trial]
        return f"In {percent(share)} of resamplings of the {suite} items it forgets at most {percent(max_forgetting)}."

    def by_limit(self, sure: float = SURE) -> pd.DataFrame:
        """The answer for each of some limits on forgetting: the best point, and what the items that judge it say.

        Args:
            sure: as of `best`.

        Returns:
            limit, trial, kind, suite (that judges), domain and forgetting with `_low` and `_high`, and kept: the share
            of resamplings in which the limit is kept. Without a row for limits that no point keeps, or every expert.
        """
        names = [f"{name}{end}" for name in ("domain", "forgetting") for end in ("", "_low", "_high")]
        most = self.reference()["forgetting"] if len(self._points) else 0.0
        rows = []
        for limit in (limit for limit in LIMITS if limit < most):
            if (trial := self._best(limit, sure)) is None:
                continue
            suite, row = self.suite_of(trial), self._points.loc[trial]
            figures = [row[f"{_prefix(suite)}{name}"] for name in names]
            rows.append((limit, trial, row["kind"], suite, *figures, self.within(limit, suite)[trial]))
        return pd.DataFrame(rows, columns=["limit", "trial", "kind", "suite", *names, "kept"])

    # --- the search as a whole -----------------------------------------------------------------------------------

    def reference(self) -> dict[str, float]:
        """The hypervolume's reference point: domain 0 (the base), forgetting of the expert that forgot most."""
        experts = self._points[self._roles == Role.EXPERT]
        return {**dict.fromkeys(self.objectives[:-1], 0.0), "forgetting": float(experts["forgetting"].max())}

    def hypervolume(self) -> pd.DataFrame:
        """What the points so far cover, after each scored trial: trial, hypervolume (search items, `reference`)."""
        losses, corner = self._losses(""), self._corner()
        covered, front, rows = 0.0, np.empty((0, losses.shape[1])), []
        for trial, point in zip(losses.index, losses.to_numpy(), strict=True):
            candidates = np.vstack([front, point])
            mask = non_dominated(candidates)
            if mask[-1]:
                front = candidates[mask]
                covered = hypervolume(front, corner)
            rows.append((trial, covered))
        return pd.DataFrame(rows, columns=["trial", "hypervolume"])

    def anchors_hypervolume(self) -> float:
        """What the anchors alone cover, with the same reference point."""
        losses = self._losses("")
        return hypervolume(losses[self._roles != Role.SEARCHED].to_numpy(), self._corner()) if len(losses) else 0.0

    def does_search_pay(self, trial: int | None = None) -> pd.DataFrame:
        """A trial against the anchors' lines at the same forgetting: the knee, if it was searched, unless named.

        A line joins base, its own anchors and expert, without those another point of it beats. The difference is
        paired by item, and its interval holds the uncertainty of what each of the points forgets (`gap_to_line`).

        Returns:
            line ("uniform", "slope"), suite, forgetting, domain (the trial's), line_forgetting (the same, or the least
            the line has), line_domain, difference and its 95 % interval low, high. Empty with several experts.
        """
        columns = ["line", "suite", "forgetting", "domain", *(gap.name for gap in fields(Gap))]
        if len(self.experts) != 1 or self._points.empty or (trial is None and self._is_anchor(self.knee())):
            return pd.DataFrame(columns=columns)
        trial = self.knee() if trial is None else trial
        self._require_scored(trial)
        suite = self.suite_of(trial)
        rows = [(line, suite, *found) for line, role in LINES.items() if (found := self._against(trial, role, suite))]
        return pd.DataFrame(rows, columns=columns)

    def verdict(self) -> list[str]:
        """Whether searching was worth it, judged at the knee: a sentence for each line of anchors."""
        if len(self._points) and self._is_anchor(knee := self.knee()):
            return [f"The knee needs no search: it is {self._points['kind'][knee]}. The search found no better one."]
        return [_verdict(gap) for gap in rows_of(self.does_search_pay()).values()]

    def cut_short(self) -> list[str]:
        """Tasks with items longer than the model's context, or answers that hit their limit of tokens: a sentence each,
        over all finished trials and both suites."""
        return cut_short(pd.concat([self._outcomes(suite) for suite in (SEARCH, HOLDOUT)], ignore_index=True))

    def lost(self) -> list[str]:
        """Finished trials whose stored outcomes are missing or damaged and that every figure leaves out: a sentence for
        each suite, naming the files."""
        found = [(suite, faults) for suite in (SEARCH, HOLDOUT) if (faults := self._lost(suite))]
        return [
            f"Without the {suite} outcomes of {count(len(faults), 'trial')}, until `mergefront search` scores them "
            f"again: {listed(list(faults.values()))}."
            for suite, faults in found
        ]

    def findings(self) -> list[str]:
        """What a reader should know first, in plain words: tasks that cannot carry a measurement, what was cut short,
        lost outcomes, failed trials."""
        notes = self.lost()
        if len(self._points):
            base, experts = self._measured_from
            notes += carries(self._outcomes(SEARCH), tasks=self.tasks, suite=SEARCH, base=base, experts=experts)
        else:
            notes.append(self._why_empty)
        notes += self.cut_short()
        notes += [self._holdout_trouble] if self._holdout_trouble else []
        trials = self.trials()
        failed = trials[(trials["state"] == "fail") & ~trials["reason"].str.startswith(NOT_COUNTED)]
        if len(failed):
            notes.append(f"{count(len(failed), 'trial')} failed; most often: {failed['reason'].mode().iloc[0]}")
        return notes

    def summary(self) -> str:
        """The run in a few plain sentences."""
        states = self.trials()["state"]
        done, total = int((states == "complete").sum()), len(states)
        head = f"Run {self.name}: {done} of {count(total, 'trial')} finished"
        if self._points.empty:
            return f"{head}. {self._why_empty}"
        return f"{head}, {count(len(self.front()), 'point')} on the front. {self.describe(self.knee())}"

    # --- figures -------------------------------------------------------------------------------------------------

    def plot_front(self) -> go.Figure:
        """Forgetting against domain gain: anchors, searched points, the front with intervals, the knee."""
        from optimizer.views import plots

        return plots.front(self._points, knee=self.knee() if len(self._points) else None, suite=self._suite())

    def plot_weights(self, trial: int) -> go.Figure:
        """The weights of one trial over the depth of the model, by module and expert."""
        from optimizer.views import plots

        return plots.weights(
            self.weights(trial), title=f"{self._titled(trial)}: how much of the expert each layer takes"
        )

    def plot_hypervolume(self) -> go.Figure:
        """The hypervolume over trials, against what the anchors alone cover."""
        from optimizer.views import plots

        return plots.hypervolume(
            self.hypervolume(),
            anchors=self.anchors_hypervolume(),
            first_searched=int((self._roles != Role.SEARCHED).sum()),
            reference=self.reference(),
        )

    def plot_retention(self, trial: int) -> go.Figure:
        """What one trial kept of each general task and won of each domain task, with intervals."""
        from optimizer.views import plots

        return plots.retention(self.retention(trial), title=f"{self._titled(trial)}: what it won and what it kept")

    def __repr__(self) -> str:
        return f"<run {self.name}>"

    def _repr_html_(self) -> str:
        front = self.front()
        columns = ["kind", *self.objectives, *(f"holdout_{name}" for name in self.objectives)]
        table = front[columns].to_html(float_format=lambda value: f"{value:.1%}", escape=True)
        return f"<p>{html.escape(self.summary())}</p>{table if len(front) else ''}"

    # --- recomputing ---------------------------------------------------------------------------------------------

    @cached_property
    def _points(self) -> pd.DataFrame:
        columns = self._objective_columns()
        measured_from = self._measured_from_or_none
        if measured_from is None:
            empty = pd.DataFrame(columns=[*columns, *(f"holdout_{name}" for name in columns)], dtype=float)
            for column in ("method", "kind"):
                empty.insert(0, column, pd.Series(dtype=str))
            return empty.assign(front=pd.Series(dtype=bool)).rename_axis("trial")
        frame = objectives(self._draws(SEARCH))
        frame = frame.join(self._holdout_objectives(columns).add_prefix("holdout_"))
        frame.insert(0, "kind", [self._kinds[number].stored for number in frame.index])
        frame.insert(1, "method", [self._methods[number] for number in frame.index])
        frame["front"] = non_dominated(_losses(frame, self.objectives, "").to_numpy())
        return frame

    def _holdout_objectives(self, columns: list[str]) -> pd.DataFrame:
        try:
            return objectives(self._draws(HOLDOUT))
        except TaskError as error:
            self._holdout_trouble = f"The holdout scores cannot be used: {error}" if self._scored(HOLDOUT) else ""
            return pd.DataFrame(columns=columns, dtype=float)

    _holdout_trouble = ""

    def _draws(self, suite: str) -> Draws:
        if suite not in self._drawn:
            base, experts = self._measured_from
            self._drawn[suite] = draw_objectives(
                self._outcomes(suite), tasks=self.tasks, suite=suite, base=base, experts=experts
            )
        return self._drawn[suite]

    @cached_property
    def _drawn(self) -> dict[str, Draws]:
        return {}

    def _objective_columns(self) -> list[str]:
        names = ["domain", *(name for name in self.objectives if name not in ("domain", "forgetting")), "forgetting"]
        return [*names, *(f"{name}_{end}" for name in names for end in ("low", "high", "stderr"))]

    @cached_property
    def _retentions(self) -> dict[str, pd.DataFrame]:
        return {}

    def _retention(self, suite: str) -> pd.DataFrame:
        if suite not in self._retentions:
            self._require_points()
            base, experts = self._measured_from
            self._retentions[suite] = task_retention(
                self._outcomes(suite), tasks=self.tasks, suite=suite, base=base, experts=experts
            )
        return self._retentions[suite]

    @cached_property
    def _stored(self) -> dict[str, tuple[pd.DataFrame, dict[int, str]]]:
        return {suite: self._read_outcomes(suite) for suite in (SEARCH, HOLDOUT)}

    def _read_outcomes(self, suite: str) -> tuple[pd.DataFrame, dict[int, str]]:
        """The stored outcomes of finished trials, and what is wrong with the files of others, by trial."""
        frames, faults = [], {}
        for number, trial in self._frozen.items():
            path = outcomes_path(self.path, number, suite)
            if trial.state != TrialState.COMPLETE or (suite == HOLDOUT and not os.path.lexists(path)):
                continue  # a file of a trial that is still open is not a point yet
            try:
                digest = self.recipe(number).digest
                rows = sound_outcomes(self.path, number, suite, digest=digest, tasks=self.tasks)
                frames.append(outcomes_frame(rows, number))
            except RunError as error:
                faults[number] = str(error)
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=list(FRAME_COLUMNS)), faults

    def _outcomes(self, suite: str) -> pd.DataFrame:
        """The stored outcomes of finished trials, but for those that are lost."""
        return self._stored[suite][0]

    def _lost(self, suite: str) -> dict[int, str]:
        """What is wrong with the outcomes of finished trials that every figure of a suite leaves out, by trial."""
        return self._stored[suite][1]

    @property
    def _why_empty(self) -> str:
        """Why there is no point."""
        lost = [fault for number, fault in self._lost(SEARCH).items() if self._kinds[number].is_reference]
        return f"No figure without base and experts: {listed(lost)}." if lost else f"{NOTHING_YET}."

    def _scored(self, suite: str) -> bool:
        return not self._outcomes(suite).empty

    @property
    def _measured_from(self) -> tuple[int, dict[str, int]]:
        found = self._measured_from_or_none
        assert found is not None, "base and experts are scored"
        return found

    @cached_property
    def _measured_from_or_none(self) -> tuple[int, dict[str, int]] | None:
        """The trials that are the base and each expert, or None until all of them are scored."""
        scored = set(self._outcomes(SEARCH)["trial"])
        trials = {self._kinds[number]: number for number in sorted(scored, reverse=True)}
        experts = {name: trials[kind] for name in self.experts if (kind := TrialKind.expert(name)) in trials}
        if BASE not in trials or not experts or len(experts) < len(self.experts):
            return None
        return trials[BASE], experts

    @cached_property
    def _kinds(self) -> dict[int, TrialKind]:
        return {number: TrialKind.of(trial.user_attrs) for number, trial in self._frozen.items()}

    @cached_property
    def _roles(self) -> pd.Series[Any]:
        """The role of every point."""
        return roles_of(self._points["kind"])

    @cached_property
    def _any_recipe(self) -> Recipe | None:
        return next((self.recipe(n) for n, trial in self._frozen.items() if "recipe" in trial.user_attrs), None)

    def _titled(self, trial: int) -> str:
        return self.named(trial).replace("t", "T", 1)

    @cached_property
    def _methods(self) -> dict[int, str]:
        """The merge method of every trial that has a recipe."""
        return {n: self.recipe(n).method for n, trial in self._frozen.items() if "recipe" in trial.user_attrs}

    def _require_points(self) -> pd.DataFrame:
        if self._points.empty:
            raise NoPointError(f"run {self.name}: {self._why_empty}")
        return self._points

    def _require_trial(self, trial: int) -> None:
        if trial not in self._frozen:
            there = f"trials 0 to {max(self._frozen)}" if self._frozen else "none yet"
            raise RunError(f"run {self.name} has no trial {trial}; it has {there}")

    def _require_scored(self, trial: int) -> None:
        self._require_trial(trial)
        if trial not in self._require_points().index:
            raise RunError(f"trial {trial} of run {self.name} is not scored: {self._ended(trial)}")

    def _ended(self, trial: int) -> str:
        """The state of a trial, and why it has no figures."""
        return ", ".join(filter(None, (self._frozen[trial].state.name.lower(), self._reason(trial))))

    def _reason(self, trial: int) -> str:
        """Why a trial failed, or why a complete one has no figures."""
        return str(self._frozen[trial].user_attrs.get("reason", self._lost(SEARCH).get(trial, "")))

    def _best(self, max_forgetting: float, sure: float) -> int | None:
        front = self.front()
        certain = front[self.within(max_forgetting, SEARCH)[front.index] >= sure]
        at = best_under(certain["domain"], certain["forgetting"], max_forgetting=max_forgetting)
        return None if at is None else int(certain.index[at])

    def _is_anchor(self, trial: int) -> bool:
        return self._kinds[trial].is_anchor

    def _losses(self, prefix: str) -> pd.DataFrame:
        return _losses(self._points, self.objectives, prefix)

    def _corner(self) -> list[float]:
        reference = self.reference()
        return [*(-reference[name] for name in self.objectives[:-1]), reference["forgetting"]]

    def _suite(self) -> str:
        return HOLDOUT if self._points["holdout_domain"].notna().any() else SEARCH

    def _against(self, trial: int, line: Role, suite: str) -> tuple[float, ...] | None:
        """A trial against one line of anchors: its forgetting and domain, and the gap's fields."""
        prefix = _prefix(suite)
        domain, forgetting = (self._points[f"{prefix}{name}"] for name in ("domain", "forgetting"))
        base, experts = self._measured_from
        on_line = (self._roles == line) & domain.notna()
        stops = domain.index[on_line | domain.index.isin([base, *experts.values()])]
        if not on_line.any():
            return None
        gap = gap_to_line(self._draws(suite), trial, stops.to_list())
        return forgetting[trial], domain[trial], *astuple(gap)


def _losses(points: pd.DataFrame, names: tuple[str, ...], prefix: str) -> pd.DataFrame:
    """The objectives with those to be maximised negated: (n, m), all minimised, forgetting last."""
    losses = points[[f"{prefix}{name}" for name in names]].astype(float)
    losses.iloc[:, :-1] *= -1
    return losses


def _prefix(suite: str) -> str:
    if suite not in (SEARCH, HOLDOUT):
        raise RunError(f"a suite is {SEARCH} or {HOLDOUT}, not {suite}")
    return "holdout_" if suite == HOLDOUT else ""


def _verdict(gap: Row) -> str:
    line = {"uniform": "one weight for all layers", "slope": "a weight that rises with depth"}[gap["line"]]
    middle, low, high = (100 * gap[name] for name in ("difference", "low", "high"))
    if low > 0:
        meaning = f"the search keeps {middle:.0f} points more [{low:.0f}, {high:.0f}], so here it pays"
    elif high < 0:
        meaning = f"the search keeps {-middle:.0f} points less [{-high:.0f}, {-low:.0f}], so take that instead"
    else:
        meaning = f"the difference, {middle:+.0f} points [{low:+.0f}, {high:+.0f}], does not show that search pays"
    kept = f"keeps {percent(gap['line_domain'])} of the gain; {meaning}."
    if gap["line_forgetting"] > gap["forgetting"]:
        return f"No point with {line} forgets so little; the nearest, at {percent(gap['line_forgetting'])}, {kept}"
    return f"At the same forgetting, {line} {kept}"


def _said(row: Row, name: str) -> str:
    return percent(row[name], row[f"{name}_low"], row[f"{name}_high"])
