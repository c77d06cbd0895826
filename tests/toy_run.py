"""A finished run of a made-up model: what readers of a run folder are tested on.

Twelve layers. Domain skill sits in the middle, general ability is lost mostly by changing the first and the last
layers, so the best merges are neither on the uniform line nor on a slope. Items are answered by a logistic model, with
the same luck for every trial.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import optuna
import pandas as pd

from evals.objectives import Scale, draw_objectives, objective_names, objectives
from evals.outcomes import Outcome, TaskInfo
from optimizer.runs.front import losses, non_dominated
from optimizer.runs.run_folder import RunFolder
from search_spaces.recipe import Recipe
from search_spaces.shape import Shape
from search_spaces.space import Space
from tests.search_spaces.names import depth_of

LAYERS = 12
ITEMS = {"search": 160, "holdout": 240}
STUDY = """\
name: toy
models:
  base: models/base
  experts:
    clinical: models/clinical
space: {method: linear, shape: {curve: 4}, modules: [attn, mlp]}
search: {trials: 47, seed: 0}
"""


@dataclass(frozen=True, slots=True)
class ToyTask:
    info: TaskInfo
    base: float  # ability of the base, in logits (accuracy) or bits per byte
    change: float  # what the whole expert adds to it


def _task(name: str, role: str, metric: str, chance: float, base: float, change: float, expert: str = "") -> ToyTask:
    accuracy = metric == "acc"
    kind = "multiple_choice" if accuracy else "loglikelihood_rolling"
    counts = {suite: n if accuracy else n // 4 for suite, n in ITEMS.items()}
    if role == "sentinel":
        counts["search"] = 0
    info = TaskInfo(name, role, expert, kind, metric, accuracy, chance, counts["search"], counts["holdout"])
    return ToyTask(info, base, change)


def toy_tasks(experts: Sequence[str], *, shared: bool = False, sentinel: bool = False) -> list[ToyTask]:
    """Three general tasks, and two domain tasks for each expert or, shared, two that name none and so measure all.

    Args:
        sentinel: two more, of which the search has no items.
    """
    tasks = []
    if shared:
        tasks = [
            _task("questions", "domain", "acc", 0.25, -1.2, 2.6),
            _task("notes", "domain", "bits_per_byte", 0.0, 1.30, -0.42),
        ]
        experts = ()
    sentinels = [
        _task("minimal_pairs", "sentinel", "acc", 0.5, 1.2, -1.8),
        _task("letters", "sentinel", "bits_per_byte", 0.0, 1.1, 0.12),
    ]
    for name in experts:
        expert = name if len(experts) > 1 else ""
        tasks += [
            _task(f"{name}_questions", "domain", "acc", 0.25, -1.2, 2.6, expert),
            _task(f"{name}_notes", "domain", "bits_per_byte", 0.0, 1.30, -0.42, expert),
        ]
    return [
        *tasks,
        _task("science", "general", "acc", 0.25, 0.9, -1.5),
        _task("grammar", "general", "acc", 0.5, 1.6, -2.0),
        _task("plain_text", "general", "bits_per_byte", 0.0, 0.95, 0.16),
        *(sentinels if sentinel else ()),
    ]


def toy_space(experts: Sequence[str] = ("clinical",)) -> Space:
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    for i in range(LAYERS):
        names += [f"model.layers.{i}.self_attn.q_proj.weight", f"model.layers.{i}.mlp.up_proj.weight"]
    return Space.build(
        "linear",
        "models/base",
        experts={name: f"models/{name}" for name in experts},
        tensors=names,
        shape=Shape("curve", 4),
        modules=("attn", "mlp"),
        ranges={},
    )


def toy_run(
    folder: Path,
    *,
    trials: int = 40,
    experts: tuple[str, ...] = ("clinical",),
    seed: int = 0,
    holdout: bool = True,
    shared: bool = False,
    sentinel: bool = False,
) -> Path:
    """Write a finished run folder: the anchors, then so many search trials, one of them failed; return its path.

    Args:
        folder: does not exist yet.
        holdout: the front and the anchors were scored again on the holdout suite.
        shared: the domain tasks name no expert.
        sentinel: there are two sentinel tasks too.
    """
    shutil.copytree(_built(trials, experts, seed, holdout, shared, sentinel), folder)
    return folder


@cache
def _built(trials: int, experts: tuple[str, ...], seed: int, holdout: bool, shared: bool, sentinel: bool) -> Path:
    """The run, written once per process: a database of fifty trials takes seconds."""
    parent = Path(tempfile.mkdtemp(prefix="toy-run-"))
    atexit.register(shutil.rmtree, parent, ignore_errors=True)
    space, tasks = toy_space(experts), toy_tasks(experts, shared=shared, sentinel=sentinel)
    infos = [task.info for task in tasks]
    run = RunFolder.create_or_resume(parent / "toy", STUDY, {"seed": seed, "toy": True}, tasks=infos)
    rng = np.random.default_rng(seed)
    asked = [(anchor.name, anchor.params) for anchor in space.anchors()]
    asked += [("search", params) for params in _search(space, trials, rng)]
    recipes = [space.recipe(params) for _, params in asked]
    failed = len(asked) - trials // 2 if trials > 2 else None

    scored = [number for number in range(len(asked)) if number != failed]
    frames = [_write(run, number, "search", recipes[number], tasks) for number in scored]
    kinds = {kind: number for number, (kind, _) in enumerate(asked)}
    ends = {"base": kinds["base"], "experts": {name: kinds[f"expert:{name}"] for name in experts}}
    scores = objectives(draw_objectives(Scale(pd.concat(frames), infos, "search", **ends), replicates=0))
    columns = list(objective_names(experts))
    _write_study(run, space, asked, recipes, scores[columns], rng)
    if holdout:
        on_front = scores.index[non_dominated(losses(scores[columns]))]
        anchors = [number for number, (kind, _) in enumerate(asked) if kind != "search"]
        for number in sorted({*on_front, *anchors}):
            _write(run, number, "holdout", recipes[number], tasks)
    return run.path


def _search(space: Space, trials: int, rng: np.random.Generator) -> list[dict[str, float]]:
    """Random params first, then small changes of the best so far: enough of an optimiser for a toy."""
    names = sorted(space.distributions())
    found: list[tuple[dict[str, float], tuple[float, float]]] = []
    for i in range(trials):
        if i < trials // 3:
            values = np.clip(rng.normal(0.5, 0.3, len(names)), 0, 1)
        else:
            front = non_dominated([goal for _, goal in found])
            parents = [params for (params, _), keep in zip(found, front, strict=True) if keep]
            parent = parents[rng.integers(len(parents))]
            values = np.clip([parent[name] + rng.normal(0, 0.15) for name in names], 0, 1)
        params = {name: float(value) for name, value in zip(names, values, strict=True)}
        skill, harm = _effects(space.recipe(params))
        found.append((params, (-float(np.mean(list(skill.values()))), harm)))
    return [params for params, _ in found]


def _effects(recipe: Recipe) -> tuple[dict[str, float], float]:
    """The share of each expert's skill that a recipe has (0..1), and the share of the harm (one expert alone: 1)."""
    groups = sorted({setting.group for setting in recipe.settings if setting.group.startswith("layer")})
    depth = np.array([depth_of(group, LAYERS) for group in groups])
    useful = np.exp(-(((depth - 0.45) / 0.2) ** 2))
    fragile = 0.1 + 1.5 * (1 - depth) ** 3 + 1.5 * depth**3
    skill, harm = {}, 0.0
    for name, _ in recipe.experts:
        weight = np.array([recipe.value("weight", expert=name, group=group) for group in groups])
        dose = float((useful * weight).sum() / useful.sum())
        skill[name] = (1 - np.exp(-2.0 * dose)) / (1 - np.exp(-2.0))
        harm += float((fragile * weight**1.7).sum() / fragile.sum())
    return skill, harm


