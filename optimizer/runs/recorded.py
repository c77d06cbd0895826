"""What a run folder holds: its trials, their recipes, and the outcomes of those that finished.

Reading changes nothing and needs neither torch nor ray nor lm-eval. What is read is kept: open the run again to see it
grow.
"""

from __future__ import annotations

import os
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from statistics import fmean

import numpy as np
import pandas as pd
from optuna.trial import TrialState

from evals.documents import DocumentError, read_json
from evals.objectives import objective_names, task_scores
from evals.outcomes import HOLDOUT, SEARCH
from optimizer.database.study_home import stored_trials
from optimizer.errors import RunError
from optimizer.runs.lesson import LESSON_COLUMNS, read_lesson
from optimizer.runs.manifest import read_manifest, tasks_of
from optimizer.runs.outcome_files import joined_frame, outcomes_path, sound_outcomes
from optimizer.runs.sensitivities import OBJECTIVES, Sensitivities, sensitivity_file
from optimizer.runs.trial import BASE, STOPPED, Role, TrialKind
from search_spaces.errors import SpaceError
from search_spaces.groups import flow_order, kind_of, layer_of
from search_spaces.parameters import METHODS
from search_spaces.recipe import Recipe

TRIAL_COLUMNS = ("state", "kind", "method", "seconds", "reason", "recipe")


