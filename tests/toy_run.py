"""A finished run of a made-up model: what readers of a run folder are tested on.

Twelve layers. Domain skill sits in the middle, general ability is lost mostly by changing the first and the last
layers, so the best merges are neither on the uniform line nor on a slope. Items are answered by a logistic model, with
the same luck for every trial.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
from optuna.study import StudyDirection

from evals.objectives import Scale, draw_objectives, objective_names, objectives
from evals.outcomes import Outcome, TaskInfo
from optimizer.database.study_home import close
from optimizer.runs.front import losses, non_dominated
from optimizer.runs.run_folder import RunFolder
from search_spaces.groups import group_at
from search_spaces.recipe import Recipe, Setting
from search_spaces.shape import Shape
from search_spaces.space import Params, Space
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


Asked = tuple[str, Params, Recipe]  # kind, params, recipe


def tensor_names() -> list[str]:
    modules = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
    layers = [f"model.layers.{i}.{module}.weight" for i in range(LAYERS) for module in modules]
    return ["model.embed_tokens.weight", "model.norm.weight", *layers]


def toy_space(experts: Sequence[str] = ("clinical",)) -> Space:
    return Space.build(
        "linear",
        "models/base",
        experts={name: f"models/{name}" for name in experts},
        tensors=tensor_names(),
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
    derived: tuple[str, ...] = (),
    learned: tuple[float, ...] = (),
) -> Path:
    """Write a finished run folder: the anchors, then so many search trials, one of them failed; return its path.

    Args:
        folder: does not exist yet.
        holdout: the front and the anchors were scored again on the holdout suite.
        shared: the domain tasks name no expert.
        sentinel: there are two sentinel tasks too.
        derived: shares of the first expert's derived experts by form, such as "regmean 0.4"; trials after the anchors.
        learned: preferences of learned trials: the first after the derived ones, each other after three more searched.
    """
    shutil.copytree(_built(trials, experts, seed, holdout, shared, sentinel, derived, learned), folder)
    return folder


@cache
def _built(
    trials: int,
    experts: tuple[str, ...],
    seed: int,
    holdout: bool,
    shared: bool,
    sentinel: bool,
    derived: tuple[str, ...],
    learned: tuple[float, ...],
) -> Path:
    """The run, written once per process: a database of fifty trials takes seconds."""
    parent = Path(tempfile.mkdtemp(prefix="toy-run-"))
    atexit.register(shutil.rmtree, parent, ignore_errors=True)
    space, tasks = toy_space(experts), toy_tasks(experts, shared=shared, sentinel=sentinel)
    infos = [task.info for task in tasks]
    run = RunFolder.create_or_resume(parent / "toy", STUDY, {"seed": seed, "toy": True}, tasks=infos)
    rng = np.random.default_rng(seed)
    anchors = [(anchor.name, dict(anchor.params), space.recipe(anchor.params)) for anchor in space.anchors()]
    asked: list[Asked] = [("search", params, space.recipe(params)) for params in _search(space, trials, rng)]
    fails = asked[-(trials // 2)] if trials > 2 else None
    for i, p in enumerate(learned):
        asked.insert(4 * i, (f"learned p={p:.2f}", {}, learned_recipe(space, p)))
    asked = [*anchors, *((f"derived {what}", {}, derived_recipe(experts[0], what)) for what in derived), *asked]
    recipes = [recipe for _, _, recipe in asked]
    failed = next((number for number, one in enumerate(asked) if one is fails), None)

    scored = [number for number in range(len(asked)) if number != failed]
    frames = [_write(run, number, "search", recipes[number], tasks) for number in scored]
    kinds = {kind: number for number, (kind, _, _) in enumerate(asked)}
    ends = {name: kinds[f"expert:{name}"] for name in experts}
    scores = objectives(
        draw_objectives(Scale(pd.concat(frames), infos, "search", base=kinds["base"], experts=ends), replicates=0)
    )
    columns = list(objective_names(experts))
    _write_study(run, space, asked, scores[columns], rng)
    if holdout:
        others = [number for number in scores.index if not asked[number][0].startswith(("derived", "learned"))]
        fronts = [rows.index[non_dominated(losses(rows))] for rows in (scores[columns], scores.loc[others, columns])]
        unsearched = [number for number, (kind, _, _) in enumerate(asked) if kind != "search"]
        for number in sorted({*fronts[0], *fronts[1], *unsearched}):
            _write(run, number, "holdout", recipes[number], tasks)
    return run.path


def derived_recipe(expert: str, what: str) -> Recipe:
    """One derived expert, whole: it harms less than a merge that has as much skill."""
    form, share = what.split()
    name = f"{expert}_{form}_{100 * float(share):.0f}"
    return Recipe("linear", "models/base", ((name, f"derived/{expert}/{share}"),), (Setting("weight", name, "", 1.0),))


def learned_recipe(space: Space, preference: float) -> Recipe:
    """A weight for every tensor, near to what is best for a preference of the domain."""
    start = space.recipe(space.anchors()[0].params)
    settings = []
    for name, _ in start.experts:
        for i, tensor in enumerate(tensor_names()):
            depth = depth_of(group_at(tensor), LAYERS)
            weight = 1.5 * preference * np.exp(-(((depth - 0.45) / 0.3) ** 2)) + 0.04 * (-1) ** i
            settings.append(Setting("weight", name, tensor, round(float(np.clip(weight, 0, 1)), 4)))
    return Recipe(start.method, start.base, start.experts, tuple(settings))


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
    if recipe.experts[0][1].startswith("derived/"):
        _, name, share = recipe.experts[0][1].split("/")
        return {name: float(share) ** 0.5}, 0.35 * float(share)
    places = {setting.group: group_at(setting.group) for setting in recipe.settings if setting.group}
    groups = sorted(place for place, group in places.items() if group.startswith("layer"))
    depth = np.array([depth_of(places[place], LAYERS) for place in groups])
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


def lesson_of(kind: str) -> dict[str, str]:
    """What a learned trial says of its lesson; nothing for others."""
    if not kind.startswith("learned"):
        return {}
    lesson = {
        "preference": {"clinical": float(kind.split("=")[1])},
        "steps": 24,
        "pull": 0.25,
        "candidates": 18.2,
        "seconds": 41.5,
    }
    losses_of = {"seen_before": 0.512, "seen": 0.401, "kept_before": 0.508, "kept": 0.433}
    return {"lesson": json.dumps(lesson | losses_of)}


def _write_study(
    run: RunFolder,
    space: Space,
    asked: Sequence[Asked],
    values: pd.DataFrame,
    rng: np.random.Generator,
) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    directions = [*[StudyDirection.MAXIMIZE] * (values.shape[1] - 1), StudyDirection.MINIMIZE]
    storage = run.storage()
    study = optuna.create_study(study_name=run.path.name, storage=storage, directions=directions)
    ready = []
    for number, (kind, params, recipe) in enumerate(asked):
        done = number in values.index
        attributes = {"recipe": recipe.to_json(), "kind": kind, "seconds": round(float(rng.uniform(20, 30)), 1)}
        reason = {} if done else {"reason": "merge gave a tensor that is not finite: model.layers.3.mlp.up_proj.weight"}
        ready.append(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.COMPLETE if done else optuna.trial.TrialState.FAIL,
                params=dict(params),
                distributions={**space.distributions()} if params else {},
                values=values.loc[[number]].to_numpy()[0].tolist() if done else None,
                user_attrs={**attributes, **reason, **lesson_of(kind)},
            )
        )
    study.add_trials(ready)
    close(storage)
