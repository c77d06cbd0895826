"""Which of a task's metrics is measured, and whether the task is one that can be measured here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from lm_eval.api.metrics import (
    brier_score,
    bypass_agg,
    f1_score,
    matthews_corrcoef,
    mean,
    median,
    nanmean,
    perplexity,
    weighted_perplexity,
)
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.utils import normalize_gen_kwargs

from evals.errors import TaskError
from evals.judge import METRIC as JUDGE
from evals.lm_split import Item
from evals.outcomes import TaskSpec
from evals.statistics import F1, MCC, MOST_CLASSES, OWN, PERPLEXITY, RATIO, parts_of_choice
from evals.tokens import Sampling

Parts = tuple[float, ...]
AGGREGATIONS: dict[object, str] = {
    f1_score: F1, matthews_corrcoef: MCC, perplexity: PERPLEXITY, weighted_perplexity: PERPLEXITY, nanmean: RATIO,
}  # fmt: skip
NO_SCORES = (bypass_agg, median)  # no score at all, and one that leaving out an item hardly ever changes

ROLLING_METRICS = ("bits_per_byte", "byte_perplexity", "word_perplexity")
NOT_A_NUMBER = ("likelihood",)  # lm-eval averages it, but each item's is a pair
KNOWN_KEYS = frozenset({"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"})
SAMPLING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}  # and what stands for what is not given
MOST_REPEATS = 256


def require_usable(member: object, spec: TaskSpec, *, allow_task_code: bool) -> None:
    if not isinstance(member, ConfigurableTask):
        raise TaskError(f"task {spec.name} is a Python class: only tasks made from YAML are supported")
    if getattr(member, "MULTIMODAL", False):
        raise TaskError(f"task {spec.name} needs images or sound")
    if getattr(member, "UNSAFE_CODE", False) and not allow_task_code:
        raise TaskError(f"task {spec.name} runs code that models write; set evals.allow_task_code to allow it")
    if spec.shots and member.OUTPUT_TYPE == "loglikelihood_rolling":
        raise TaskError(f"task {spec.name} scores whole texts and takes no shots: {spec.shots} asked for")
    if member.OUTPUT_TYPE == "generate_until":
        options = normalize_gen_kwargs(member.config.generation_kwargs)
        if strange := sorted(set(options) - KNOWN_KEYS):
            raise TaskError(
                f"answers are greedy or drawn by temperature, top_k and top_p: task {spec.name} asks for "
                f"{', '.join(strange)}"
            )
        repeats = member.config.repeats
        if type(repeats) is not int or not 1 <= repeats <= MOST_REPEATS:
            raise TaskError(
                f"task {spec.name}: repeats must be a whole number from 1 to {MOST_REPEATS}: {repeats!r} given"
            )
        if repeats > 1 and not options["do_sample"]:
            raise TaskError(
                f"greedy answers are the same each time: task {spec.name} asks for repeats: {repeats}; leave it out, "
                "or say do_sample: true in generation_kwargs"
            )
        if options["do_sample"]:
            sampling_of(options, 0)


def sampling_of(options: Mapping[str, Any], seed: int) -> Sampling | None:
    """Return how answers are drawn by lm-eval's generation_kwargs (normalised); None where they are greedy.

    Raises:
        TaskError: a number that means nothing.
    """
    if not options["do_sample"]:
        return None
    temperature, top_k, top_p = (options.get(key, default) for key, default in SAMPLING.items())
    for name, value, sound in (
        ("temperature", temperature, isinstance(temperature, int | float) and 0 < temperature < 1e6),
        ("top_k", top_k, type(top_k) is int and top_k >= 0),
        ("top_p", top_p, isinstance(top_p, int | float) and 0 < top_p <= 1),
    ):
        if not sound or isinstance(value, bool):
            rule = "temperature above 0, top_k 0 or more, and top_p above 0 and at most 1"
            raise TaskError(f"generation_kwargs: drawn answers have {rule}: {name} {value!r} given")
    return Sampling(float(temperature), top_k, float(top_p), seed)


@dataclass(frozen=True, slots=True)
class Measured:
    """What is measured of a task.

    Args:
        metric: lm-eval's name.
        filter: what reads answers before it.
        higher_is_better: its direction.
        statistic: what the score is where it is no mean over items: one of `evals.statistics`.
    """

    metric: str
    filter: str
    higher_is_better: bool
    statistic: str = ""


def choose_metric(name: str, members: Sequence[ConfigurableTask], wanted: str) -> Measured:
    """Choose the metric that is measured: the one asked for, else the first that is a mean over items."""
    first = members[0]
    if any(member.OUTPUT_TYPE != first.OUTPUT_TYPE for member in members):
        raise TaskError(f"group {name} mixes kinds of tasks; name its tasks one by one")
    metric, _, chosen = wanted.partition(",")
    filters = [ensemble.name for ensemble in first._filters]
    if chosen and chosen not in filters:
        raise TaskError(f"task {name} has no filter {chosen!r}: {', '.join(filters)}")
    chosen = chosen or filters[0]
    if first.OUTPUT_TYPE == "loglikelihood_rolling":
        if metric and metric not in ROLLING_METRICS:
            raise TaskError(f"texts are scored in bits_per_byte: metric {metric!r} given for task {name}")
        return Measured("bits_per_byte", chosen, False)
    means = [m for m, how in first.aggregation().items() if how is mean and m not in NOT_A_NUMBER]
    others = [m for m, how in first.aggregation().items() if how is not mean and how not in NO_SCORES]
    usable = [*means, *others]
    if not usable or (metric and metric not in usable):
        found = ", ".join(first.aggregation())
        raise TaskError(
            f"a metric must give a score that can be resampled: task {name} has {found}, of which usable: "
            f"{', '.join(usable) or 'none'}{f'; {metric!r} given' if metric else ''}"
        )
    metric = metric or usable[0]
    how = first.aggregation()[metric]
    if any(member.aggregation().get(metric) is not how for member in members):
        raise TaskError(f"group {name}: metric {metric} is not in all of its tasks")
    return Measured(metric, chosen, bool(first.higher_is_better()[metric]), "" if how is mean else statistic_of(how))


def require_written(spec: TaskSpec, members: Sequence[ConfigurableTask], *, allow_task_code: bool) -> None:
    """Refuse a judge where nothing is written, or without leave to run a program."""
    if not allow_task_code:
        raise TaskError(
            f"task {spec.name}: judge runs a program, {spec.judge[0]}; set evals.allow_task_code only if you trust it"
        )
    if any(member.OUTPUT_TYPE != "generate_until" for member in members):
        raise TaskError(f"a judge reads written answers: task {spec.name} has {members[0].OUTPUT_TYPE}")


def choose_judged(name: str, members: Sequence[ConfigurableTask], wanted: str) -> Measured:
    """Choose the filter before a judge: the one asked for after a comma, else the task's first."""
    metric, _, chosen = wanted.partition(",")
    filters = [ensemble.name for ensemble in members[0]._filters]
    if metric not in ("", JUDGE) or (chosen and chosen not in filters):
        raise TaskError(
            f"task {name} is scored by its judge: metric is {JUDGE}, or {JUDGE},FILTER with one of "
            f"{', '.join(filters)}; {wanted!r} given"
        )
    return Measured(JUDGE, chosen or filters[0], higher_is_better=True)


