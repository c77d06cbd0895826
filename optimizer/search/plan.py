"""Before a search: open the checkpoints' headers and the tasks, find everything that does not fit, say what will run.

`search` goes on from the same plan that `check` prints.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from evals.errors import TaskError
from evals.outcomes import HOLDOUT, SEARCH, SUITES, TaskSpec
from optimizer.errors import MergefrontError, RunError, StudyFileError
from optimizer.search.samplers import require_learns
from optimizer.study.study_file import Study, task_specs
from optimizer.study.study_space import space_of
from optimizer.words import count, printable
from search_spaces.errors import SpaceError

if TYPE_CHECKING:
    from rich.console import Console

    from evals.lm_tasks import Harness
    from optimizer.checkpoints.checkpoint import Checkpoint
    from search_spaces.choice import Choice
    from search_spaces.space import Space

T = TypeVar("T")

DISTRIBUTION = "mergefront"
OWN_NAMES = ("optimizer", "search_spaces", "evals")

CORE_FLOPS = 150e9  # per second; measured with a 135 M model in bf16 on two cores: 1,200 tokens/s, 2 FLOP a weight
GPU_FLOPS = 100e12  # a third of what a data-centre GPU promises
JUDGED = 15  # trials scored on the holdout suite: a guess at the front, and the anchors
ADAPTER = "adapter_config.json"


@dataclass(slots=True)
class Plan:
    """What a study needs to run. Where something does not fit, `problems` says what, and its field is None."""

    study: Study
    base: Checkpoint | None = None
    experts: dict[str, Checkpoint] = field(default_factory=dict)
    space: Space | Choice | None = None
    harness: Harness | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def models(self) -> dict[str, Checkpoint]:
        """The models that could be opened, by their key in the study file."""
        base = {} if self.base is None else {"models.base": self.base}
        return base | {f"models.experts.{name}": expert for name, expert in self.experts.items()}

    def attempt(self, key: str, action: Callable[[], T]) -> T | None:
        """The action's result, or None and one more problem."""
        try:
            return action()
        except (MergefrontError, SpaceError, TaskError) as error:
            problem = f"{key}: {error}"
            if problem not in self.problems:  # the tokenizer asks for the config again
                self.problems.append(problem)
            return None


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
    """Open everything a study names, and gather all that is wrong."""
    plan = Plan(study)
    _open_models(plan)
    if plan.base is not None:
        plan.space = plan.attempt("space", partial(space_of, study, plan.base.names))
    if plan.space is not None:
        conditional = plan.space.is_conditional
        plan.attempt("search.sampler", partial(require_learns, study.search.sampler, conditional=conditional))
    _open_tasks(plan)
    if study.search.storage is not None:
        plan.attempt("search.storage", partial(_look_at_storage, study.search.storage))
    return plan


def _look_at_storage(url: str) -> None:
    from optimizer.runs.study_home import require_usable  # brings Optuna

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


def require_sound(plan: Plan) -> None:
    """Raise StudyFileError with all problems of a plan."""
    if plan.problems:
        raise StudyFileError("the study cannot run:\n" + "\n".join(f"- {problem}" for problem in plan.problems))


def _open_models(plan: Plan) -> None:
    from optimizer.checkpoints.checkpoint import Checkpoint, compare
    from optimizer.checkpoints.resident import require_loadable

    models = plan.study.models
    base = plan.base = plan.attempt("models.base", partial(Checkpoint.open, models.base))
    if base is not None:
        plan.attempt("models.base", partial(require_loadable, base))
    is_sound = not plan.problems
    for name, source in models.experts.items():
        key = f"models.experts.{name}"
        if base is None and (Path(source) / ADAPTER).is_file():
            continue  # an adapter can only be read on its base
        expert = plan.attempt(key, partial(Checkpoint.open, source, base=base))
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
    return load_tasks(specs, seed=evals.seed, chat_template=evals.chat_template, allow_task_code=evals.allow_task_code)


# --- what will run, in words and figures -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cost:
    """What a study asks of the machine, roughly."""

    resident_bytes: int  # a worker's own copy of the model
    mapped_bytes: int  # the sources, mapped once for all workers of a machine
    tokens: Mapping[str, int]  # of one trial, by suite
    hours: float


def print_plan(plan: Plan, console: Console) -> None:
    """Print models, space, tasks, cost and problems; a part that could not be read is left out."""
    from rich.text import Text

    from optimizer.views.tables import table

    if plan.base is not None:
        console.print(
            table("Models", ["", "source", "numbers", "size", "dtype"], _model_rows(plan), right=["numbers", "size"])
        )
    if plan.space is not None:
        console.print(table("Search space", ["", ""], _space_rows(plan.space)))
    if plan.harness is not None:
        numbers = ["chance", "shots", "search items", "holdout items"]
        columns = ["task", "role", "metric", *numbers]
        console.print(table("Tasks", columns, _task_rows(plan.harness), right=numbers))
        for note in plan.harness.notes:
            console.print(Text(f"note: {note}"), soft_wrap=True)
    cost = _cost(plan)
    if cost is not None:
        console.print(table("Cost", ["", ""], _cost_rows(plan, cost)))
    if not plan.problems:
        console.print("nothing stands against this study", highlight=False)
        return
    console.print(Text(f"{count(len(plan.problems), 'problem')}:", style="bold"))
    for problem in plan.problems:
        console.print(Text(printable(f"- {problem}")), soft_wrap=True)