class RecordedRun:
    """A run as it was when it was opened: its trials by number."""

    def __init__(self, path: Path, storage: str | None = None) -> None:
        if not path.exists():
            raise RunError(f"{path} does not exist; a run folder is made by `mergefront search`")
        if not path.is_dir():
            raise RunError(f"{path} is a file, not a run folder")
        self.path = path
        self.name = path.resolve().name
        manifest = read_manifest(path)
        self.tasks = tasks_of(manifest, path / "tasks.json")
        self._recipes: dict[int, Recipe] = {}
        self._frozen = {trial.number: trial for trial in stored_trials(path, manifest, storage)}

    # --- trials --------------------------------------------------------------------------------------------------

    def trials(self) -> pd.DataFrame:
        """Return every trial by number: state, kind ("base", "expert:…", an anchor's name, "search"), merge method,
        seconds, reason of failure or of why a complete trial has no figures, and the recipe's digest."""
        rows = {
            number: (
                trial.state.name.lower(),
                self.kinds[number].stored,
                self._methods.get(number, ""),
                trial.user_attrs.get("seconds", np.nan),
                self._reason(number),
                self.recipe(number).digest if "recipe" in trial.user_attrs else "",
            )
            for number, trial in self._frozen.items()
        }
        frame = pd.DataFrame.from_dict(rows, orient="index", columns=list(TRIAL_COLUMNS))
        return frame.rename_axis("trial")

    @cached_property
    def kinds(self) -> dict[int, TrialKind]:
        """What each trial is."""
        return {number: TrialKind.of(trial.user_attrs) for number, trial in self._frozen.items()}

    def lessons(self) -> pd.DataFrame:
        """Return the learned trials that finished, by number: kind, preference (the domain's share), steps, pull, the
        loss on the items learned from and on those kept apart, before and after, the cost in candidates, seconds; NaN
        where the study does not say."""
        rows = {}
        for number, trial in self._frozen.items():
            kind = self.kinds[number]
            if kind.role is Role.LEARNED and trial.state == TrialState.COMPLETE:
                lesson = read_lesson(trial.user_attrs.get("lesson", ""))
                if np.isnan(lesson["preference"]):
                    lesson["preference"] = kind.preference
                rows[number] = {"kind": kind.stored, **lesson}
        frame = pd.DataFrame.from_dict(rows, orient="index", columns=["kind", *LESSON_COLUMNS])
        return frame.rename_axis("trial")

    @cached_property
    def stopped(self) -> frozenset[int]:
        """The trials that a race stopped, since they were beaten: none of them stands on the front."""
        return frozenset(number for number, trial in self._frozen.items() if trial.user_attrs.get(STOPPED))

    @property
    def is_estimated(self) -> bool:
        """Whether points were scored on some items of a bank, so that some are known better than others."""
        return any(task.drawn_items for task in self.tasks)

    @property
    def methods(self) -> tuple[str, ...]:
        """The merge methods of its trials, in order of appearance."""
        return tuple(dict.fromkeys(self._methods.values()))

    @property
    def experts(self) -> tuple[str, ...]:
        """The experts' names."""
        return tuple(name for name, _ in self._any_recipe.experts) if self._any_recipe else ()

    @property
    def objectives(self) -> tuple[str, ...]:
        """The objectives' column names: domain (one per expert where there are several), forgetting."""
        return objective_names(self.experts)

    # --- one trial -----------------------------------------------------------------------------------------------

    def recipe(self, trial: int) -> Recipe:
        """Return the recipe of a trial."""
        self.require_trial(trial)
        if "recipe" not in self._frozen[trial].user_attrs:
            raise RunError(f"trial {trial} of run {self.name} has no recipe: it is {self._ended(trial)}")
        if trial not in self._recipes:
            try:
                self._recipes[trial] = Recipe.from_json(self._frozen[trial].user_attrs["recipe"])
            except SpaceError as error:
                raise RunError(f"run {self.name}: the recipe of trial {trial} cannot be read: {error}") from error
        return self._recipes[trial]

    def method(self, trial: int) -> str:
        """Return the merge method of a trial; empty where it has no recipe."""
        self.require_trial(trial)
        return self._methods.get(trial, "")

    def weights(self, trial: int) -> pd.DataFrame:
        """Return how much of each expert a trial took in each group: group, kind, layer (-1 for embed and head),
        expert, weight (the mean where a group's tensors differ); groups in the order data flows through them."""
        recipe = self.recipe(trial)
        spec = METHODS[recipe.method]
        parameter = spec.parameter(spec.scale)
        assert parameter is not None, "the scale is one of the method's parameters"
        own = _places(recipe)
        places = own or {group: [] for group in _places(self._any_recipe or recipe)}
        rows = []
        for name, _ in recipe.experts:
            for group in sorted(places, key=flow_order):
                layer = layer_of(group)
                owner = name if parameter.scope == "expert" else ""
                inside = places[group] if own else [""]
                weight = fmean(recipe.value(parameter.name, expert=owner, group=place) for place in inside)
                rows.append((group, kind_of(group), -1 if layer is None else layer, name, weight))
        return pd.DataFrame(rows, columns=["group", "kind", "layer", "expert", "weight"])

    def sensitivities(self) -> dict[str, Sensitivities]:
        """Read where each expert's gain and loss come from, as far as it was measured and can be read."""
        found = {}
        for name in self.experts:
            path = sensitivity_file(self.path, name)
            if not path.is_file():
                continue
            with suppress(
                DocumentError, AttributeError, TypeError, ValueError, KeyError, SpaceError
            ):  # a file written by hand
                read_json(path, finite=True)
                measured = Sensitivities.from_json(path.read_text(encoding="utf-8"))
                if all(len(measured.by_group(objective)) for objective in OBJECTIVES):
                    found[name] = measured
        return found

    def scores(self, trial: int, suite: str) -> dict[str, float]:
        """Return a trial's score on each task of a suite, in the metric's own unit; the base has 0 of a distance to
        it."""
        outcomes, base = self.outcomes(suite), self.references[0] if self.references else None
        known = (
            {number for number, kind in self.kinds.items() if kind.is_anchor} if self._is_drawn(trial, suite) else set()
        )
        scores = task_scores(outcomes[outcomes["trial"].isin({trial, base, *known})], suite)
        mine, of_base = (
            dict(zip(rows["task"], rows["score"], strict=True))
            for rows in (scores[scores["trial"] == number] for number in (trial, base))
        )
        from_base = {task.name: of_base.get(task.name, 0.0) for task in self.tasks if task.is_to_base}
        return {task: score - from_base.get(task, 0.0) for task, score in mine.items()}

    def _is_drawn(self, trial: int, suite: str) -> bool:
        """Tell whether a trial was scored on some items of a bank, so that its scores are estimated from anchors'."""
        outcomes = self.outcomes(suite)
        return bool((outcomes.loc[outcomes["trial"] == trial, "inclusion"].fillna(1.0).astype(float) < 1).any())

    def require_trial(self, trial: int) -> None:
        """Raise RunError where there is no such trial."""
        if trial not in self._frozen:
            there = f"trials 0 to {max(self._frozen)}" if self._frozen else "none yet"
            raise RunError(f"run {self.name} has no trial {trial}; it has {there}")

    # --- outcomes ------------------------------------------------------------------------------------------------

    def outcomes(self, suite: str) -> pd.DataFrame:
        """Return the stored outcomes of finished trials, but for those that are lost."""
        return self._stored[suite][0]

    def lost_outcomes(self, suite: str) -> dict[int, str]:
        """Say what is wrong with the outcomes of finished trials that every figure of a suite leaves out, by trial."""
        return self._stored[suite][1]

    @cached_property
    def references(self) -> tuple[int, dict[str, int]] | None:
        """The trials that are the base and each expert, or None until all of them are scored on the search items."""
        scored = set(self.outcomes(SEARCH)["trial"])
        trials = {self.kinds[number]: number for number in sorted(scored, reverse=True)}
        experts = {name: trials[kind] for name in self.experts if (kind := TrialKind.expert(name)) in trials}
        if BASE not in trials or not experts or len(experts) < len(self.experts):
            return None
        return trials[BASE], experts

    @cached_property
    def _stored(self) -> dict[str, tuple[pd.DataFrame, dict[int, str]]]:
        return {suite: self._read_outcomes(suite) for suite in (SEARCH, HOLDOUT)}

    def _read_outcomes(self, suite: str) -> tuple[pd.DataFrame, dict[int, str]]:
        """Read the stored outcomes of finished trials, and what is wrong with the files of others, by trial."""
        tables, faults = {}, {}
        for number, trial in self._frozen.items():
            path = outcomes_path(self.path, number, suite)
            if trial.state != TrialState.COMPLETE or (suite == HOLDOUT and not os.path.lexists(path)):
                continue  # a file of a trial that is still open is not a point yet
            try:
                digest = self.recipe(number).digest
                tables[number] = sound_outcomes(self.path, number, suite, digest=digest, tasks=self.tasks)
            except RunError as error:
                faults[number] = str(error)
        return joined_frame(tables), faults

    @cached_property
    def _any_recipe(self) -> Recipe | None:
        return next((self.recipe(n) for n, trial in self._frozen.items() if "recipe" in trial.user_attrs), None)

    @cached_property
    def _methods(self) -> dict[int, str]:
        """The merge method of every trial that has a recipe."""
        return {n: self.recipe(n).method for n, trial in self._frozen.items() if "recipe" in trial.user_attrs}

    def _ended(self, trial: int) -> str:
        """Say the state of a trial, and why it has no figures."""
        return ", ".join(filter(None, (self._frozen[trial].state.name.lower(), self._reason(trial))))

    def _reason(self, trial: int) -> str:
        """Say why a trial failed, or why a complete one has no figures."""
        return str(self._frozen[trial].user_attrs.get("reason", self.lost_outcomes(SEARCH).get(trial, "")))


def _places(recipe: Recipe) -> dict[str, list[str]]:
    """Give the groups that a recipe has numbers for, and of each what has them: the group itself, or its tensors."""
    places: dict[str, list[str]] = {}
    for place in sorted({setting.group for setting in recipe.settings if setting.group}):
        places.setdefault(recipe.place_of(place), []).append(place)
    return places