def statistic_of(aggregate: object) -> str:
    """Name what an aggregation of lm-eval is; Brier scores are a mean over items, what is not known a task's own."""
    return "" if aggregate is brier_score else AGGREGATIONS.get(aggregate, OWN)


def value_of(name: str, measured: Any, statistic: str, aggregate: object, classes: int) -> tuple[float, Parts]:
    """Return an item's value, and what it adds to a score that is no mean.

    Args:
        name: of the metric.
        measured: what the task's metric gives for the item.
        classes: choices of the task's items, at most.

    Raises:
        TaskError: the metric gives something else.
    """
    if aggregate is brier_score:
        right, shares = measured
        if not isinstance(right, int | np.integer):
            raise TaskError(f"{name} is of tasks with one right choice: {right!r} given")
        wanted = np.eye(len(shares))[right]
        return float(((np.asarray(shares, dtype=float) - wanted) ** 2).sum()), ()
    if statistic in (F1, MCC):
        parts = parts_of_choice(name, measured, classes)
        return float(measured[0] == measured[1]), parts
    if statistic == PERPLEXITY:
        loglikelihood, size = measured if isinstance(measured, tuple | list) else (measured, 1.0)
        return float(loglikelihood), (float(loglikelihood), float(size))
    if statistic == RATIO:
        number = float(measured)
        return (0.0, (0.0, 0.0)) if math.isnan(number) else (number, (number, 1.0))
    return (0.0 if statistic == OWN else float(measured)), ()


def classes_of(name: str, statistic: str, members: Sequence[ConfigurableTask], items: Iterable[Item]) -> int:
    """Count the choices of a task's items, at most, where its score needs them.

    Raises:
        TaskError: they are too many, or F1 is asked of more than two.
    """
    if statistic not in (F1, MCC):
        return 0
    choices = (members[item.member].doc_to_choice(item.doc) for item in items)
    most = max((len(found) for found in choices if isinstance(found, list)), default=0)
    if statistic == F1 and most != 2:
        raise TaskError(f"f1 is of two choices, of which the second is looked for: an item of task {name} has {most}")
    if not 2 <= most <= MOST_CLASSES:
        raise TaskError(f"mcc is of 2 to {MOST_CLASSES} choices: an item of task {name} has {most}")
    return most


def require_measured(
    name: str, members: Sequence[ConfigurableTask], metric: str, items: Mapping[str, list[Item]]
) -> None:
    """Let each task make metrics of an answer, since what it lists need not be what it gives."""
    one_each = {item.member: item for found in items.values() for item in found}
    for m, item in one_each.items():
        member = members[m]
        if member.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood"):
            continue  # the others' metrics are named by lm-eval, or need an answer of the model's
        number = 1
        if member.OUTPUT_TYPE == "multiple_choice":
            number = len(member.doc_to_choice(item.doc)) * (2 if "acc_mutual_info" in member.aggregation() else 1)
        given = member.process_results(item.doc, [(-1.0, False)] * number)
        if metric not in given:
            raise TaskError(
                f"a metric must be one that the task gives: task {name} lists {metric!r} and gives "
                f"{', '.join(map(str, given)) or 'none'}; name one of these as metric, or give it by process_results"
            )


def metric_notes(name: str, member: ConfigurableTask, metric: str, asked: str) -> tuple[str, ...]:
    listed = asked.partition(",")[0] or next(iter(member.aggregation()), metric)
    if metric != "bits_per_byte" or listed == metric:
        return ()
    return (f"task {name} is scored in {metric}, not in {listed}: on the same texts both order models alike",)


def require_pooled(name: str, groups: Iterable[Any]) -> None:
    if any(not rule.weight_by_size for group in groups for rule in group.aggregate_metric_list or ()):
        raise TaskError(f"group {name} weighs its tasks alike whatever their size; name its tasks one by one")
