"""What a search costs beside its candidates: trials a second of the driver, with a scorer that takes no time.

    python benchmarks/driver.py [--trials 5000] [--resume] [--sampler random] [--bank] [--racing] [--dimensions 60]

The study is real: Optuna's SQLite storage, outcome files of two tasks with 100 questions each, synced to the disk, the
front judged in the end. Printed are trials a second by tenths of the budget. `--resume` takes the finished study up
again with the same budget, until the driver has accounted for every trial; `--read` opens it as a reader and finds its
knee. With `--bank` anchors are scored on all 100 questions and others on 30 of them.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from evals.outcomes import Outcome, TaskInfo
from optimizer.run import open_run
from optimizer.runs.run_folder import RunFolder
from optimizer.search.driver import run_search
from optimizer.search.events import Event
from optimizer.search.prepared import Preparation
from optimizer.study.schema import SearchSection
from optimizer.workers.pool import Job, Result, ScoreJob
from optimizer.workers.worker import Evaluation
from search_spaces.recipe import Recipe
from search_spaces.shape import Shape
from search_spaces.space import Space

ITEMS, DRAWN, CHOICES = 100, 30, 4
TENTHS = 10
EXPERT = "expert"


class InstantPool:
    """Scores a recipe by a formula: skill rises with its weights, general ability falls with their squares."""

    size = 2

    def __init__(self, groups: Sequence[str]) -> None:
        rng = np.random.default_rng(0)
        self._groups = groups
        self._pull = rng.uniform(0.5, 1.5, len(groups))
        self._items = {task: [f"{i:016x}" for i in range(ITEMS)] for task in ("skill", "general")}
        self._hardness = {task: rng.normal(0.0, 2.0, (ITEMS, CHOICES - 1)) for task in self._items}
        self._jobs: deque[Job] = deque()

    def submit(self, job: Job) -> None:
        self._jobs.append(job)

    def wait(self, timeout: float) -> list[Result]:
        job = self._jobs.popleft()
        assert isinstance(job, ScoreJob)
        return [Result(job, self._evaluate(job))]

    def close(self, *, kill: bool = False) -> None:
        self._jobs.clear()

    def _evaluate(self, job: ScoreJob) -> Evaluation:
        recipe = Recipe.from_json(job.recipe)
        weights = np.array([recipe.value("weight", expert=EXPERT, group=group) for group in self._groups])
        levels = {"skill": 2.0 * (self._pull * weights).mean(), "general": 2.0 - 2.0 * (weights**2).mean()}
        outcomes = []
        for task, names in self._items.items():
            wanted = set(names if job.only is None else job.only[task])
            scores = np.hstack([np.full((ITEMS, 1), levels[task]), self._hardness[task]])
            rows = zip(names, scores.tolist(), strict=True)
            outcomes += [_outcome(task, job.suite, item, row) for item, row in rows if item in wanted]
        return Evaluation(tuple(outcomes), 0.0, 0.0)


def _outcome(task: str, suite: str, item: str, scores: list[float]) -> Outcome:
    is_right = float(scores[0] > max(scores[1:]))
    return Outcome(task, suite, item, is_right, 1.0, tuple(scores), False, (1,) * CHOICES, right=(0,))


def tasks_of(drawn: int) -> list[TaskInfo]:
    """The two tasks."""
    return [
        TaskInfo("skill", "domain", EXPERT, "multiple_choice", "acc", True, 0.25, ITEMS, ITEMS, drawn),
        TaskInfo("general", "general", "", "multiple_choice", "acc", True, 0.25, ITEMS, ITEMS, drawn),
    ]


def space_of(dimensions: int) -> Space:
    """A weight for each half of so many layers."""
    groups = ("embed", *(f"layer.{i:02d}.{kind}" for i in range(dimensions // 2) for kind in ("attn", "mlp")), "head")
    experts = ((EXPERT, "/models/expert"),)
    return Space("task_arithmetic", "/models/base", experts, groups, Shape("layers"), ("attn", "mlp"),
                 {"weight": (0.0, 1.0)})  # fmt: skip


def search(folder: Path, arguments: argparse.Namespace, trials: int) -> list[tuple[str, float]]:
    """Run a search, and give the kinds and times of its events."""
    heard: list[tuple[str, float]] = []
    drawn = DRAWN if arguments.bank else 0
    space, tasks = space_of(arguments.dimensions), tasks_of(drawn)

    def hear(event: Event) -> None:
        heard.append((event.kind, time.perf_counter()))

    run = RunFolder.create_or_resume(folder, "name: driver\n", {}, tasks=tasks)
    with run.lock():
        run_search(
            SearchSection(trials=trials, sampler=arguments.sampler, racing=arguments.racing),
            run,
            space=space,
            pool=InstantPool(space.groups),
            tasks=tasks,
            require_unchanged=lambda: None,
            events=hear,
            preparation=Preparation("/models/base", space.experts, folder / "derived", learned=0),
        )
    return heard


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=5000)
    parser.add_argument("--dimensions", type=int, default=60)
    parser.add_argument("--sampler", default="random")
    parser.add_argument("--bank", action="store_true")
    parser.add_argument("--racing", action="store_true")
    parser.add_argument("--resume", action="store_true", help="also take the finished study up again")
    parser.add_argument("--read", action="store_true", help="also open the finished run and find its knee")
    parser.add_argument("--profile", type=int, default=0, help="print so many lines of a profile")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "driver"
        profile = cProfile.Profile()
        if arguments.profile:
            profile.enable()
        began, busy = time.perf_counter(), time.process_time()
        heard = search(folder, arguments, arguments.trials)
        ended, busy = time.perf_counter(), time.process_time() - busy
        profile.disable()
        told = [at for kind, at in heard if kind == "trial"]
        edges = np.linspace(0, len(told) - 1, min(TENTHS, len(told) - 1) + 1).round().astype(int)
        speeds = [(b - a) / (told[b] - told[a]) for a, b in pairwise(edges)]
        print(
            f"{len(told)} trials, {arguments.dimensions} dimensions, {arguments.sampler}: {ended - began:.1f} s in all"
        )
        print(f"{busy:.1f} s of them on a core: {len(told) / busy:.1f} trials a second, had it the core for itself")
        print(f"opened and first told after {told[0] - began:.2f} s, judged in {ended - told[-1]:.1f} s")
        print("trials a second, by tenths: " + " ".join(f"{speed:.1f}" for speed in speeds))
        if arguments.profile:
            pstats.Stats(profile).sort_stats("cumtime").print_stats(arguments.profile)
        if arguments.resume:
            if arguments.profile:
                profile = cProfile.Profile()
                profile.enable()
            began, busy = time.perf_counter(), time.process_time()
            heard = search(folder, arguments, arguments.trials)
            busy = time.process_time() - busy
            profile.disable()
            print(f"taken up again in {heard[0][1] - began:.2f} s; with the judging {busy:.2f} s on a core")
            if arguments.profile:
                pstats.Stats(profile).sort_stats("cumtime").print_stats(arguments.profile)
        if arguments.read:
            began = time.perf_counter()
            open_run(folder).knee()
            print(f"read, knee found in {time.perf_counter() - began:.2f} s")


if __name__ == "__main__":
    main()
