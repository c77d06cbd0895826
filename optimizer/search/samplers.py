"""Which sampler proposes the next recipe, and with which seed: Optuna's, and two of our own."""

from __future__ import annotations

import warnings
from collections.abc import Container

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from optimizer.errors import StudyFileError
from optimizer.runs.trial import TrialKind
from optimizer.search.cmaes import ScalarisedCmaEs
from optimizer.search.front_sampler import FrontSampler
from search_spaces.choice import METHOD

SAMPLERS = ("auto", "tpe", "gp", "front", "nsga2", "nsga3", "cmaes", "random", "qmc")
WITHOUT_LIMITS = ("random", "qmc")  # which learn nothing; all others go by a trial's constraints
GP_DIMENSIONS = 20
GP_TRIALS = 200
POPULATION = (8, 16)
CONDITIONAL = ("tpe", "random")  # the others learn from the parameters that every trial has, and draw the rest blindly


def make_sampler(name: str, *, dimensions: int, conditional: bool, budget: int, seed: int, told: int) -> BaseSampler:
    """Make a sampler for a study of several objectives.

    "auto" is the Gaussian process (expected hypervolume improvement) for up to 20 dimensions and 200 trials: it needs
    the fewest trials, which cost minutes each. In 40 dimensions it finds no more than multivariate TPE
    (`benchmarks/search.py`), and its own cost grows with the cube of the trials, so beyond these limits "auto" is
    TPE, whose cost stays small. With several merge methods it is TPE too.

    Args:
        name: one of SAMPLERS; where `conditional`, one that `require_learns` lets pass.
        dimensions: parameters searched.
        conditional: some trials have parameters that others lack.
        budget: trials the study may finish.
        seed: the study's.
        told: trials in the study so far. It is mixed into the seed, or a resumed study would repeat its first points.
    """
    mixed = int(np.random.SeedSequence((seed, told)).generate_state(1)[0])
    if name == "auto":
        name = "gp" if dimensions <= GP_DIMENSIONS and budget <= GP_TRIALS and not conditional else "tpe"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        match name:
            case "tpe":  # weights of neighbouring layers interact, so one joint density; running trials count as bad
                return _MethodApart(multivariate=True, constant_liar=True, seed=mixed)
            case "gp":
                return optuna.samplers.GPSampler(
                    deterministic_objective=True, warn_independent_sampling=False, seed=mixed
                )
            case "front":
                return FrontSampler(seed=mixed)
            case "nsga2":
                return optuna.samplers.NSGAIISampler(population_size=_population(budget), seed=mixed)
            case "nsga3":
                return optuna.samplers.NSGAIIISampler(population_size=_population(budget), seed=mixed)
            case "cmaes":
                return ScalarisedCmaEs(seed=mixed)
            case "random":
                return optuna.samplers.RandomSampler(seed=mixed)
            case "qmc":  # one sequence, whoever goes on with it: where it is stands in the study
                return optuna.samplers.QMCSampler(scramble=True, seed=seed, warn_independent_sampling=False)
    raise AssertionError(f"unknown sampler {name}")


def _population(budget: int) -> int:
    """Give a generation's size: Optuna's 50 would make the first 50 trials a random search."""
    least, most = POPULATION
    return min(max(budget // 5, least), most)


class SampledStudy(Study):
    """A study in which samplers do not see the trials without parameters: prepared ones, and those between two others.

    Samplers learn from the parameters that all trials have.
    """

    def all_trials(self, states: Container[TrialState] | None = None) -> list[FrozenTrial]:
        """Give the trials of some states or of all, also those that samplers do not see; to be read only."""
        return super()._get_trials(deepcopy=False, states=states)

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        trials = super()._get_trials(deepcopy, states, use_cache)
        kinds = ((trial, trial.user_attrs) for trial in trials)
        return [trial for trial, told in kinds if "kind" not in told or TrialKind.of(told).has_params]


class _MethodApart(optuna.samplers.TPESampler):
    """TPE that chooses the merge method by itself, before the parameters that all trials have are drawn jointly.

    In one density with the weights, the anchors' method has all the good neighbours, and the others are hardly tried.
    """

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        space = super().infer_relative_search_space(study, trial)
        return {name: distribution for name, distribution in space.items() if name != METHOD}


def require_learns(name: str, *, conditional: bool) -> None:
    """Refuse a sampler that would draw blindly what only some of the methods have.

    Raises:
        StudyFileError: any but those of CONDITIONAL, where trials have parameters that others lack.
    """
    if conditional and name not in ("auto", *CONDITIONAL):
        raise StudyFileError(
            f"a study over methods with parameters of their own needs a sampler that learns from each of them; "
            f"given {name}, which learns only from what all trials have; write {', '.join(CONDITIONAL)} or auto"
        )