def _model_rows(plan: Plan) -> Iterator[tuple[str, ...]]:
    assert plan.base is not None
    for name, model in {"base": plan.base, **plan.experts}.items():
        dtypes = sorted({str(model.dtype(tensor)).removeprefix("torch.") for tensor in model.names})
        kind = " (adapter)" if model.is_adapter else ""
        if model.is_matched:
            kind = f" (matched to the base's tokens; {count(model.left_out, 'row')} of its own left out)"
        yield name, model.source + kind, _millions(_numbers(model)), _size(model.bytes), ", ".join(dtypes)


def _space_rows(space: Space | Choice) -> Iterator[tuple[str, str]]:
    dimensions = space.distributions()
    anchors = [anchor.name for anchor in space.anchors()]
    shape, modules = space.shape, ", ".join(space.modules)
    yield "method", ", ".join(space.methods)
    yield "shape", f"{shape.kind} {shape.n or ''}".strip() + (f", of its own for {modules}" if modules else "")
    yield "groups", f"{len(space.groups)}: {_shortened(space.groups)}"
    yield "dimensions", f"{len(dimensions)}: {_shortened(list(dimensions))}"
    yield "anchors", f"{len(anchors)}: {', '.join(anchors)}"


def _task_rows(harness: Harness) -> Iterator[tuple[object, ...]]:
    for row in harness.describe():
        role = f"{row['role']} ({row['expert']})" if row["expert"] else row["role"]
        shots = f"{row['shots']} ({row['shots_from']})" if row["shots_from"] else row["shots"]
        numbers = f"{row['chance']:.2f}", shots, *(row[f"{suite}_items"] for suite in SUITES)
        yield row["task"], role, row["metric"], *numbers


def _cost_rows(plan: Plan, cost: Cost) -> Iterator[tuple[str, str]]:
    workers = max(1, plan.study.workers.count)
    own, mapped = _size(cost.resident_bytes), _size(cost.mapped_bytes)
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    need = workers * cost.resident_bytes + cost.mapped_bytes
    verdict = ", TOO LITTLE" if need > have else ""
    yield (
        "memory",
        f"{workers} x {own} of models, {mapped} of files, shared; this machine has {_size(have)}{verdict}",
    )
    for suite, tokens in cost.tokens.items():
        yield f"{suite} suite", f"about {tokens:,} tokens a trial"
    yield "time", f"very roughly {_hours(cost.hours)} for {plan.study.search.trials} trials and the holdout"


def _cost(plan: Plan) -> Cost | None:
    """Memory, tokens and time; None where a part of the plan is missing."""
    if plan.base is None or plan.harness is None or len(plan.experts) < len(plan.study.models.experts):
        return None
    numbers = _numbers(plan.base)
    width = {"float32": 4.0, "bf16": 2.0, "auto": plan.base.bytes / numbers}[plan.study.evals.dtype]
    rows = plan.harness.describe()
    tokens = {suite: sum(row[f"{suite}_tokens"] or 0 for row in rows) for suite in SUITES}
    trials = {SEARCH: plan.study.search.trials, HOLDOUT: JUDGED}
    work = sum(2 * numbers * tokens[suite] * trials[suite] for suite in SUITES)
    return Cost(
        resident_bytes=round(width * numbers),
        mapped_bytes=plan.base.bytes + sum(expert.own_bytes for expert in plan.experts.values()),
        tokens=tokens,
        hours=work / _speed(plan.study) / 3600,
    )


def _speed(study: Study) -> float:
    """FLOP per second of all workers together."""
    workers, cores = study.workers, os.cpu_count() or 1
    if workers.device == "cuda" or (workers.device == "auto" and Path("/dev/nvidia0").exists()):
        return GPU_FLOPS
    threads = cores if workers.threads == "auto" else workers.threads * max(1, workers.count)
    return CORE_FLOPS * min(threads, cores)


def _numbers(model: Checkpoint) -> int:
    return sum(math.prod(model.shape(name)) for name in model.names)


def _shortened(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(names if len(names) <= 6 else [*names[:3], "...", *names[-2:]])


def _size(count: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count / 1e3:,.0f} kB"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M" if count >= 1e5 else f"{count:,}"


def _hours(hours: float) -> str:
    minutes = 60 * hours
    if minutes < 1:
        return "less than a minute"
    return f"{minutes:.0f} min" if minutes < 90 else f"{hours:.1f} h"
