"""Before a search: open the checkpoints' headers and the tasks, and find everything that does not fit.

`search` goes on from the same plan that `check` prints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from evals.errors import TaskError
from evals.outcomes import SUITES, TaskSpec
from optimizer.errors import MergefrontError, RunError, StudyFileError
from optimizer.search.samplers import require_learns
from optimizer.study.experts import standing_in
from optimizer.study.schema import Study
from optimizer.study.space import space_of
from optimizer.study.tasks import task_specs
from search_spaces.errors import SpaceError

if TYPE_CHECKING:
    from evals.lm_harness import Harness
    from optimizer.checkpoints.checkpoint import Checkpoint
    from search_spaces.choice import Choice
    from search_spaces.space import Space

T = TypeVar("T")

DISTRIBUTION = "mergefront"
OWN_NAMES = ("optimizer", "search_spaces", "evals")

ADAPTER = "adapter_config.json"


@dataclass(slots=True)
class Plan:
    """What has been opened so far of a study. What could not be opened is None, and `problems` says why."""

    study: Study
    base: Checkpoint | None = None
    experts: dict[str, Checkpoint] = field(default_factory=dict)
    space: Space | Choice | None = None
    harness: Harness | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def models(self) -> dict[str, Checkpoint]:
        """The models that could be opened, by their key in the study file; without what stands for a derived one."""
        base = {} if self.base is None else {"models.base": self.base}
        derived = self.study.models.derived
        return base | {f"models.experts.{name}": e for name, e in self.experts.items() if name not in derived}

    def attempt(self, key: str, action: Callable[[], T]) -> T | None:
        """Return the action's result, or None and one more problem."""
        try:
            return action()
        except (MergefrontError, SpaceError, TaskError) as error:
            problem = f"{key}: {error}"
            if problem not in self.problems:  # the tokenizer asks for the config again
                self.problems.append(problem)
            return None


@dataclass(frozen=True, slots=True)
class Ready:
    """A study that can run: everything it names is open, and fits."""

    study: Study
    base: Checkpoint
    experts: Mapping[str, Checkpoint]
    space: Space | Choice
    harness: Harness

    @property
    def models(self) -> list[Checkpoint]:
        """The base and the experts, without what stands for a derived one."""
        derived = self.study.models.derived
        return [self.base, *(expert for name, expert in self.experts.items() if name not in derived)]


def require_own_names(owners: Callable[[], Mapping[str, list[str]]] = packages_distributions) -> None:
    """Raise RunError where another installed distribution owns one of this project's import names."""
    owned = owners()
    for name in OWN_NAMES:
        others = sorted({owner for owner in owned.get(name, []) if owner != DISTRIBUTION})
        if others:
            raise RunError(
                f"{DISTRIBUTION} needs the import name {name!r} for itself; {', '.join(others)} is installed with it "
                f"too; give {DISTRIBUTION} an environment of its own, or run `pip uninstall {others[0]}`"
            )


def make_plan(study: Study) -> Plan:
    """Open everything a study names, and gather all that is wrong; an expert's source stands for what is derived."""
    plan = Plan(standing_in(study))
    study = plan.study
    _open_models(plan)
    if plan.base is not None:
        plan.space = plan.attempt("space", partial(space_of, study, plan.base.names))
    if plan.space is not None:
        conditional = plan.space.is_conditional
        plan.attempt("search.sampler", partial(require_learns, study.search.sampler, conditional=conditional))
    _open_tasks(plan)
    if plan.harness is not None:
        plan.attempt("search.floors", partial(_require_general, study.search.floors, plan.harness))
    _look_for_devices(plan)
    if study.search.storage is not None:
        plan.attempt("search.storage", partial(_look_at_storage, study.search.storage))
    return plan


