"""The items of a task: their content and the chance of guessing, in disjoint parts, and what shots are left."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.samplers import FirstNSampler
from lm_eval.api.task import ConfigurableTask

from evals.errors import TaskError, error_text, shortened
from evals.outcomes import CERTIFY, HOLDOUT, REST, SEARCH, SPARE, SPARE_SHARE, TaskSpec
from evals.rows import Rows

# Columns in which tasks keep the document that an item is about, an identifier of it before its text.
SHARED = (
    *("passage_id", "document_id", "doc_id", "article_id", "story_id", "context_id", "paragraph_id"),
    *("passage", "document", "article", "story", "context", "paragraph"),
)
LEAST_CLUSTERS = 10
Chances = dict[tuple[int, str], float]  # of guessing right, by member of a group and item hash


@dataclass(frozen=True, slots=True)
class Item:
    """One item of a task: its content hash, the member of the group it is from, lm-eval's document, and the hash of
    what it shares with other items; "" where that is nothing."""

    hash: str
    member: int
    doc: Mapping[str, Any]
    cluster: str = ""


def read_items(
    name: str, members: Sequence[ConfigurableTask], group_by: str = ""
) -> tuple[dict[str, list[Item]], Chances]:
    """Read items by content (one for each member that has it), and the chance of guessing each right.

    Args:
        group_by: the column of what items share; "": the first of `SHARED` that some items share.
    """
    columns = [_shared_column(name, member, group_by) for member in members]
    items: dict[str, list[Item]] = {}
    chances: Chances = {}
    for m, member in enumerate(members):
        for n, doc in enumerate(member.task_docs):
            try:
                content, chance = content_of(member, doc)
            except TaskError as error:
                raise TaskError(f"task {name}, {error_of_item(member, n, error)}") from error
            item = Item(
                content if len(members) == 1 else content_hash(f"{member.task_name}:{content}"),
                m,
                doc,
                _cluster(doc, columns[m]),
            )
            if (m, item.hash) not in chances:
                chances[m, item.hash] = chance
                items.setdefault(content, []).append(item)
    return items, chances


def _shared_column(name: str, member: ConfigurableTask, group_by: str) -> str:
    """Choose the column of what a task's items share; "" where they share nothing that is known."""
    docs = list(member.task_docs)
    there = set(docs[0]) if docs else set()
    if group_by and group_by not in there:
        raise TaskError(
            f"task {name}: group_by must be a column of its items: {group_by!r} given, "
            f"{', '.join(map(str, sorted(there))) or 'none'} there"
        )
    for column in [group_by] if group_by else [column for column in SHARED if column in there]:
        clusters = [found for doc in docs if (found := _cluster(doc, column))]
        if LEAST_CLUSTERS <= len(set(clusters)) < len(clusters):
            return column
        if group_by and len(set(clusters)) < LEAST_CLUSTERS:
            raise TaskError(
                f"task {name}: group_by must tell {LEAST_CLUSTERS} groups of items or more from each other, or their "
                f"spread is not known; {group_by!r} tells {len(set(clusters))}"
            )
    return group_by


def _cluster(doc: Mapping[str, Any], column: str) -> str:
    """Hash what an item has in a column; "" for nothing, and for what is no text and no number."""
    value = doc.get(column) if column else None
    return content_hash(f"{value}") if isinstance(value, str | int) and value != "" else ""


def content_of(member: ConfigurableTask, doc: Mapping[str, Any]) -> tuple[str, float]:
    """Return the hash of what a model sees and is asked, whatever the other columns, and the chance of guessing."""
    text, target = _field(member.doc_to_text, doc), _field(member.doc_to_target, doc)
    choices = _field(member.doc_to_choice, doc) if member.config.doc_to_choice is not None else None
    content = content_hash(json.dumps([text, choices, target], ensure_ascii=False, default=str))
    if member.OUTPUT_TYPE != "multiple_choice":
        return content, 0.0
    return content, len(right_choices(member, doc)) / len(choices or [])


