"""One worker: a resident model, the tasks, and the way from a recipe to per-item outcomes.

Built once per process (by a pool); everything heavy is imported here, inside functions, so that a driver
stays light. Paths in the spec are absolute: a worker has a working directory of its own.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evals.outcomes import SEARCH, Chat, Outcome, TaskInfo, TaskSpec
from optimizer.workers.memory import lack_of_memory_in_words
from search_spaces.groups import PASSED, group_of
from search_spaces.recipe import Recipe, Setting

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

    from evals.engine import Engine
    from evals.losses import Example
    from optimizer.merging.gradients import Gradient
    from optimizer.runs.sensitivities import Sensitivities
    from optimizer.workers.learner import Learner
    from optimizer.workers.orders import Derivation, Learned, Lesson


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """All a worker needs, in plain types, so that it can cross to another process or machine.

    Args:
        base: folder or hub id of the base checkpoint.
        experts: (name, folder or hub id) of each expert.
        tasks: what to score, both roles.
        chat: how prompts are wrapped.
        allow_task_code: let task files run Python.
        token_budget: tokens per forward pass; 0: what the device has room for.
        dtype: of the resident model: "auto" (the base's own), "bf16" or "float32".
        device: "auto" (cuda where there is one), "cpu", "cuda" or "mps".
        threads: of torch, at least 1.
        seed: of the item split and of anything random in a task.
        gpus: over which the model is spread; 0: on one device.
    """

    base: str
    experts: tuple[tuple[str, str], ...]
    tasks: tuple[TaskSpec, ...]
    chat: Chat
    allow_task_code: bool
    token_budget: int
    dtype: str
    device: str
    threads: int
    seed: int
    gpus: int = 0


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What became of one recipe on one suite; times in seconds."""

    outcomes: tuple[Outcome, ...]
    merge_seconds: float
    score_seconds: float


class Worker:
    """Merges each recipe into one resident model, in place, and scores it.

    Every merge writes every floating tensor from the sources, so the model has no memory of earlier recipes.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        import torch
        from transformers import set_seed
        from transformers.utils import logging

        from evals.engine import Engine, budget_for
        from evals.lm_tasks import load_tasks
        from evals.memory import layers_by_device
        from evals.products import prefer_onednn
        from optimizer.checkpoints.configs import load_tokenizer
        from optimizer.checkpoints.resident import merge_target, resident_model, tensor_places
        from optimizer.merging.merge import DEVICE_ROOM, MergeCache, Sources, free_bytes

        torch.set_num_threads(max(1, spec.threads))
        prefer_onednn()
        set_seed(spec.seed)
        logging.disable_progress_bar()
        self._experts = dict(spec.experts)  # those of the study; a recipe may name derived ones beside them
        self._sources = Sources.open(spec.base, self._experts)
        self._cache = MergeCache()
        base = self._sources.base
        self._tokenizer = load_tokenizer(base.folder)
        with lack_of_memory_in_words(base.bytes):
            model = resident_model(base, dtype=spec.dtype, device=spec.device, gpus=spec.gpus)
        self._parameters = tensor_places(model, base)
        self._merged = merge_target(self._parameters, base)
        room = min(DEVICE_ROOM, *map(free_bytes, layers_by_device(model)))  # what merges leave to scoring
        self._engine = Engine(model, self._tokenizer, token_budget=spec.token_budget or budget_for(model, room))
        self._harness = load_tasks(spec.tasks, seed=spec.seed, chat=spec.chat, allow_task_code=spec.allow_task_code)
        self._prepared: set[str] = set()
        self._learner: Learner | None = None

    def evaluate(self, recipe: str, suite: str, only: Mapping[str, Sequence[str]] | None = None) -> Evaluation:
        """Score one recipe.

        Args:
            recipe: as `Recipe.to_json` writes it.
            suite: "search", "holdout" or "certify".
            only: of these tasks only these items, by hash; None: all.

        Raises:
            CheckpointError: a source's file is not the one that was opened.
            MergeError: a merged tensor is not finite.
            TaskError: the candidate gave no usable score.
            WorkerError: memory ran out.
        """
        with lack_of_memory_in_words(self._sources.base.bytes):
            self._prepare(suite)
            if self._harness.needs_base(self._engine, suite, only):
                self.merge(self._base_recipe())
                self._harness.read_base(self._engine, suite, only)
            start = time.perf_counter()
            self.merge(Recipe.from_json(recipe))
            merged = time.perf_counter()
            outcomes = tuple(self._harness.score(self._engine, suite, only))
            return Evaluation(outcomes, merged - start, time.perf_counter() - merged)

    def learn(self, lesson: Lesson) -> Learned:
        """Learn merge weights by gradients on the search items.

        Raises:
            CheckpointError: a source's file is not the one that was opened.
            MergeError: a merge or a gradient is not finite; the tensor is named.
            TaskError: an item has nothing to learn from, or a loss is not finite.
            WorkerError: memory ran out.
        """
        from optimizer.workers.learner import Learner

        with lack_of_memory_in_words(self._sources.base.bytes):
            if self._learner is None:
                base = str(self._sources.base.folder)
                tasks, experts = self._harness.infos, self._experts
                self._learner = Learner(self, self.examples(), tasks=tasks, base=base, experts=experts)
            return self._learner.learn(lesson)

    def sensitivities(self, expert: str, *, items: int = 0, points: int = 5, seed: int = 0) -> Sensitivities:
        """Measure which tensors an expert's gain and loss come from, on the search items.

        Args:
            expert: its name.
            items: of each task, drawn by the seed; 0: all.
            points: between base and expert.
            seed: of the draw.

        Raises:
            CheckpointError: a source's file is not the one that was opened.
            MergeError: a merge or a gradient is not finite, the tensor is named; or there is no such expert.
            TaskError: an item has nothing to learn from, or a loss is not finite.
            WorkerError: memory ran out.
        """
        from optimizer.workers.sensitivity import measure, some_of_each

        base = self._sources.base
        with lack_of_memory_in_words(base.bytes):
            examples = self.examples()
            chosen = some_of_each(examples, items, items, seed=seed) if items else examples
            models = Recipe("task_arithmetic", str(base.folder), tuple(self._experts.items()), ())
            return measure(self, chosen, models, tasks=self.tasks, expert=expert, points=points)

    def derive(self, path: Derivation) -> list[Path]:
        """Make the derived experts of a path from a few search items, or its texts, where they are not there yet.

        Raises:
            MergeError: a folder cannot be written, or a tensor is not finite.
            TaskError: an item has nothing to learn from, a text cannot be used, or a loss is not finite.
            WorkerError: memory ran out.
        """
        from evals.lm_examples import text_examples
        from optimizer.workers.deriver import Deriver
        from optimizer.workers.orders import CALIBRATION
        from optimizer.workers.sensitivity import some_of_each

        tasks = {task.name: task for task in self._harness.infos}
        with lack_of_memory_in_words(self._sources.base.bytes):
            if path.texts is not None:
                general, domain = (text_examples(text, self._engine) for text in path.texts)
                return Deriver(self.engine, self._parameters, self._sources, general, domain).derive(path)
            examples = some_of_each(self.examples(), *CALIBRATION, seed=0)
            general = [e for e in examples if tasks[e.task].role == "general"]
            domain = [
                e for e in examples if tasks[e.task].role == "domain" and tasks[e.task].expert in ("", path.expert)
            ]
            return Deriver(self.engine, self._parameters, self._sources, general, domain).derive(path)

    def examples(self) -> list[Example]:
        """Return the search items as losses, in the order they are scored.

        Raises:
            TaskError: an item has nothing to learn from.
        """
        from evals.lm_examples import examples

        self._prepare(SEARCH)
        return examples(self._harness, SEARCH, self._engine)

    @property
    def engine(self) -> Engine:
        """What reads the resident model."""
        return self._engine

    @property
    def tasks(self) -> tuple[TaskInfo, ...]:
        """What is known of each task."""
        return tuple(self._harness.infos)

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the base's floating tensors, without what is passed through."""
        base = self._sources.base
        return tuple(n for n in base.names if base.dtype(n).is_floating_point and group_of(n) != PASSED)

    def merge(self, recipe: Recipe) -> None:
        """Make the resident model the merge of a recipe."""
        from optimizer.merging.merge import merge_into

        derived = [(name, source) for name, source in recipe.experts if name not in self._experts]
        self._sources = self._sources.extended(derived)
        names = {*self._experts, *dict(recipe.experts)} & self._sources.experts.keys()
        for checkpoint in (self._sources.base, *(self._sources.experts[name] for name in sorted(names))):
            checkpoint.require_unchanged()
        merge_into(self._merged, self._sources, recipe, self._cache)
        if self._merged is not self._parameters:
            for name, tensor in self._merged.items():
                self._parameters[name].copy_(tensor)

    def gradients(self, recipe: Recipe) -> AbstractContextManager[Gradient]:
        """Return the gradient by the weights of the recipe that was merged last (`weight_gradients`)."""
        from optimizer.merging.gradients import weight_gradients

        return weight_gradients(self._engine.model, self._parameters, self._sources, recipe, self._cache)

    def _base_recipe(self) -> Recipe:
        """Give a recipe that is the base."""
        nothing = tuple(Setting("weight", name, "", 0.0) for name in self._experts)
        return Recipe("task_arithmetic", str(self._sources.base.folder), tuple(self._experts.items()), nothing)

    def _prepare(self, suite: str) -> None:
        if suite not in self._prepared:
            self._harness.prepare(self._tokenizer, suite)
            self._prepared.add(suite)
