"""How long a run's figures take; `python benchmarks/statistics.py` runs it, and says how."""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import optuna
import pandas as pd

from evals.objectives import Scale, draw_objectives, objective_names
from evals.outcomes import HOLDOUT, SEARCH, Outcome, TaskInfo
from optimizer.database.study_home import close
from optimizer.runs.front import losses, non_dominated
from optimizer.runs.run_folder import RunFolder
from search_spaces.shape import Shape
from search_spaces.space import Params, Space

SECONDS, GIGABYTES = 10.0, 1.0  # the aim
TASKS = (  # name, role, accuracy or bits, share of the items, what the base has, what the expert adds
    ("clinical_questions", "domain", True, 0.25, -0.3, 1.2),
    ("clinical_notes", "domain", False, 0.05, 1.3, -0.3),
    ("knowledge", "general", True, 0.35, 1.1, -1.0),
    ("grammar", "general", True, 0.30, 1.6, -1.2),
    ("plain_text", "general", False, 0.05, 0.95, 0.12),
)
CHOICES = 4
LAYERS = 12


def infos_of(items: int) -> list[TaskInfo]:
    """Return the made-up tasks, of so many items together."""
    return [
        TaskInfo(
            name,
            role,
            "",
            "multiple_choice" if is_accuracy else "loglikelihood_rolling",
            "acc" if is_accuracy else "bits_per_byte",
            is_accuracy,
            1 / CHOICES if is_accuracy else 0.0,
            round(share * items),
            round(share * items),
        )
        for name, role, is_accuracy, share, _, _ in TASKS
    ]


def outcomes_of(dose: float, harm: float, infos: list[TaskInfo], suite: str, seed: int) -> Iterator[Outcome]:
    """Yield what a merge with so much of the expert's skill and harm makes of every item of a suite."""
    for info, (_, role, is_accuracy, _, base, change) in zip(infos, TASKS, strict=True):
        n = info.search_items
        items = np.random.default_rng([len(info.name), len(suite)])  # the same for every trial
        own = np.random.default_rng(seed)
        hashes = [f"{number:016x}" for number in items.integers(2**63, size=n)]
        level = base + change * (dose if role == "domain" else harm)
        if not is_accuracy:
            sizes = items.integers(400, 1600, n).astype(float)
            values = sizes * (level + items.normal(0, 0.15, n) + own.normal(0, 0.02, n))
            for item, value, size in zip(hashes, values.tolist(), sizes.tolist(), strict=True):
                yield Outcome(info.name, suite, item, value, size, (-value,), False, (300,))
            continue
        scores = items.normal(0, 1.2, (n, CHOICES)) + own.normal(0, 0.3, (n, CHOICES))
        right = items.integers(CHOICES, size=n)
        scores[np.arange(n), right] += level
        is_right = scores.argmax(axis=1) == right
        for item, row, place, hit in zip(hashes, scores.tolist(), right.tolist(), is_right.tolist(), strict=True):
            yield Outcome(info.name, suite, item, float(hit), 1.0, tuple(row), False, (3,) * CHOICES,
                          right=(place,))  # fmt: skip