def right_choices(member: ConfigurableTask, doc: Mapping[str, Any]) -> tuple[int, ...]:
    """Return which choices of an item are right, in order; none where a task has no choices."""
    if member.OUTPUT_TYPE != "multiple_choice":
        return ()
    gold = _field(member.doc_to_text if member.multiple_input else member.doc_to_target, doc)
    choices = _field(member.doc_to_choice, doc)
    return tuple(sorted({choice_index(answer, choices) for answer in (gold if isinstance(gold, list) else [gold])}))


def _field(read: Callable[[Mapping[str, Any]], Any], doc: Mapping[str, Any]) -> Any:
    try:
        return read(doc)
    except Exception as error:  # templates and task code raise whatever they like
        raise TaskError(f"{read.__name__}: {error_text(error)}") from error


def choice_index(answer: object, choices: object) -> int:
    """Return which choice an answer is; lm-eval would score a wrong index as never right."""
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise TaskError(
            "doc_to_choice: an item needs two or more choices that are texts and not empty: "
            f"{shortened(repr(choices))} given; put numbers in quotes, and leave the item out where a choice is empty"
        )
    if isinstance(answer, str) and answer in choices:
        return choices.index(answer)
    if isinstance(answer, int) and 0 <= answer < len(choices):
        return answer
    raise TaskError(
        f"doc_to_target: the right answer must be one of the {len(choices)} choices: {shortened(repr(answer))} given; "
        f"name a choice, or give its place, 0 to {len(choices) - 1}"
    )


def error_of_item(member: ConfigurableTask, n: int, error: TaskError) -> TaskError:
    """Return the error of an item with its line, or that of the item which made this one wrong."""
    rows, split = member.config.custom_dataset, member.config.test_split or member.config.validation_split
    if not isinstance(rows, Rows) or member.config.process_docs is not None:
        return TaskError(f"item {n + 1}: {error}")
    place = rows.splits[split][n].place
    if _problem(member, rows.as_written(split, n)) is not None:
        return TaskError(f"item {n + 1}: {error}; {place}")
    for k, row in enumerate(rows.splits[split]):  # one number with a point makes all numbers of its column such
        own = _problem(member, rows.as_written(split, k)) if float in map(type, row.values.values()) else None
        if own is not None:
            return TaskError(f"item {k + 1}: {own}; {row.place}")
    return TaskError(f"item {n + 1}: {error}; {place}")


def _problem(member: ConfigurableTask, doc: Mapping[str, Any]) -> TaskError | None:
    try:
        content_of(member, doc)
    except TaskError as error:
        return error
    return None


