"""Which of a task's metrics is measured, and whether the task is one that can be measured here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lm_eval.api.metrics import mean
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.utils import normalize_gen_kwargs

from evals.errors import TaskError
from evals.lm_split import Item
from evals.outcomes import TaskSpec

ROLLING_METRICS = ("bits_per_byte", "byte_perplexity", "word_perplexity")
NOT_A_NUMBER = ("likelihood",)  # lm-eval averages it, but each item's is a pair
GREEDY_KEYS = frozenset({"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"})  # last three: unused


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
        strange = sorted(set(options) - GREEDY_KEYS)
        if options["do_sample"] or strange or member.config.repeats != 1:
            what = "sampling" if options["do_sample"] else ", ".join(strange) or f"repeats: {member.config.repeats}"
            raise TaskError(f"answers must be greedy, to be the same twice: task {spec.name} asks for {what}")


def choose_metric(name: str, members: Sequence[ConfigurableTask], wanted: str) -> tuple[str, str, bool]:
    """Choose the metric that is measured, the filter before it, and whether higher is better."""
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
        return "bits_per_byte", chosen, False
    usable = [m for m, how in first.aggregation().items() if how is mean and m not in NOT_A_NUMBER]
    if not usable or (metric and metric not in usable):
        found = ", ".join(first.aggregation())
        raise TaskError(
            f"a metric must be a mean over items: task {name} has {found}, of which usable: "
            f"{', '.join(usable) or 'none'}{f'; {metric!r} given' if metric else ''}"
        )
    metric = metric or usable[0]
    if any(member.aggregation().get(metric) is not mean for member in members):
        raise TaskError(f"group {name}: metric {metric} is not in all of its tasks")
    return metric, chosen, bool(first.higher_is_better()[metric])


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