def write_run(folder: Path, trials: int, items: int) -> None:
    """Write a run folder whose search has ended: anchors, then random merges, the front on holdout items."""
    infos = infos_of(items)
    names = ["model.embed_tokens.weight", *(f"model.layers.{i}.self_attn.q_proj.weight" for i in range(LAYERS))]
    space = Space.build("linear", "models/base", experts={"clinical": "models/clinical"}, tensors=names,
                        shape=Shape("curve", 4), modules=("attn",), ranges={})  # fmt: skip
    anchors: list[tuple[str, Params]] = [(anchor.name, dict(anchor.params)) for anchor in space.anchors()]
    rng, places = np.random.default_rng(0), sorted(space.distributions())
    drawn: list[tuple[str, Params]] = [
        ("search", {name: float(rng.uniform()) for name in places}) for _ in range(trials - len(anchors))
    ]
    asked = [(kind, params, space.recipe(params)) for kind, params in [*anchors, *drawn]]
    study_yaml = "name: statistics\nmodels: {base: models/base, experts: {clinical: models/clinical}}\n"
    run = RunFolder.create_or_resume(folder, study_yaml, {}, tasks=infos)
    effects: list[tuple[float, float]] = []
    for number, (_, params, recipe) in enumerate(asked):
        weights = np.array(list(params.values()))
        effects.append((float(1 - np.exp(-2 * weights.mean())), float((weights**1.7).mean())))
        run.write_outcomes(number, SEARCH, recipe.digest, outcomes_of(*effects[-1], infos, SEARCH, number))
    values: dict[int, list[float]] = {}
    for start in range(2, trials, 50):  # a part at a time: this is not what is measured
        part = [0, 1, *range(start, min(trials, start + 50))]
        rows = [run.read_outcomes(number, SEARCH) for number in part]
        found = draw_objectives(Scale(pd.concat(rows), infos, SEARCH, base=0, experts={"clinical": 1}), replicates=0)
        points = np.stack([found.points[name] for name in objective_names(["clinical"])], axis=1)
        values |= dict(zip(part, points.tolist(), strict=True))
    numbers = sorted(values)
    front = np.array(numbers)[non_dominated(losses([values[number] for number in numbers]))]
    for number in sorted({*map(int, front), *range(len(anchors))}):
        (dose, harm), digest = effects[number], asked[number][2].digest
        run.write_outcomes(number, HOLDOUT, digest, outcomes_of(dose, harm, infos, HOLDOUT, number))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = run.storage()
    study = optuna.create_study(study_name=run.path.name, storage=storage, directions=["maximize", "minimize"])
    study.add_trials([
        optuna.trial.create_trial(
            params=dict(params),
            distributions={**space.distributions()} if params else {},
            values=values[number],
            user_attrs={"recipe": recipe.to_json(), "kind": kind, "seconds": 20.0},
        )
        for number, (kind, params, recipe) in enumerate(asked)
    ])  # fmt: skip
    close(storage)


def read_run(folder: Path) -> list[dict[str, object]]:
    """Read a run's figures as a person's program does, a step at a time."""
    begun = time.perf_counter()
    from optimizer.run import open_run

    rows: list[dict[str, object]] = []

    def step(name: str, do: Callable[[], object]) -> object:
        start, cpu = time.perf_counter(), time.process_time()
        found = do()
        rows.append(_row(name, time.perf_counter() - start, time.process_time() - cpu))
        return found

    run = open_run(folder)
    rows.append(_row("imports, the study", time.perf_counter() - begun, time.process_time()))
    step("outcomes of both suites", lambda: [run.outcomes(suite) for suite in (SEARCH, HOLDOUT)])
    step("all intervals, front probabilities", run.points)
    step("the verdict", run.verdict)
    step("answers for limits", run.by_limit)
    step("tasks of the knee", lambda: run.retention(run.knee()))
    step("what it lost and won", lambda: run.flips(run.knee()))
    return [*rows, _row("all", time.perf_counter() - begun, time.process_time())]


def _row(step: str, seconds: float, cpu: float) -> dict[str, object]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"step": step, "seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2), "peak_gb": round(peak, 2)}


def main(description: str) -> int:
    """Print the table; 1 where the aim is missed."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument("--run", type=Path, default=Path("runs/statistics"))
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--read", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = args.run / f"{args.trials}-{args.items}"
    if args.read:
        print(json.dumps(read_run(folder)))
        return 0
    if not folder.exists():
        draft = args.run / "draft" / folder.name
        shutil.rmtree(draft.parent, ignore_errors=True)
        draft.parent.mkdir(parents=True)
        write_run(draft, args.trials, args.items)
        draft.rename(folder)
    words = [sys.executable, sys.argv[0], "--read", "--run", str(args.run)]
    words += ["--trials", str(args.trials), "--items", str(args.items)]
    rows = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    print(f"{args.trials:,} trials, {args.items:,} items\n")
    print("| step | seconds | of the processor | peak, GB |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['step']} | {row['seconds']:.2f} | {row['cpu_seconds']:.2f} | {row['peak_gb']:.2f} |")
    if args.json is not None:
        document = {"trials": args.trials, "items": args.items, "steps": rows}
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    within = rows[-1]["seconds"] < SECONDS and rows[-1]["peak_gb"] < GIGABYTES
    print(f"\naim of {SECONDS:g} s and {GIGABYTES:g} GB: {'kept' if within else 'missed'}")
    return 0 if within else 1
