"""Workers and pools made from one function: a score for each recipe, without a model. Importable in a Ray worker."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from optuna.trial import FrozenTrial

from evals.outcomes import Outcome, TaskInfo
from optimizer.errors import CheckpointError, MergeError
from optimizer.runs.run_folder import RunFolder
from optimizer.runs.sensitivities import Sensitivities
from optimizer.search.driver import run_search
from optimizer.search.events import Event
from optimizer.search.prepared import Preparation, derivations
from optimizer.study.schema import EvalsSection, Models, SearchSection, Study, WorkersSection
from optimizer.study.task_entry import TaskEntry
from optimizer.workers.orders import Derivation, Form, Learned, Lesson
from optimizer.workers.pool import Only, SerialPool
from optimizer.workers.worker import Evaluation
from search_spaces.choice import Choice
from search_spaces.parameters import METHODS
from search_spaces.recipe import Recipe, Setting
from search_spaces.shape import Shape
from search_spaces.space import Space

ITEMS = 20
AGENTS = ("runtime_env/agent", "runtime_env_agent", "dashboard/agent", "RuntimeEnvAgent", "DashboardAgent")
TENSORS = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight")
GROUPS = ("embed", *(f"layer.{i:02d}.{kind}" for i in range(8) for kind in ("attn", "mlp")), "head")


def task(name: str, role: str, expert: str = "", drawn: int = 0) -> TaskInfo:
    return TaskInfo(name, role, expert, "multiple_choice", "acc", True, 0.25, ITEMS, ITEMS, drawn)


def tasks_of(experts: Sequence[str], drawn: int = 0) -> list[TaskInfo]:
    skills = (task(f"skill_{name}", "domain", name, drawn) for name in experts)
    return [*skills, task("general", "general", drawn=drawn)]


def space_of(experts: Sequence[str], shape: Shape, method: str = "task_arithmetic") -> Space:
    sources = tuple((name, f"/models/{name}") for name in experts)
    ranges = {"weight": (0.0, 1.0)} | ({"density": (0.2, 1.0)} if METHODS[method].parameter("density") else {})
    return Space(method, "/models/base", sources, GROUPS, shape, ("attn", "mlp"), ranges)


def study_of(name: str, experts: Sequence[str], **search: object) -> Study:
    return Study(
        name=name,
        models=Models(base="/models/base", experts={expert: f"/models/{expert}" for expert in experts}),
        evals=EvalsSection(
            domain=tuple(TaskEntry(task=f"skill_{expert}", expert=expert) for expert in experts),
            general=(TaskEntry(task="general"),),
        ),
        search=SearchSection(**{"sampler": "random", **search}),
        workers=WorkersSection(count=0),
    )


@dataclass
class FakeWorker:
    """Skill grows with the mean weight, general ability falls with the weight of the first layers.

    Args:
        before: called with each recipe before it is scored; may raise, sleep or kill.
    """

    before: Callable[[Recipe], None] | None = None

    def evaluate(self, recipe: str, suite: str, only: Only | None = None) -> Evaluation:
        known = Recipe.from_json(recipe)
        if self.before is not None:
            self.before(known)
        weights = {
            name.split("_")[0]: [share_of(name) * known.value("weight", expert=name, group=group) for group in GROUPS]
            for name, _ in known.experts
        }
        scores = {f"skill_{name}": 0.3 + 0.5 * fmean(weights[name]) for name in weights}
        scores["general"] = 0.9 - 0.3 * fmean(w * w for values in weights.values() for w in values[:6])
        outcomes = tuple(
            Outcome(name, suite, f"{item:016x}", score + 0.01 * (item % 3), 1.0, (), False)
            for name, score in scores.items()
            for item in range(ITEMS)
            if only is None or f"{item:016x}" in only.get(name, ())
        )
        return Evaluation(outcomes, 0.0, 0.0)

    def learn(self, lesson: Lesson) -> Learned:
        """Take the preference for the weight of every group."""
        if self.before is not None:
            self.before(Recipe.from_json(lesson.start))
        start = Recipe.from_json(lesson.start)
        shares = dict(lesson.preference)
        settings = [
            Setting("weight", name, group, shares[name.split("_")[0]] + 0.001 * i)
            for name, _ in start.experts
            for i, group in enumerate(GROUPS)
        ]
        recipe = dataclasses.replace(start, settings=tuple(settings))
        return Learned(recipe.to_json(), lesson.steps, 0.0, 0.5, 0.6, 0.7, 0.8, 18.0, 1.0)

    def derive(self, path: Derivation) -> list[Path]:
        folders = [path.folder / f"{path.expert}-{path.form}-{share:g}" for share in path.shares]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        return folders

    def sensitivities(self, expert: str, *, items: int) -> Sensitivities:
        row = ((1.0,) * len(TENSORS),)
        total = float(len(TENSORS))
        return Sensitivities(expert, TENSORS, (0.5,), (1.0,), row, row, total, total, items, 1.0, 1.0)


def share_of(expert: str) -> float:
    """How far a derived expert goes to its source, by its name; 1 for any other."""
    return float(expert.split("_")[2]) / 100 if "_" in expert else 1.0


def mean_weight(recipe: Recipe) -> float:
    return fmean(recipe.value("weight", expert=name, group=group) for name, _ in recipe.experts for group in GROUPS)


def is_anchor(recipe: Recipe) -> bool:
    """Anchors of these tests have straight profiles; a searched recipe has none to the last bit."""
    (name, _), *_ = recipe.experts
    values = [recipe.value("weight", expert=name, group=group) for group in GROUPS]
    return values[1:] == values[:-1]


@dataclass(frozen=True)
class Obey:
    """Orders for workers of another process, given as files in a folder: `kill`, `hang`, `fail` and `change` hold the
    digest of a recipe, or "once" (the first searched recipe, in one worker only)."""

    folder: Path

    def order(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def __call__(self, recipe: Recipe) -> None:
        if self._is_meant("hang", recipe):
            time.sleep(600)
        if self._is_meant("kill", recipe):
            print("about to die")
            print("of an order", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if self._is_meant("fail", recipe):
            raise MergeError("nonfinite: tensor model.norm.weight")
        if self._is_meant("change", recipe):
            raise CheckpointError("model.safetensors changed")

    def _is_meant(self, name: str, recipe: Recipe) -> bool:
        path = self.folder / name
        if not path.exists():
            return False
        text = path.read_text()
        if text == "once" and not is_anchor(recipe):
            with contextlib.suppress(FileNotFoundError):  # another worker was first
                path.rename(self.folder / f"{name}-done")
                return True
        return text == recipe.digest


@dataclass
class ObedientWorker(FakeWorker):
    """A worker that obeys, refuses to start when so ordered, and leaves word of where it runs."""

    folder: Path = Path()

    def __post_init__(self) -> None:
        self.before = Obey(self.folder)
        if (self.folder / "refuse").exists():
            raise CheckpointError("no such model")
        about = {"path": sys.path, "folder": os.getcwd(), "environment": dict(os.environ)}
        (self.folder / f"about-{os.getpid()}.json").write_text(json.dumps(about))


@dataclass(frozen=True)
class Refuse:
    """Fail searched recipes, or a certain mean weight only."""

    weight: float | None = None

    def __call__(self, recipe: Recipe) -> None:
        if (mean_weight(recipe) == self.weight) if self.weight is not None else not is_anchor(recipe):
            raise MergeError("nonfinite: tensor model.norm.weight")


@dataclass
class Bench:
    """A study in a folder that can be searched again and again."""

    folder: Path
    experts: Sequence[str] = ("clinical",)
    shape: Shape = field(default_factory=lambda: Shape("curve", 4))
    events: list[Event] = field(default_factory=list)
    methods: Sequence[str] = ("task_arithmetic",)
    storage: str | None = None
    require_unchanged: Callable[[], None] = lambda: None
    forms: tuple[Form, ...] = ()  # of derived experts
    learned: int = 0
    drawn: int = 0  # items of each task's bank that a searched trial is scored on; 0: no bank

    @property
    def space(self) -> Space | Choice:
        spaces = [space_of(self.experts, self.shape, method) for method in self.methods]
        return Choice(tuple(spaces)) if len(spaces) > 1 else spaces[0]

    @property
    def run(self) -> RunFolder:
        return RunFolder.create_or_resume(
            self.folder,
            f"name: {self.folder.name}\n",
            {"shape": self.shape.kind},
            tasks=tasks_of(self.experts, self.drawn),
            storage=self.storage,
        )

    def has_own(self, trial: FrozenTrial, suite: str = "search") -> bool:
        """Whether a trial's outcomes are stored, whole and of its own recipe."""
        digest = Recipe.from_json(trial.user_attrs["recipe"]).digest
        return not self.run.outcomes_fault(trial.number, suite, digest=digest, tasks=tasks_of(self.experts, self.drawn))

    def search(self, *, pool: object = None, before: Callable[[Recipe], None] | None = None, **search: object) -> None:
        run = self.run
        with run.lock():
            run_search(
                study_of(self.folder.name, self.experts, storage=self.storage, **search).search,
                run,
                space=self.space,
                pool=pool or SerialPool(lambda: FakeWorker(before)),  # type: ignore[arg-type]
                tasks=tasks_of(self.experts, self.drawn),
                require_unchanged=self.require_unchanged,
                events=self.events.append,
                preparation=Preparation(
                    "/models/base",
                    self.space.experts,
                    self.folder / "derived",
                    derived=derivations(self.forms),
                    learned=self.learned,
                ),
            )


def processes_of(folder: Path) -> list[str]:
    """Command lines that name a pool's folder, but for Ray's agents, which may live on for two minutes."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if str(folder) in words and not any(agent in words for agent in AGENTS):
                found.append(words)
    return found
