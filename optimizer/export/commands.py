"""From a point or a recipe to a model folder: what `export` and `merge` do."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from evals.documents import read_json
from optimizer.errors import RunError, StudyFileError
from optimizer.export.card import plain
from optimizer.export.model_folder import export_model, float_dtype
from optimizer.merging.merge import Sources
from optimizer.runs.certificates import certified
from optimizer.runs.frames import rows_of
from optimizer.runs.guard_words import guard_sentence
from optimizer.runs.manifest import read_manifest
from optimizer.runs.measures import measures
from optimizer.runs.path import path_of, recipe_at
from optimizer.runs.scored import ScoredRun
from optimizer.strict_yaml import LARGEST_FILE, read_yaml, shown
from optimizer.words import task_labels
from search_spaces.mergekit.reader import from_mergekit
from search_spaces.mergekit.stack import Stack, is_stack, stack_of, stack_sources
from search_spaces.recipe import Recipe


def export_trial(run: ScoredRun, trial: int, out: Path | None = None, *, describe: Callable[[int], str]) -> Path:
    """Write one trial of a run as a model folder whose card has its scores, and return the folder.

    Args:
        out: the new folder; None is exports/trial-N in the run's folder.
        describe: says in a sentence what a scored trial keeps and forgets, for the card.

    Raises:
        RunError: there is no such trial, or a checkpoint has changed since it was scored.
        CheckpointError, MergeError: as `export_model`.
    """
    recipe = _with_present_paths(run, run.recipe(trial))
    sources = Sources.open(recipe.base, dict(recipe.experts))
    _require_as_scored(run, sources)
    scored = trial in run.points().index
    card = f"{describe(trial)} Intervals hold 95 %." if scored else f"Trial {trial} was not scored."
    guarded = [plain(said)] if scored and (said := guard_sentence(run, trial)) else []
    guarded += map(plain, measures(run) if scored else ())
    card = "\n\n".join([card, *guarded, *(f"Certified: {plain(said)}" for said in certified(run.path, recipe.digest))])
    return export_model(
        recipe, sources, out or run.path / "exports" / f"trial-{trial}", scores=_scores(run, trial, scored), card=card
    )


def export_knob(run: ScoredRun, knob: float, out: Path | None = None, *, describe: Callable[[int], str]) -> Path:
    """Write the merge at a place of the run's path as a model folder, and return the folder.

    Args:
        knob: 0 is the base, 1 the expert, and learned anchors stand at what the domain counts for them.
        out: the new folder; None is exports/knob-K in the run's folder.
        describe: as of `export_trial`; the card tells of the two trials between which the merge lies.

    Raises:
        RunError: the run has no such path, or a checkpoint has changed since it was scored.
        CheckpointError, MergeError: as `export_model`.
    """
    recipe, trial = recipe_at(run, knob)
    if trial is not None:
        return export_trial(run, trial, out, describe=describe)
    recipe = _with_present_paths(run, recipe)
    sources = Sources.open(recipe.base, dict(recipe.experts))
    _require_as_scored(run, sources)
    return export_model(
        recipe, sources, out or run.path / "exports" / f"knob-{knob:g}", card=knob_sentence(run, knob, describe)
    )


def knob_sentence(run: ScoredRun, knob: float, describe: Callable[[int], str]) -> str:
    """Say between which trials a place of the path lies, and what they keep and forget."""
    path = path_of(run)
    neighbours = [max(p for p in path if p[0] <= knob), min(p for p in path if p[0] > knob)]
    between = " and ".join(f"trial {trial} ({run.kinds[trial].label})" for _, trial in neighbours)
    return f"It lies between {between} and was not scored itself. " + " ".join(describe(t) for _, t in neighbours)


def merge_recipe(path: Path, out: Path) -> Path:
    """Write the merge that a recipe.json or a mergekit YAML file asks for as a new model folder, and return it.

    Raises:
        SpaceError, StudyFileError: the file holds something no recipe can hold.
        CheckpointError, MergeError: as `export_model`.
    """
    from optimizer.checkpoints.opening import open_checkpoint

    if path.suffix == ".json":
        written = read_json(path, limit=LARGEST_FILE, unique=True, finite=True, error=StudyFileError)
        if isinstance(written, dict) and "layers" in written:
            return _write_stack(Stack.from_document(written), out)
        return _write_merge(Recipe.from_document(written), out)
    document = read_yaml(path, anchors=True)
    if is_stack(document):
        models = {source: open_checkpoint(source) for source in dict.fromkeys(stack_sources(document))}
        first, names = next(iter(models.values())), {source: model.names for source, model in models.items()}
        return _write_stack(stack_of(document, names, base_dtype=float_dtype(first)), out)
    base = open_checkpoint(_base_of(document, path))
    return _write_merge(from_mergekit(document, base.names, base_dtype=float_dtype(base)), out)


def _write_merge(recipe: Recipe, out: Path) -> Path:
    sources = Sources.open(recipe.base, dict(recipe.experts))
    recipe.require_places(sources.base.names)
    return export_model(recipe, sources, out)


def _write_stack(stack: Stack, out: Path) -> Path:
    from optimizer.checkpoints.opening import open_checkpoint
    from optimizer.export.stack_folder import write_stack

    return write_stack(stack, {name: open_checkpoint(source) for name, source in stack.models}, out)


def _base_of(document: Mapping[str, Any], path: Path) -> str:
    """Find the base's path: `base_model: path`, `base_model: {model: {path: path}}`, or else the first model."""
    given = document.get("base_model")
    base = _first_model(document) if given is None else given
    if isinstance(base, dict):
        inner = base.get("model")
        base = inner.get("path") if isinstance(inner, dict) else inner
    if not isinstance(base, str):
        raise StudyFileError(f"{path}: base_model: must name the base's folder; given {shown(given)}")
    return base