def _write(run: RunFolder, number: int, suite: str, recipe: Recipe, tasks: Sequence[ToyTask]) -> pd.DataFrame:
    skill, harm = _effects(recipe)
    own_noise = np.random.default_rng(int(recipe.digest, 16))
    outcomes = [o for task in tasks for o in _outcomes(task, suite, skill, harm, own_noise)]
    run.write_outcomes(number, suite, recipe.digest, outcomes)
    return run.read_outcomes(number, suite)


def _outcomes(
    task: ToyTask, suite: str, skill: Mapping[str, float], harm: float, noise: np.random.Generator
) -> list[Outcome]:
    info = task.info
    n = info.search_items if suite == "search" else info.holdout_items
    luck = np.random.default_rng([len(info.name), len(suite), n])  # the same items for every trial
    effect = (
        harm if info.role != "domain" else (skill[info.expert] if info.expert else float(np.mean(list(skill.values()))))
    )
    level = task.base + task.change * effect
    items = [f"{luck.integers(2**63):016x}" for _ in range(n)]
    if info.metric == "acc":
        logit = level + luck.normal(0, 1.2, n) + noise.normal(0, 0.25, n)
        known = luck.random(n) < 1 / (1 + np.exp(-logit))
        values = (known | (luck.random(n) < info.chance)).astype(float)
        weights = np.ones(n)
    else:
        weights = luck.integers(400, 1600, n).astype(float)
        values = weights * (level + luck.normal(0, 0.15, n) + noise.normal(0, 0.02, n))
    return [
        Outcome(info.name, suite, item, float(value), float(weight), (-float(value),), False)
        for item, value, weight in zip(items, values, weights, strict=True)
    ]


def _write_study(
    run: RunFolder,
    space: Space,
    asked: Sequence[tuple[str, Mapping[str, float]]],
    recipes: Sequence[Recipe],
    values: pd.DataFrame,
    rng: np.random.Generator,
) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    directions = ["maximize"] * (values.shape[1] - 1) + ["minimize"]
    storage = run.storage()
    study = optuna.create_study(study_name=run.path.name, storage=storage, directions=directions)
    ready = []
    for number, ((kind, params), recipe) in enumerate(zip(asked, recipes, strict=True)):
        done = number in values.index
        attributes = {"recipe": recipe.to_json(), "kind": kind, "seconds": round(float(rng.uniform(20, 30)), 1)}
        reason = {} if done else {"reason": "merge gave a tensor that is not finite: model.layers.3.mlp.up_proj.weight"}
        ready.append(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.COMPLETE if done else optuna.trial.TrialState.FAIL,
                params=dict(params),
                distributions=space.distributions(),
                values=values.loc[number].tolist() if done else None,
                user_attrs={**attributes, **reason},
            )
        )
    study.add_trials(ready)
    storage.remove_session()
    storage.engine.dispose()