def split_items(
    name: str,
    items: Mapping[str, list[Item]],
    members: Sequence[ConfigurableTask],
    spec: TaskSpec,
    shots: Sequence[int],
    seed: int,
) -> dict[str, tuple[Item, ...]]:
    """Search items from one end of a seeded order of contents, holdout items from the other; from between come certify
    items, next to the holdout, and shots.

    A bank takes more of the search's end: what all others leave, or half of all where the holdout takes the rest. With
    `group_by`, items that share something stand together, and what one suite has of it no other suite has.
    """
    cluster = {c: items[c][0].cluster or c for c in items} if spec.group_by else {c: c for c in items}
    order = sorted(items, key=lambda c: (content_hash(f"{seed}:{cluster[c]}"), content_hash(f"{seed}:{c}")))
    examples = [
        [_content_of_shot(member, doc) for doc in member.sampler.df] if number else []
        for member, number in zip(members, shots, strict=True)
    ]
    reserved = max(_reserved(*needed, items) for needed in zip(members, shots, examples, strict=True))
    asked_for = asked_certify_items(spec, len(order))
    others = len(order) // 2 if spec.holdout_items == REST else reserved + asked_for + _number(spec, len(order))
    search = max(spec.search_items, min(spec.bank_items, len(order) - others))
    rest = [content for content in order[search:] if cluster[content] != cluster[order[search - 1]] or not search]
    left = len(rest)
    if spec.holdout_items == REST:
        kept = 0 if spec.certify_items == SPARE else min(asked_for, max(0, left - reserved - 1))
        holdout = left - reserved - kept
    else:
        holdout = _number(spec, len(order))
    if holdout < 1 or holdout > left:
        asked = "the rest" if spec.holdout_items == REST else str(holdout)
        if not spec.search_items:  # a sentinel
            raise TaskError(
                f"too few items: task {name} has {len(order)} different items, {asked} holdout items asked for; "
                "lower holdout_items, in evals or for this task"
            )
        raise TaskError(
            f"too few items: task {name} has {len(order)} different items, {spec.search_items} search and {asked} "
            "holdout items asked for, and none may be both; lower items or holdout_items, in evals or for this task"
        )
    between = rest[: left - holdout]
    between = [content for content in between if cluster[content] != cluster[rest[left - holdout]]]
    if spec.certify_items == SPARE:  # nothing that a shot is drawn from, so that no prompt changes
        free = set(between).difference(*examples)
        between = [content for content in between if content in free]
    else:
        between = between[reserved:]
    certify = between[max(0, len(between) - asked_for) :]
    chosen = {SEARCH: order[:search], HOLDOUT: rest[left - holdout :], CERTIFY: certify}
    used = {content for contents in chosen.values() for content in contents}
    for member, number, known in zip(members, shots, examples, strict=True):
        if number:
            _keep_shots(name, member, number, [content not in used for content in known])
    return {suite: tuple(i for content in contents for i in items[content]) for suite, contents in chosen.items()}


def _number(spec: TaskSpec, items: int) -> int:
    """Count the holdout items of a spec that asks for a number or a share."""
    return round(spec.holdout_items * items) if isinstance(spec.holdout_items, float) else spec.holdout_items


def asked_certify_items(spec: TaskSpec, contents: int) -> int:
    """Return how many certify items a study asks of a task that has so many different items."""
    share = SPARE_SHARE if spec.certify_items == SPARE else spec.certify_items
    return round(share * contents) if isinstance(share, float) else share


def _keep_shots(name: str, member: ConfigurableTask, shots: int, is_free: Sequence[bool]) -> None:
    """Leave a task only worked examples that no suite scores."""
    pool = [doc for doc, free in zip(member.sampler.df, is_free, strict=True) if free]
    needed = _examples(member, shots)
    if len(pool) < needed:
        raise TaskError(
            f"shots come from items that no suite scores: task {name} has {len(pool)} such items, {needed} needed; "
            "ask for fewer shots, or for fewer items"
        )
    member.sampler.replace_df(pool)


def _reserved(member: ConfigurableTask, shots: int, examples: Sequence[str], items: Mapping[str, list[Item]]) -> int:
    """Return how many of the items must be left to the shots, where there are too few examples elsewhere."""
    if not shots:
        return 0
    outside = set(examples) - set(items)
    return shots + 1 if len(outside) < _examples(member, shots) else 0


def _examples(member: ConfigurableTask, shots: int) -> int:
    """Count the examples so many shots need: lm-eval draws one more where an item might be among its own examples."""
    draws_one_more = member.fewshot_cfg.split == member.config.test_split
    return shots + (draws_one_more and not isinstance(member.sampler, FirstNSampler))


def shots_of(member: ConfigurableTask, spec: TaskSpec) -> int:
    """Return the study's number of worked examples, or else the task's own; lm-eval puts none before a whole text."""
    if spec.shots is not None:
        return spec.shots
    own = member.config.num_fewshot or 0
    if type(own) is not int or own < 0:
        raise TaskError(f"task {spec.name}: num_fewshot must be a whole number, 0 or more; given {shortened(own)}")
    return 0 if member.OUTPUT_TYPE == "loglikelihood_rolling" else own


def _content_of_shot(member: ConfigurableTask, doc: Mapping[str, Any]) -> str:
    try:
        return content_of(member, doc)[0]
    except Exception:  # an example of another shape than the items is none of them
        return ""


def content_hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
