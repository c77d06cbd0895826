"""What `learn` and `derive` do: one recipe by gradients, or one expert by a closed form, without a search."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from evals.documents import checked_path
from optimizer.commands import say
from optimizer.errors import MergeError, StudyFileError
from optimizer.run_study import derived_folder, make_pool, worker_spec
from optimizer.runs.atomic_file import write_atomically
from optimizer.search.derived import with_derived
from optimizer.search.plan import Ready, count_tokens, make_plan, require_own_names, require_sound
from optimizer.study.study_file import read_study
from optimizer.workers.orders import BOUNDS, By, Derivation, Form, Learned, Lesson, Loss
from optimizer.workers.worker import Worker
from search_spaces import Recipe, Setting


def learn_weights(
    study_path: Path,
    overrides: Sequence[str],
    out: Path,
    *,
    preference: float,
    start: float,
    steps: int,
    by: By,
    loss: Loss,
) -> Learned:
    """Learn merge weights on a study's search items, and write them as a recipe.

    Args:
        study_path, overrides: as of `run_study`; of its search nothing is used.
        out: the new recipe file (JSON).
        preference: what the experts' domains count, in equal parts, 0 to 1; the general tasks have the rest.
        start: the sum of the weights to begin at, in equal parts.
        steps: how many.
        by: whether every tensor or every layer group has a weight of its own.
        loss: on the items' labels, or the divergence from base and experts.

    Raises:
        MergefrontError: the study or the file is not usable, or a merge is not finite.
        TaskError: a task has nothing to learn from.
    """
    if checked_path(out, where="--out", error=MergeError).exists():
        raise MergeError(f"a recipe is written to a new file, and {out} exists; name another one or remove it")
    ready = _ready(study_path, overrides)
    study = with_derived(ready, derived_folder(ready.study), make_pool, say).study
    experts = tuple(study.models.experts.items())
    settings = tuple(Setting("weight", name, "", start / len(experts)) for name, _ in experts)
    lesson = Lesson(
        start=Recipe("task_arithmetic", study.models.base, experts, settings).to_json(),
        preference=tuple((name, preference / len(experts)) for name, _ in experts),
        by=by,
        steps=steps,
        bounds=BOUNDS,
        seed=study.search.seed,
        loss=loss,
    )
    learned = Worker(worker_spec(study)).learn(lesson)
    write_atomically(out, (learned.recipe + "\n").encode())
    return learned


def derive_expert(
    study_path: Path,
    overrides: Sequence[str],
    out: Path,
    *,
    form: Form,
    share: float,
    expert: str,
) -> Path:
    """Make an expert of a study's base and expert by a closed form over its search items, and return its folder.

    Args:
        study_path, overrides: as of `run_study`; of its search nothing is used.
        out: the folder in which the expert's own is made, named by what it was made of; made before, it is found.
        form: how it is made.
        share: how far it goes to the expert, between 0 and 1.
        expert: its name; "" where the study has one.

    Raises:
        MergefrontError: the study is not usable, or the folder cannot be written.
        TaskError: a task has nothing to learn from.
    """
    _ready(study_path, overrides)
    study = read_study(study_path, overrides)
    names = list(study.models.experts)
    if not expert and len(names) > 1:
        raise StudyFileError(f"name the expert to derive from with --expert: one of {', '.join(names)}")
    if expert and expert not in names:
        raise StudyFileError(f"--expert: the study's experts are {', '.join(names)}; given {expert!r}")
    path = Derivation(form, expert or names[0], (share,), out.absolute())
    return Worker(worker_spec(study)).derive(path)[0]


def _ready(study_path: Path, overrides: Sequence[str]) -> Ready:
    """Open a study, and require that its models and tasks fit."""
    require_own_names()
    plan = make_plan(read_study(study_path, overrides))
    if plan.study.models.derived:
        count_tokens(plan)  # what they are made of is known by what is asked
    return require_sound(plan)
