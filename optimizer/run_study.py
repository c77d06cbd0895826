"""From a study file to a finished run folder: what `search` does, top to bottom."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.outcomes import SUITES, TASK
from evals.packing import PLAN
from evals.task_files import files_of, names_a_file
from optimizer.database.study_home import require_usable
from optimizer.lost import flipped_with_texts
from optimizer.run import open_run
from optimizer.runs.atomic_file import write_atomically
from optimizer.runs.run_folder import RunFolder, is_run, renew_fingerprints
from optimizer.runs.trial import Role, TrialKind
from optimizer.search.cost import paid_for
from optimizer.search.derived import with_derived
from optimizer.search.driver import run_search
from optimizer.search.events import Event
from optimizer.search.plan import Ready, count_tokens, make_plan, require_own_names, require_sound
from optimizer.search.prepared import Preparation
from optimizer.study.schema import EvalsSection, Study
from optimizer.study.study_file import dump_study, read_study
from optimizer.study.tasks import task_specs
from optimizer.views.progress import Progress, event_text
from optimizer.views.tables import front_document, print_front
from optimizer.workers.pool import SerialPool
from optimizer.workers.ray_address import other_cluster
from optimizer.workers.ray_pool import RayPool, library_versions
from optimizer.workers.staging import Listing, SourceServer, StagedWorker
from optimizer.workers.worker import Worker, WorkerSpec

if TYPE_CHECKING:
    from rich.console import Console

    from optimizer.checkpoints.checkpoint import Checkpoint
    from optimizer.run import Run


DERIVED_FOLDER = "derived-experts"  # beside the run folders: runs of the same models and items share them


def run_study(study_path: Path | str, overrides: Sequence[str], console: Console) -> Run:
    """Run a study, or take it up where it was left, and print its front.

    Args:
        study_path: the study file.
        overrides: values set by hand, such as "search.trials=40".
        console: where progress and the front are written.

    Returns:
        The run, opened.

    Raises:
        MergefrontError: what is wrong, in words for a person.
        KeyboardInterrupt: the person stopped the search; the console says how to go on.
    """
    require_own_names()
    study = read_study(study_path, overrides)
    with ExitStack() as held:
        if known := is_run(study.run_path):  # a second driver is told at once, before any model is read
            held.enter_context(RunFolder(study.run_path).lock())
        require_usable(study.search.storage)
        ready = with_derived(_opened(study), derived_folder(study), make_pool, partial(console.print, highlight=False))
        study = ready.study
        tasks = ready.harness.infos
        renew_fingerprints(study.run_path, {model.dated: model.fingerprint for model in ready.models})
        run = RunFolder.create_or_resume(
            study.run_path, dump_study(study), fingerprint(ready), tasks=tasks, storage=study.search.storage
        )
        if not known:
            held.enter_context(run.lock())
        console.print(f"run folder: {run.path}", highlight=False, markup=False, soft_wrap=True)
        if study.workers.count and study.workers.ray_address is None and (other := other_cluster()):
            console.print(other, highlight=False, markup=False, soft_wrap=True)
        try:
            _search(ready, run, console)
        except KeyboardInterrupt:
            go_on = shlex.join(["mergefront", "search", str(study_path), *(f"--set={o}" for o in overrides)])
            lines = f"stopped; nothing finished is lost. Go on with:\n  {go_on}"
            console.print(lines, highlight=False, markup=False, soft_wrap=True)
            raise
        finished = open_run(run.path, storage=study.search.storage)
        finish(finished)
    print_front(finished, console)
    return finished


def _opened(study: Study) -> Ready:
    """Open everything a study names; all of it fits, and the models are finite."""
    from optimizer.checkpoints.checkpoint import require_finite

    plan = make_plan(study)
    count_tokens(plan)
    ready = require_sound(plan)
    for checkpoint in ready.models:
        require_finite(checkpoint)
    return ready


def _search(ready: Ready, run: RunFolder, console: Console) -> None:
    with Progress(console) as progress, make_pool(ready.study) as pool:
        run_search(
            ready.study.search,
            run,
            space=ready.space,
            pool=pool,
            tasks=ready.harness.infos,
            require_unchanged=partial(_require_unchanged, ready.models),
            events=partial(_tell_both, progress, run),
            preparation=preparation_of(ready),
        )


def preparation_of(ready: Ready) -> Preparation:
    """Give the anchors that a worker prepares for a study."""
    study, learned = ready.study, ready.study.search.learned
    derived, lessons = paid_for(study, ready.space, ready.harness.infos)
    return Preparation(
        base=study.models.base,
        experts=tuple(study.models.experts.items()),
        folder=derived_folder(study),
        derived=derived,
        learned=lessons,
        by=learned.by,
        loss=learned.loss,
        steps=learned.steps,
        seed=study.search.seed,
    )


def finish(run: Run) -> None:
    """Write front.json and report.html from what the run folder holds."""
    from optimizer.views.report import write_report

    document = front_document(run)
    if document["flipped"]:
        document["flipped"]["items"] = flipped_with_texts(run, document["flipped"]["trial"])
    write_atomically(run.path / "front.json", (json.dumps(document, indent=1) + "\n").encode())
    write_report(run)  # whose texts of items are those of front.json


def make_pool(study: Study) -> SerialPool | RayPool:
    """Start the study's workers: in this process, or Ray actors."""
    workers, spec = study.workers, worker_spec(study)
    if workers.count == 0:
        return SerialPool(partial(Worker, spec))
    joins = workers.ray_address is not None  # machines of a cluster may lack this one's disk
    return RayPool(
        partial(StagedWorker, spec, workers.staging) if joins else partial(Worker, spec),
        workers.count,
        threads=0 if workers.threads == "auto" else workers.threads,
        address=workers.ray_address,
        trial_seconds=study.search.trial_timeout and 60 * study.search.trial_timeout,
        device=workers.device,
        gpus=None if workers.gpus == "auto" else workers.gpus,
        server=(SourceServer, listings_of(study), derived_folder(study)) if joins else None,
    )


