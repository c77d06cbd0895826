"""Does lm-eval, given the exported model, find the scores that the run shows for it?

    python benchmarks/agreement.py runs/demo [TRIAL]

Loads the model that `mergefront export` wrote for the trial (the knee unless named), runs lm-eval's own
`simple_evaluate` with HFLM on exactly the items of each suite, and prints both scores. It does so twice: in the number
format that the study scored in, and in bf16, as most people run lm-eval; that rounding alone moves scores a little.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.lm_harness import Harness
from evals.lm_tasks import load_tasks
from evals.objectives import task_scores
from evals.outcomes import SUITES, Chat
from optimizer.run import open_run
from optimizer.runs.outcome_files import outcomes_path, read_outcomes
from optimizer.strict_yaml import read_yaml
from optimizer.study.study_file import read_study
from optimizer.study.tasks import task_specs

DTYPES = {"auto": "auto", "float32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class Agreement:
    """One task's score on one suite, as the run has it and as lm-eval finds it."""

    task: str
    suite: str
    metric: str
    items: int
    ours: float
    theirs: float


def agreements(run: Path, trial: int, model_folder: Path, *, dtype: str, batch_size: int = 8) -> Iterator[Agreement]:
    """Score an exported trial again with `simple_evaluate`, for every task folder of its study and both suites.

    Args:
        dtype: HFLM's, "auto" (the exported model's own), "float32" or "bf16".
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    study = read_study(run / "study.yaml")
    specs = task_specs(study)
    harness = load_tasks(specs, seed=study.evals.seed, chat=Chat(), allow_task_code=False)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=DTYPES[dtype])
    lm = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(model_folder), batch_size=batch_size)
    with tempfile.TemporaryDirectory() as scratch:
        for suite in SUITES:
            path = outcomes_path(run, trial, suite)
            if not path.exists():
                continue
            ours = task_scores(read_outcomes(path).assign(trial=trial), suite).set_index("task")["score"]
            for spec, task in zip(specs, harness.tasks, strict=True):
                if not task.items[suite]:  # a sentinel's on the search suite
                    continue
                config = suite_alone(harness, task.info.name, suite, Path(spec.name), Path(scratch))
                found = lm_eval.simple_evaluate(
                    lm, tasks=[config], task_manager=TaskManager(include_defaults=False), bootstrap_iters=0
                )
                theirs = found["results"][task.info.name][f"{task.info.metric},none"]
                yield Agreement(
                    task.info.name, suite, task.info.metric, len(task.items[suite]), float(ours[task.info.name]), theirs
                )


def suite_alone(harness: Harness, task: str, suite: str, source: Path, scratch: Path) -> dict[str, Any]:
    """The task's own configuration over the rows of one suite alone."""
    items = next(loaded for loaded in harness.tasks if loaded.info.name == task).items[suite]
    rows = scratch / f"{task}-{suite}.jsonl"
    rows.write_text("".join(json.dumps(dict(item.doc)) + "\n" for item in items))
    config = read_yaml(next(source.glob("*.yaml")) if source.is_dir() else source)
    return config | {"dataset_kwargs": {"data_files": {"test": str(rows)}}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("trial", type=int, nargs="?")
    arguments = parser.parse_args()
    trial = open_run(arguments.run).knee() if arguments.trial is None else arguments.trial
    own = read_study(arguments.run / "study.yaml").evals.dtype
    for dtype in dict.fromkeys((own, "bf16")):
        print(f"trial {trial}, lm-eval in {dtype}")
        print(f"{'task':<20}{'suite':<9}{'metric':<15}{'items':>6}{'run':>9}{'lm-eval':>9}{'differ':>9}")
        for row in agreements(arguments.run, trial, arguments.run / "models" / f"trial-{trial}", dtype=dtype):
            print(
                f"{row.task:<20}{row.suite:<9}{row.metric:<15}{row.items:>6}{row.ours:>9.4f}{row.theirs:>9.4f}"
                f"{row.theirs - row.ours:>+9.4f}"
            )


if __name__ == "__main__":
    main()
