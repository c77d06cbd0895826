"""From a suite's requests to what weights are learned from: each item as a differentiable loss."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from evals.errors import TaskError
from evals.lm_asked import AskedItem
from evals.lm_harness import Harness
from evals.lm_outcomes import bytes_of
from evals.lm_requests import windows_of
from evals.lm_split import choice_index, content_hash
from evals.losses import Example
from evals.plain_text import read_pieces
from evals.tokens import Pair, Prompt, Text

if TYPE_CHECKING:
    from evals.engine import Engine

CALIBRATION_ITEMS = 100  # of a text, some 15,000 tokens
SIZES = {"acc_norm": len, "acc_bytes": lambda choice: len(choice.encode("utf-8"))}  # as lm-eval measures a choice


def examples(harness: Harness, suite: str, engine: Engine) -> list[Example]:
    """Make what a suite teaches: one example for each item, in the order they are scored.

    Raises:
        TaskError: an item has no right answer to learn from.
    """
    return [_example(asked, engine) for asked in harness.asked(suite)]


def text_examples(path: Path, engine: Engine) -> list[Example]:
    """Make examples of a plain text: its items, or `CALIBRATION_ITEMS` of them in equal steps where it has more.

    Raises:
        TaskError: as of `read_pieces`.
    """
    pieces = read_pieces(path)
    chosen = [pieces[i * len(pieces) // CALIBRATION_ITEMS] for i in range(min(len(pieces), CALIBRATION_ITEMS))]
    return [_of_piece(piece.text, engine) for piece in (chosen if len(pieces) > CALIBRATION_ITEMS else pieces)]


def _of_piece(text: str, engine: Engine) -> Example:
    windows = windows_of(Text(engine.encoder.text(text)), engine.encoder.prefix, engine.max_length)
    return Example("text", content_hash(text), windows, (), (), float(len(text.encode())))


def _example(asked: AskedItem, engine: Engine) -> Example:
    encoded = [request.encoded for request in asked.requests]
    first = encoded[0]
    if isinstance(first, Text):
        return _of_text(asked, windows_of(first, engine.encoder.prefix, engine.max_length))
    if isinstance(first, Prompt):
        return _of_reference(asked, engine)
    return _of_choices(asked, [pair for pair in encoded if isinstance(pair, Pair)])


def _of_text(asked: AskedItem, windows: tuple[Pair, ...]) -> Example:
    member, info = asked.task.members[asked.item.member], asked.task.info
    if info.is_to_base:
        tokens = float(sum(len(window.continuation) for window in windows))
        return Example(info.name, asked.item.hash, windows, (), (), tokens, to_base=True)
    _, size = bytes_of(member, asked.item, member.process_results(asked.item.doc, [0.0]), 0.0)
    return Example(info.name, asked.item.hash, windows, (), (), float(size))


def _of_choices(asked: AskedItem, pairs: list[Pair]) -> Example:
    task, member, doc = asked.task, asked.task.members[asked.item.member], asked.item.doc
    if member.OUTPUT_TYPE != "multiple_choice":  # one continuation and its log-likelihood
        return Example(task.info.name, asked.item.hash, tuple(pairs), (), (), float(len(pairs[0].continuation)))
    choices = member.doc_to_choice(doc)
    gold = member.doc_to_text(doc) if member.multiple_input else member.doc_to_target(doc)
    right = {choice_index(answer, choices) for answer in (gold if isinstance(gold, list) else [gold])}
    size = SIZES.get(task.info.metric)
    lengths = tuple(float(size(choice)) if size else 1.0 for choice in choices)
    taught = tuple(pairs[: len(choices)])  # acc_mutual_info also asks for the choices by themselves
    return Example(task.info.name, asked.item.hash, taught, tuple(sorted(right)), lengths, 1.0)


def _of_reference(asked: AskedItem, engine: Engine) -> Example:
    task, member, doc = asked.task, asked.task.members[asked.item.member], asked.item.doc
    target = member.doc_to_target(doc)
    target = target[0] if isinstance(target, list) and target else target
    if isinstance(target, int) and member.config.doc_to_choice is not None:
        target = member.doc_to_choice(doc)[target]
    if not isinstance(target, str) or not target.strip():
        raise TaskError(f"task {task.info.name}, item {asked.item.hash}: it has no reference to learn from")
    context = str(asked.requests[0].instance.args[0])
    pair = engine.encoder.pair(context, f"{member.config.target_delimiter}{target}")
    return Example(task.info.name, asked.item.hash, (pair,), (), (), float(len(pair.continuation)))