def _first_model(document: Mapping[str, Any]) -> object:
    place: Any = document
    for key in ("slices", 0, "sources", 0, "model") if "slices" in document else ("models", 0, "model"):
        try:
            place = place[key]
        except (KeyError, IndexError, TypeError):
            return None
    return place


def _with_present_paths(run: ScoredRun, recipe: Recipe) -> Recipe:
    """Return the recipe with the models where the run's study file has them: they may have been moved since."""
    models = read_yaml(run.path / "study.yaml").get("models") if (run.path / "study.yaml").is_file() else None
    if not isinstance(models, dict):
        return recipe
    experts = models.get("experts")
    present = {name: path for name, path in (experts if isinstance(experts, dict) else {}).items() if _is_text(path)}
    return replace(
        recipe,
        base=models["base"] if _is_text(models.get("base")) else recipe.base,
        experts=tuple((name, present.get(name, source)) for name, source in recipe.experts),
    )


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _require_as_scored(run: ScoredRun, sources: Sources) -> None:
    stored = read_manifest(run.path)["fingerprint"]
    assert isinstance(stored, dict)
    known = {"base": stored.get("base"), **stored.get("experts", {})}
    for name, model in {"base": sources.base, **sources.experts}.items():
        if known.get(name) is not None and not model.is_known_as(known[name]):
            raise RunError(
                f"{model.folder} ({name}) has changed since run {run.name} scored it; restore it, or merge what is "
                "there now by a recipe: mergefront merge"
            )


def _scores(run: ScoredRun, trial: int, scored: bool) -> dict[str, dict[str, float]]:
    """Return for the card each task's score of the base and of the merge, and what was gained or kept."""
    if not scored:
        return {}
    columns = {"base_score": "base", "score": "merge", "share": "share gained (domain) or kept (general)"}
    rows = list(rows_of(run.retention(trial)).values())
    return {
        f"{name} ({row['role']}, {row['metric']})": {
            title: float(row[name]) for name, title in columns.items() if math.isfinite(row[name])
        }
        for name, row in zip(task_labels(rows), rows, strict=True)
    }
