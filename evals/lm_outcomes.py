"""From a model's answers to outcomes: what the task's metric gives for each item, and what that adds to its score."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
from lm_eval.api.task import ConfigurableTask

from evals.errors import ScoreError, TaskError, error_text
from evals.judge import judged
from evals.lm_asked import Answered, AskedItem, LoadedTask
from evals.lm_metric import value_of
from evals.lm_split import Item
from evals.outcomes import Outcome
from evals.statistics import OWN, PERPLEXITY, pseudo_values

LARGEST = 1e30  # of a score
NO_PARTS: tuple[float, ...] = ()


def measured_outcome(
    asked: AskedItem, answered: Sequence[Answered], suite: str, max_length: int
) -> tuple[Outcome, Any]:
    """Return an item's outcome, and what the task's metric gives for it."""
    task, item, member = asked.task, asked.item, asked.task.members[asked.item.member]
    metrics: Mapping[str, Any]
    if task.judge:
        draws = [_filtered(asked, answered, slice(i, None, len(answered)))[0] for i in range(len(answered))]
        answers, metrics = draws, {task.info.metric: 0.0}
    else:
        answers, metrics = _metrics(asked, answered)
    if task.info.output_type == "loglikelihood_rolling":
        loglikelihood, size = bytes_of(member, item, metrics, answers[0])
        if task.info.is_to_base:
            loglikelihood, size = float(answers[0]), sum(answer.length for answer in answered)
        value, weight = -loglikelihood / math.log(2), float(size)
        loglikelihoods: tuple[float, ...] = (float(answers[0]),)
        measured, parts = None, NO_PARTS
    else:
        measured = metrics[task.info.metric]
        aggregate = None if task.judge else task.aggregate
        value, parts = value_of(task.info.metric, measured, task.info.statistic, aggregate, task.classes)
        weight = 1.0
        loglikelihoods = () if task.info.output_type == "generate_until" else tuple(float(a[0]) for a in answers)
    if not all(map(math.isfinite, (value, *parts))):
        raise ScoreError(f"task {task.info.name}, item {item.hash}: {task.info.metric} is {value}")
    written = [answer.text for answer in answered if answer.text is not None]
    outcome = Outcome(
        task.info.name,
        suite,
        item.hash,
        value,
        weight,
        loglikelihoods,
        truncated=not all(request.encoded.fits(max_length) for request in asked.requests),
        lengths=tuple(answer.length for answer in answered),
        broken_off=any(answer.broken_off for answer in answered),
        right=asked.right,
        answer="\n".join(written) if written else None,
        statistic=task.info.statistic if parts else "",
        parts=parts,
        cluster=item.cluster,
    )
    return outcome, answers if task.judge else measured


def _metrics(asked: AskedItem, answered: Sequence[Answered]) -> tuple[list[Any], Mapping[str, Any]]:
    """Return an item's answers behind the task's filter, and what the task gives for them.

    Of several drawn answers lm-eval's own filter keeps the first. Where a task has no other, and its score is a mean,
    each is scored by itself and the metric is their mean, which estimates the same with less noise.
    """
    member, name, repeats = asked.task.members[asked.item.member], asked.task.info.metric, 1
    if member.config.filter_list is None and not asked.task.info.statistic:
        repeats = asked.task.repeats(asked.item.member)
    found = []
    for draw in range(repeats):
        answers = _filtered(asked, answered, slice(draw, None, repeats))
        try:
            metrics = member.process_results(asked.item.doc, answers)
        except Exception as error:  # metrics and task code raise whatever they like
            where = f"task {asked.task.info.name}, item {asked.item.hash}"
            raise TaskError(f"{where}: {name}: {error_text(error)}") from error
        if name not in metrics and asked.task.info.output_type != "loglikelihood_rolling":
            raise TaskError(
                f"task {asked.task.info.name}, item {asked.item.hash}: there is no {name} among its metrics"
            )
        found.append(metrics)
    if repeats > 1:
        metrics = {**metrics, name: math.fsum(float(each[name]) for each in found) / repeats}
    return answers, metrics


def as_one_score(items: Sequence[AskedItem], measured: Sequence[tuple[Outcome, Any]]) -> list[Outcome]:
    """Give the items of a task with a judge or an aggregation of its own values whose mean is its score."""
    outcomes = [outcome for outcome, _ in measured]
    for task in {asked.task.info.name: asked.task for asked in items}.values():
        places = [i for i, asked in enumerate(items) if asked.task is task]
        if task.judge and places:
            verdicts = _verdicts(task, [(items[i], measured[i][1]) for i in places])
            for i, value in zip(places, verdicts, strict=True):
                outcomes[i] = replace(outcomes[i], value=value)
        if task.info.statistic == PERPLEXITY:
            sums = np.array([outcomes[i].parts for i in places]).sum(axis=0)
            if -sums[0] / sums[1] > math.log(LARGEST):
                raise ScoreError(f"task {task.info.name}: {task.info.metric} is above {LARGEST:g}")
        if task.info.statistic != OWN:
            continue
        try:
            values = pseudo_values(task.aggregate, [measured[i][1] for i in places])
        except Exception as error:  # a task's code raises whatever it likes
            raise TaskError(f"task {task.info.name}: aggregation of {task.info.metric}: {error_text(error)}") from error
        if not all(map(math.isfinite, values)):
            raise ScoreError(f"task {task.info.name}: {task.info.metric} is not finite where an item is left out")
        for i, value in zip(places, values, strict=True):
            outcomes[i] = replace(outcomes[i], value=value)
    return outcomes


def _filtered(asked: AskedItem, answered: Sequence[Answered], draws: slice) -> list[Any]:
    """Return an item's answers behind the task's filter, which reads them from lm-eval's instances."""
    member = asked.task.members[asked.item.member]
    instances = list({id(request.instance): request.instance for request in asked.requests}.values())
    size = len(asked.requests) // len(instances)  # answers to each
    for i, instance in enumerate(instances):
        instance.resps = [answer.response for answer in answered[i * size : (i + 1) * size][draws]]
    next(ensemble for ensemble in member._filters if ensemble.name == asked.task.filter).apply(instances)
    return [instance.filtered_resps[asked.task.filter] for instance in instances]


def _verdicts(task: LoadedTask, answered: Sequence[tuple[AskedItem, Sequence[str]]]) -> list[float]:
    """Return what a task's judge gives each item, the mean over its answers."""
    lines = [
        {
            "task": task.info.name,
            "item": asked.item.hash,
            "prompt": str(asked.requests[0].instance.args[0]),
            "answer": answer,
            "target": task.members[asked.item.member].doc_to_target(asked.item.doc),
            "doc": dict(asked.item.doc),
        }
        for asked, answers in answered
        for answer in answers
    ]
    values = iter(judged(task.info.name, task.judge, lines))
    return [math.fsum(islice(values, len(answers))) / len(answers) for _, answers in answered]


def bytes_of(
    member: ConfigurableTask, item: Item, metrics: Mapping[str, Any], loglikelihood: float
) -> tuple[float, int]:
    """Return a text's log-likelihood in nats and its size in bytes, which a task may count in its own way."""
    for name in ("bits_per_byte", "byte_perplexity"):
        if name in metrics:
            return metrics[name]
    return loglikelihood, member.count_bytes(member.doc_to_target(item.doc))
