"""Whole candidates an hour: ours, beside what a user can put together from mergekit and lm-eval.

    python benchmarks/candidate.py [STUDY] [--candidates 3] [--batch-size 8] [--drawn 30]

STUDY is a study file; the default is the one that `make demo` leaves in runs/demo-inputs. Ours: the study's number of
workers, each with a resident model, that merge in place and score the search items; the first candidate of each worker,
which pays for its start, is not counted. Theirs: one after another `mergekit-yaml`, loading the model, and
`lm_eval.simple_evaluate` with HFLM on the same items, with all threads: in the dtype of the merge's files, which HFLM
takes by itself, and in float32. The recipes are uniform weights. With `--drawn` the same workers also score candidates
that answer so many items of each task only, as those of a study with `evals.bank` do.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml
from agreement import suite_alone

from evals.lm_harness import Harness
from evals.lm_tasks import load_tasks
from evals.outcomes import SEARCH
from optimizer.checkpoints.opening import open_checkpoint
from optimizer.run_study import worker_spec
from optimizer.study.schema import Study
from optimizer.study.study_file import read_study
from optimizer.study.tasks import task_specs
from optimizer.workers.worker import Worker, WorkerSpec
from search_spaces import Recipe, Setting
from search_spaces.mergekit.writer import to_mergekit

DEFAULT_STUDY = Path(__file__).parent.parent / "runs" / "demo-inputs" / "study.yaml"
DTYPES = ("bfloat16", "float32")
_worker: list[Worker] = []


def recipe(study: Study, weight: float) -> Recipe:
    """A uniform weight on every expert."""
    experts = tuple(study.models.experts.items())
    return Recipe("task_arithmetic", study.models.base, experts, (Setting("weight", "", "", weight),))


def start(spec: WorkerSpec) -> None:
    _worker.append(Worker(spec))


def evaluate(drawn: int, recipe_json: str) -> float:
    """Score a recipe on so many items of each task, 0: all; return when it was done, on the machine's own clock."""
    _worker[0].evaluate(recipe_json, SEARCH, _items(drawn) if drawn else None)
    return time.monotonic()


@cache
def _items(drawn: int) -> dict[str, list[str]]:
    """Choose the first items of each task."""
    items: dict[str, list[str]] = {}
    for example in _worker[0].examples():
        items.setdefault(example.task, []).append(example.item)
    return {task: found[:drawn] for task, found in items.items()}


def our_seconds(study: Study, candidates: int, draws: Sequence[int]) -> list[float]:
    """Seconds a candidate, with all workers at work, for each count of drawn items (0: all)."""
    workers = max(1, study.workers.count)
    recipes = [recipe(study, 0.2 + 0.6 * i / (candidates * workers)).to_json() for i in range(candidates * workers)]
    pool = ProcessPoolExecutor(workers, get_context("spawn"), start, (worker_spec(study),))
    seconds = []
    with pool:
        for drawn in draws:
            score = partial(evaluate, drawn)
            begun = max(pool.map(score, recipes[:workers]))  # the start of each worker, and its plans
            seconds.append((max(pool.map(score, recipes)) - begun) / len(recipes))
    return seconds


def their_seconds(study: Study, batch_size: int, dtypes: Sequence[str]) -> Iterator[tuple[float, float, float]]:
    """Seconds for the merge, the model's loading, and the evaluation, of a candidate for each dtype."""
    specs = task_specs(study)
    harness = load_tasks(
        specs,
        seed=study.evals.seed,
        chat=study.evals.chat,
        allow_task_code=study.evals.allow_task_code,
    )
    with tempfile.TemporaryDirectory() as scratch:
        for dtype in dtypes:
            yield _peer(study, harness, specs, Path(scratch) / dtype, batch_size, dtype)


def _peer(
    study: Study, harness: Harness, specs: Sequence[Any], folder: Path, batch_size: int, dtype: str
) -> tuple[float, float, float]:
    import lm_eval
    import torch
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    base = open_checkpoint(study.models.base)
    document = to_mergekit(recipe(study, 0.5), base.names, out_dtype="bfloat16")
    written = folder.with_suffix(".yaml")
    written.write_text(yaml.safe_dump(document, sort_keys=False))
    tasks = [
        suite_alone(harness, task.info.name, SEARCH, Path(spec.name), folder.parent)
        for spec, task in zip(specs, harness.tasks, strict=True)
        if task.info.search_items  # a sentinel has none
    ]
    times = [time.perf_counter()]
    command = Path(sys.executable).with_name("mergekit-yaml")
    subprocess.run([str(command), str(written), str(folder), "--quiet"], check=True, stderr=subprocess.DEVNULL)
    times.append(time.perf_counter())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with redirect_stderr(io.StringIO()):  # bars
        lm = HFLM(pretrained=str(folder), tokenizer=str(base.folder), batch_size=batch_size, device=device, dtype=dtype)
        times.append(time.perf_counter())
        manager = TaskManager(include_defaults=False)
        lm_eval.simple_evaluate(lm, tasks=tasks, task_manager=manager, bootstrap_iters=0)
    times.append(time.perf_counter())
    return times[1] - times[0], times[2] - times[1], times[3] - times[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, nargs="?", default=DEFAULT_STUDY)
    parser.add_argument("--candidates", type=int, default=3, help="of ours, for each worker")
    parser.add_argument("--drawn", type=int, default=0, help="items of each task that a candidate answers with a bank")
    parser.add_argument("--batch-size", type=int, default=8, help="of HFLM")
    parser.add_argument("--set", action="append", default=[], help="change the study, as in mergefront search")
    arguments = parser.parse_args()
    if not arguments.study.exists():
        parser.error(f"no study {arguments.study}: give one, or let `make demo` build its own")
    study = read_study(arguments.study, arguments.set)
    ours, *fewer = our_seconds(study, arguments.candidates, [0, arguments.drawn] if arguments.drawn else [0])
    print(f"ours:   {ours:7.1f} s a candidate, {3600 / ours:6.0f} an hour, {study.workers.count} workers", flush=True)
    for few in fewer:
        times = f"{ours / few:.1f} times as many ({arguments.drawn} items of each task)"
        print(f"drawn:  {few:7.1f} s a candidate, {3600 / few:6.0f} an hour, {times}", flush=True)
    for dtype, spent in zip(DTYPES, their_seconds(study, arguments.batch_size, DTYPES), strict=True):
        theirs, (merge, load, score) = sum(spent), spent
        rate = f"{theirs:7.1f} s a candidate, {3600 / theirs:6.0f} an hour"
        steps = f"mergekit-yaml {merge:.1f}, load {load:.1f}, lm-eval {score:.1f} at batch {arguments.batch_size}"
        print(f"theirs: {rate}, {theirs / ours:.1f} times ours ({dtype}: {steps})", flush=True)


if __name__ == "__main__":
    main()
