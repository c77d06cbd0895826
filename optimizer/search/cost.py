"""What a study asks of the machine, roughly: memory, tokens and time, before it runs."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.outcomes import HOLDOUT, SEARCH, SUITES, TaskInfo
from optimizer.search.prepared import DERIVATIONS, FIRST_SHARES, SHARES, derivations
from optimizer.workers.orders import CALIBRATION, QUESTIONS, TEXTS, Form

if TYPE_CHECKING:
    from optimizer.checkpoints.checkpoint import Checkpoint
    from optimizer.checkpoints.devices import Spread
    from optimizer.runs.trial import TrialKind
    from optimizer.search.plan import Plan
    from optimizer.study.schema import Study
    from search_spaces.choice import Choice
    from search_spaces.space import Space

CORE_FLOPS = 150e9  # per second; measured with a 135 M model in bf16 on two cores: 1,200 tokens/s, 2 FLOP a weight
GPU_FLOPS = 100e12  # a third of what a data-centre GPU promises
JUDGED = 15  # trials scored on the holdout suite: a guess at the front, and the anchors of the space
# What a form costs in readings of the items that it is made of: by the clock, on models of 135 and half a million.
FORMS: dict[Form, float] = {"kfac": 25, "regmean": 10, "fisher": 15}
LOOKED_AT = 1.2  # times all items: a fifth of them six times
TOKENS = 1.5  # of a lesson's items, those of texts for the most part, in tokens of a candidate's: measured 1.2 to 1.8
LESSONS = 2 / 3  # of what anchors and derived experts leave of `search.candidates`: the rest is searched


@dataclass(frozen=True, slots=True)
class Cost:
    """What a study asks of the machine, roughly."""

    resident_bytes: int  # a worker's own copy of the model
    mapped_bytes: int  # the sources, mapped once for all workers of a machine
    learning_bytes: int  # activations of a step that learns, in one worker; recomputed where they do not fit
    disk_bytes: int  # of derived experts
    tokens: Mapping[str, int]  # of one trial, by suite; of banks, what is drawn
    prepared: float  # what preparing anchors costs, in candidates
    hours: float
    lessons: int  # those that are paid for
    derived: tuple[TrialKind, ...]  # anchors, likewise
    on_gpus: tuple[int, ...] = ()  # of the model, on each GPU that it is spread over
    learning_on_gpu: int = 0  # of learning_bytes, on the GPU with the most layers


def cost_of(plan: Plan) -> Cost | None:
    """Estimate memory, tokens and time; None where a part of the plan is missing."""
    if plan.base is None or plan.harness is None or len(plan.experts) < len(plan.study.models.experts):
        return None
    numbers = count_numbers(plan.base)
    width = {"float32": 4.0, "bf16": 2.0, "auto": plan.base.bytes / numbers}[plan.study.evals.dtype]
    rows = plan.harness.describe()
    whole = {suite: sum(row[f"{suite}_tokens"] or 0 for row in rows) for suite in SUITES}
    shares = [
        (row["search_tokens"] or 0, row["drawn_items"] / row["search_items"]) for row in rows if row["drawn_items"]
    ]
    tokens = {**whole, SEARCH: whole[SEARCH] - round(sum(own * (1 - share) for own, share in shares))}
    tasks = plan.harness.infos
    kinds, lessons = paid_for(plan.study, plan.space, tasks)
    own, made = plan.study.models.derived.values(), {DERIVATIONS[kind][0] for kind in kinds}
    prepared = lessons * lesson_cost(plan.study.search.learned.steps, tasks) + sum(
        form_cost(form, tasks) for form in made
    )
    prepared += sum(form_cost(entry.form, tasks) for entry in own)
    derived = len(kinds)
    trials = {SEARCH: plan.study.search.trials + prepared, HOLDOUT: JUDGED + derived + lessons}
    anchors = derived + lessons + (len(plan.space.anchors()) if plan.space is not None else 0)
    bank = anchors * (whole[SEARCH] - tokens[SEARCH])  # what anchors read beyond what was drawn
    learning = _learning_bytes(plan.base, rows, round(width)) if lessons else 0
    spread = _spread(plan.base, plan.study)
    most_layers = max(map(spread.layers.count, set(spread.layers))) / len(spread.layers) if spread else 0
    work = 2 * numbers * (sum(tokens[suite] * trials[suite] for suite in SUITES) + bank)
    return Cost(
        resident_bytes=round(width * numbers),
        mapped_bytes=plan.base.bytes + sum(expert.own_bytes for expert in plan.experts.values()),
        learning_bytes=learning,
        disk_bytes=(len(SHARES) * len(made) + len(own)) * plan.base.bytes,
        tokens=tokens,
        prepared=prepared,
        hours=work / _speed(plan.study) / 3600,
        lessons=lessons,
        derived=kinds,
        on_gpus=tuple(round(held * width * numbers / plan.base.bytes) for held in spread.bytes) if spread else (),
        learning_on_gpu=round(learning * most_layers),
    )


def paid_for(
    study: Study, space: Space | Choice | None, tasks: Sequence[TaskInfo]
) -> tuple[tuple[TrialKind, ...], int]:
    """Say which derived anchors, and how many lessons, `search.candidates` pays for; all where it is not set.

    Derived anchors come first, the middle of every path before its ends; lessons have `LESSONS` of what is left.
    """
    forms = study.anchors.derived if len(study.models.experts) == 1 else ()
    learned, candidates = study.search.learned, study.search.candidates
    if candidates is None:
        return derivations(forms), learned.count
    each = anchor_cost(tasks)
    left = candidates - each * (len(space.anchors()) if space is not None else 0)
    made: set[Form] = set()
    kinds = []
    for kind in (kind for share in FIRST_SHARES for kind in derivations(forms, [share])):
        form, _ = DERIVATIONS[kind]
        cost = each + (0 if form in made else form_cost(form, tasks))
        if cost <= left:
            kinds.append(kind)
            made.add(form)
            left -= cost
    lessons = min(learned.count, max(0, int(LESSONS * left / (lesson_cost(learned.steps, tasks) + each))))
    return tuple(kind for kind in derivations(forms) if kind in kinds), lessons


def form_cost(form: Form, tasks: Sequence[TaskInfo]) -> float:
    """Compute what the derived experts of a form cost to make, in candidates: it reads a few items of every task."""
    return FORMS[form] * _some_of_each(tasks, *CALIBRATION) / _items_of_a_candidate(tasks)


def lesson_cost(steps: int, tasks: Sequence[TaskInfo]) -> float:
    """Compute what a lesson is expected to cost, in candidates.

    A step reads a few items of every task, forward and backward; the items kept apart are read again and again.
    """
    read = 3 * steps * _some_of_each(tasks, QUESTIONS, TEXTS) + LOOKED_AT * sum(task.search_items for task in tasks)
    return TOKENS * read / _items_of_a_candidate(tasks)


def anchor_cost(tasks: Sequence[TaskInfo]) -> float:
    """Compute what scoring an anchor costs, in candidates: 1, or more where it reads whole banks."""
    return sum(task.search_items for task in tasks) / _items_of_a_candidate(tasks)


def _some_of_each(tasks: Sequence[TaskInfo], questions: int, texts: int) -> int:
    """Count the items of so many questions and texts of each task, or all that it has."""
    return sum(min(task.search_items, questions if task.output_type == "multiple_choice" else texts) for task in tasks)


def _items_of_a_candidate(tasks: Sequence[TaskInfo]) -> int:
    return max(1, sum(task.drawn_items or task.search_items for task in tasks))


def _spread(base: Checkpoint, study: Study) -> Spread | None:
    """Tell how workers will spread the base; None where it lies on one device, or cannot be spread."""
    from optimizer.checkpoints.devices import Spread
    from optimizer.errors import CheckpointError

    gpus = study.workers.gpus
    with suppress(CheckpointError):  # which the plan has among its problems
        return Spread.of(base, int(gpus)) if gpus != "auto" and gpus > 1 else None
    return None


def _learning_bytes(base: Checkpoint, rows: Sequence[Mapping[str, Any]], width: int) -> int:
    """Estimate the activations of one step: a few items of every task are read together."""
    from evals.memory import activation_bytes
    from optimizer.checkpoints.configs import model_config

    tokens = 0.0
    for row in rows:
        items = row[f"{SEARCH}_items"]
        read = min(items, QUESTIONS if row["kind"] == "multiple_choice" else TEXTS)
        tokens += read * (row[f"{SEARCH}_tokens"] or 0) / max(1, items)
    return activation_bytes(model_config(base.folder), round(tokens), width)


def _speed(study: Study) -> float:
    """Estimate FLOP per second of all workers together."""
    workers, cores = study.workers, os.cpu_count() or 1
    if workers.device == "cuda" or (workers.device == "auto" and Path("/dev/nvidia0").exists()):
        return GPU_FLOPS
    threads = cores if workers.threads == "auto" else workers.threads * max(1, workers.count)
    return CORE_FLOPS * min(threads, cores)


def count_numbers(model: Checkpoint) -> int:
    """Count the numbers in a model's tensors."""
    return sum(math.prod(model.shape(name)) for name in model.names)