def _look_for_devices(plan: Plan) -> None:
    workers = plan.study.workers
    if workers.device == "mps" and workers.ray_address is None:
        from optimizer.checkpoints.devices import require_mps

        plan.attempt("workers.device", require_mps)
    if workers.gpus != "auto":
        from optimizer.workers.gpus import require_gpus

        plan.attempt("workers.gpus", partial(require_gpus, workers.gpus, workers.count, workers.ray_address))
        if workers.gpus > 1 and plan.base is not None:
            from optimizer.checkpoints.devices import Spread

            plan.attempt("workers.gpus", partial(Spread.of, plan.base, int(workers.gpus)))


def _require_general(floors: Mapping[str, float], harness: Harness) -> None:
    names = [info.name for info in harness.infos if info.role == "general"]
    for name in floors:
        if name not in names:
            raise StudyFileError(f"a floor is for a general task; given {name!r}, they are {', '.join(names)}")


def _look_at_storage(url: str) -> None:
    from optimizer.database.study_home import require_usable  # brings Optuna

    require_usable(url)


def count_tokens(plan: Plan) -> None:
    """Build and tokenise all requests, for the estimate, and since some tasks fail only here."""
    if plan.base is None or plan.harness is None:
        return
    from optimizer.checkpoints.configs import load_tokenizer

    tokenizer = plan.attempt("models.base", partial(load_tokenizer, plan.base.folder))
    if tokenizer is not None:
        for suite in SUITES:
            plan.attempt("evals", partial(plan.harness.prepare, tokenizer, suite))


def read_in_full(plan: Plan) -> dict[Path, str]:
    """Read every byte of the models: all values must be finite. Returns the sha256 of each of their files."""
    from optimizer.checkpoints.checkpoint import require_finite

    digests: dict[Path, str] = {}
    for key, model in plan.models.items():
        plan.attempt(key, partial(require_finite, model))
        digests |= plan.attempt(key, model.full_digests) or {}
    return digests


def require_sound(plan: Plan) -> Ready:
    """Return what a plan has opened where everything fits; raise StudyFileError with all its problems else."""
    if plan.problems or plan.base is None or plan.space is None or plan.harness is None:  # each None has a problem
        raise StudyFileError("the study cannot run:\n" + "\n".join(f"- {problem}" for problem in plan.problems))
    return Ready(plan.study, plan.base, dict(plan.experts), plan.space, plan.harness)


def _open_models(plan: Plan) -> None:
    from optimizer.checkpoints.compare import compare
    from optimizer.checkpoints.opening import open_checkpoint
    from optimizer.checkpoints.resident import require_loadable

    models = plan.study.models
    base = plan.base = plan.attempt("models.base", partial(open_checkpoint, models.base))
    if base is not None:
        plan.attempt("models.base", partial(require_loadable, base))
    is_sound = not plan.problems
    for name, source in models.experts.items():
        key = f"models.experts.{name}"
        if base is None and (Path(source) / ADAPTER).is_file():
            continue  # an adapter can only be read on its base
        expert = plan.attempt(key, partial(open_checkpoint, source, base=base))
        if expert is not None:
            plan.experts[name] = expert
        if expert is not None and base is not None and is_sound:
            mismatches = plan.attempt(key, partial(compare, base, expert))
            plan.problems += [f"{key}: {mismatch}" for mismatch in mismatches or ()]


def _open_tasks(plan: Plan) -> None:
    specs = task_specs(plan.study)
    try:
        plan.harness = _load(plan.study, specs)
    except TaskError as error:
        before = len(plan.problems)
        for spec in specs:  # one by one, since the first error hides the others
            plan.attempt("evals", partial(_load, plan.study, (spec,)))
        if len(plan.problems) == before:  # only together do they not fit
            plan.problems.append(f"evals: {error}")


def _load(study: Study, specs: tuple[TaskSpec, ...]) -> Harness:
    from evals.lm_tasks import load_tasks

    evals = study.evals
    return load_tasks(specs, seed=evals.seed, chat=evals.chat, allow_task_code=evals.allow_task_code)