def listings_of(study: Study) -> dict[str, Listing]:
    """List the files of every source that a study names by a path or a hub id."""
    from optimizer.checkpoints.opening import folder_of  # brings torch

    models, tasks = [study.models.base, *study.models.experts.values()], task_specs(study)
    found = {source: Listing.of_model(folder_of(source)) for source in models}
    for task in tasks:
        if task.kind != TASK:
            found[task.name] = Listing.of(Path(task.name), [Path(task.name)])
        elif names_a_file(task.name):
            found[task.name] = Listing.of(Path(task.name), files_of(task.name, code=study.evals.allow_task_code))
    given = [entry.calibration for entry in study.models.derived.values() if entry.calibration]
    texts = {text for calibration in given for text in (calibration.domain, calibration.general)}
    return found | {text: Listing.of(Path(text), [Path(text)]) for text in texts}


def derived_folder(study: Study) -> Path:
    """Return the folder of derived experts: runs of the same models and items share it."""
    return Path(study.runs).absolute() / DERIVED_FOLDER


def worker_spec(study: Study) -> WorkerSpec:
    """Return what a worker is told of the study."""
    evals, workers = study.evals, study.workers
    share = max(1, (os.cpu_count() or 1) // max(1, workers.count))
    return WorkerSpec(
        base=study.models.base,
        experts=tuple(study.models.experts.items()),
        tasks=task_specs(study),
        chat=evals.chat,
        allow_task_code=evals.allow_task_code,
        token_budget=0 if evals.token_budget == "auto" else evals.token_budget,
        dtype=evals.dtype,
        device=workers.device,
        threads=share if workers.threads == "auto" else workers.threads,
        seed=evals.seed,
        gpus=0 if workers.gpus == "auto" else math.ceil(workers.gpus),
    )


# settings that earlier versions did not have: named where they are not what these did
LATER_SETTINGS = ("system_instruction", "fewshot_as_multiturn")


def fingerprint(ready: Ready) -> dict[str, Any]:
    """Return every setting a score depends on; a run is taken up only where all of them are as they were."""
    evals = ready.study.evals
    judges = {task.info.name: " ".join(task.judge) for task in ready.harness.tasks if task.judge}
    changed = {name for name in LATER_SETTINGS if getattr(evals, name) != EvalsSection.model_fields[name].default}
    return {
        "base": ready.base.fingerprint,
        "experts": {name: expert.fingerprint for name, expert in ready.experts.items()},
        "space": {
            "method": ", ".join(ready.space.methods),
            **{f"kind {name}": ", ".join(patterns) for name, patterns in ready.space.kinds},
            "parameters": {name: repr(part) for name, part in ready.space.distributions().items()},
            **{
                anchor.name: dict(anchor.params)
                for anchor in ready.space.anchors()
                if TrialKind(anchor.name).role is Role.START
            },
        },
        "evals": {name: getattr(evals, name) for name in ("chat_template", "dtype", "token_budget", "seed")}
        | {name: getattr(evals, name) for name in LATER_SETTINGS if name in changed},
        **({"judges": judges} if judges else {}),
        "shots": {row["task"]: row["shots"] for row in ready.harness.describe()},
        "items": {suite: ready.harness.suite_hash(suite) for suite in SUITES},
        "requests": ready.harness.request_hashes(),
        "versions": library_versions() | {"batch plan": PLAN},
    }


def _require_unchanged(checkpoints: Sequence[Checkpoint]) -> None:
    for checkpoint in checkpoints:
        checkpoint.require_unchanged()


def _tell_both(progress: Progress, run: RunFolder, event: Event) -> None:
    run.log(f"{event.kind} {event_text(event)}")
    progress(event)
