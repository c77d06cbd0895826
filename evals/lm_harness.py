"""From a model to outcomes: builds the requests of a study's tasks, and turns the engine's answers into outcomes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import jinja2
from lm_eval.api.instance import Instance
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from evals.errors import TaskError, error_text
from evals.lm_asked import Answered, AskedItem, LoadedTask, Request
from evals.lm_metric import sampling_of
from evals.lm_outcomes import as_one_score, measured_outcome
from evals.lm_split import Item, content_hash, right_choices
from evals.outcomes import CERTIFY, SUITES, Chat, Outcome, TaskInfo
from evals.packing import build_trie
from evals.tokens import Encoder, Pair, Prompt, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from evals.engine import Engine


@dataclass(frozen=True, slots=True)
class _Reading:
    """What a model of one length is given of a suite.

    Args:
        pairs: the suite's pairs, then the windows of its texts.
        windows: how many windows each text has.
    """

    pairs: tuple[Pair, ...]
    windows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Suite:
    """A suite's items in the order they are scored, with all their requests."""

    items: tuple[AskedItem, ...]
    prefix: int
    readings: dict[int, _Reading] = field(default_factory=dict)

    @property
    def requests(self) -> Iterator[Request]:
        """All requests, in the order of the items."""
        return (request for asked in self.items for request in asked.requests)

    def of(self, task: LoadedTask) -> list[Request]:
        """Return the requests of one task."""
        return [request for asked in self.items if asked.task is task for request in asked.requests]

    def part(self, only: Mapping[str, Sequence[str]]) -> _Suite:
        """Return some of the items of some tasks, by hash."""
        wanted = {(name, item) for name, items in only.items() for item in items}
        found = tuple(asked for asked in self.items if (asked.task.info.name, asked.item.hash) in wanted)
        return _Suite(found, self.prefix)

    def reading(self, max_length: int) -> _Reading:
        """Return what a model of that length reads, made once for all candidates."""
        if max_length not in self.readings:
            pairs, texts, _ = _by_kind(self.requests)
            windows = [windows_of(text, self.prefix, max_length) for text in texts]
            self.readings[max_length] = _Reading((*pairs, *chain.from_iterable(windows)), tuple(map(len, windows)))
        return self.readings[max_length]


class Harness:
    """The tasks of a study, their items in disjoint suites, and the way from a model to outcomes."""

    def __init__(self, tasks: Sequence[LoadedTask], *, seed: int, chat: Chat) -> None:
        self.tasks = tuple(tasks)
        self._seed = seed
        self._chat = chat
        self._suites: dict[str, _Suite] = {}
        self._parts: dict[tuple[str, tuple[tuple[str, tuple[str, ...]], ...]], _Suite] = {}

    @property
    def infos(self) -> tuple[TaskInfo, ...]:
        """What was found, in the order the tasks were asked for."""
        return tuple(task.info for task in self.tasks)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person might not expect of the tasks, a sentence each."""
        return tuple(note for task in self.tasks for note in task.notes)

    def suite_hash(self, suite: str) -> dict[str, list[str]]:
        """Return the item hashes of a suite by task, in the order they are scored."""
        return {task.info.name: [item.hash for item in task.items[suite]] for task in self.tasks}

    def certify_order(self) -> tuple[dict[str, list[str]], dict[str, tuple[int, ...]]]:
        """Return the hashes of the items for certificates by task, in the order they are bet on, and for a task whose
        items share passages how many there are of each: these stand together, in an order that knows no sizes."""
        order, sizes = self.suite_hash(CERTIFY), {}
        for task in self.tasks:
            units: dict[str, list[str]] = {}
            for item in task.items[CERTIFY]:
                units.setdefault(item.cluster or item.hash, []).append(item.hash)
            if len(units) < len(order[task.info.name]):
                groups = [units[unit] for unit in sorted(units)]
                order[task.info.name] = [item for group in groups for item in group]
                sizes[task.info.name] = tuple(map(len, groups))
        return order, sizes

    def prepare(self, tokenizer: PreTrainedTokenizerBase, suite: str) -> None:
        """Build and tokenise a suite's requests, once for all candidates."""
        encoder = Encoder(tokenizer)
        items = [
            AskedItem(
                task, item, self._requests(task, item, encoder), right_choices(task.members[item.member], item.doc)
            )
            for task in self.tasks
            for item in task.items[suite]
        ]
        self._suites[suite] = _Suite(tuple(items), encoder.prefix)

    def score(self, engine: Engine, suite: str, only: Mapping[str, Sequence[str]] | None = None) -> list[Outcome]:
        """Return one outcome per item of a suite, from the model as it is now.

        Args:
            only: of these tasks only these items, by hash; None: all.

        Raises:
            ScoreError: the model gives numbers that are not finite.
        """
        if suite not in self._suites:
            self.prepare(engine.tokenizer, suite)
        prepared = self._suites[suite] if only is None else self._part(suite, only)
        answers = iter(_answers(prepared, engine))
        measured = [
            measured_outcome(asked, [*islice(answers, len(asked.requests))], suite, engine.max_length)
            for asked in prepared.items
        ]
        return as_one_score(prepared.items, measured)

    def _part(self, suite: str, only: Mapping[str, Sequence[str]]) -> _Suite:
        """Give a part of a prepared suite, kept, since all candidates are scored on the same draw from a bank."""
        key = suite, tuple((task, tuple(items)) for task, items in sorted(only.items()))
        if key not in self._parts:
            self._parts[key] = self._suites[suite].part(only)
        return self._parts[key]

    def request_hashes(self) -> dict[str, dict[str, str]]:
        """Hash for each prepared suite and task all that is asked: items, shots, templates, limits; 16 hex digits."""
        return {
            suite: {
                task.info.name: content_hash(repr([request.instance.args for request in prepared.of(task)]))
                for task in self.tasks
            }
            for suite, prepared in sorted(self._suites.items())
        }

    def requests(self, suite: str) -> list[Instance]:
        """Return what a prepared suite asks, as lm-eval's own instances in the order of the items."""
        return [request.instance for request in self._suites[suite].requests]

    def pairs(self, suite: str, max_length: int) -> tuple[Pair, ...]:
        """Return what a prepared suite reads in order to score it: all but the prompts of answers that are written."""
        return self._suites[suite].reading(max_length).pairs

    def asked(self, suite: str) -> tuple[AskedItem, ...]:
        """Return the items of a prepared suite with their requests, in the order they are scored."""
        return self._suites[suite].items

    def describe(self) -> list[dict[str, Any]]:
        """Return a row per task for people: what it is, and the tokens a candidate reads by suite (if prepared)."""
        return [
            {
                "task": task.info.name,
                "role": task.info.role,
                "expert": task.info.expert,
                "kind": task.info.output_type,
                "metric": task.info.metric,
                "chance": task.info.chance,
                "shots": _range(task.shots),
                "shots_from": task.shots_from,
                "drawn_items": task.info.drawn_items,
                **{f"{suite}_items": len(task.items[suite]) for suite in SUITES},
                "certify_items": len(task.items[CERTIFY]),
                "certify_largest": max(Counter(i.cluster or i.hash for i in task.items[CERTIFY]).values(), default=1),
                **{f"{suite}_tokens": self._tokens(task, suite) for suite in SUITES},
            }
            for task in self.tasks
        ]

    def _requests(self, task: LoadedTask, item: Item, encoder: Encoder) -> tuple[Request, ...]:
        try:
            instances = self._instances(task, item, encoder.tokenizer)
            repeats = task.repeats(item.member)
            return tuple(
                _request(instance, encoder, content_hash(f"{self._seed}:{item.hash}:{i}:{repeat}"))
                for i, instance in enumerate(instances)
                for repeat in range(repeats)
            )
        except Exception as error:  # templates, examples and task code raise whatever they like
            raise TaskError(f"task {task.info.name}, item {item.hash}: {error_text(error)}") from error

    def _instances(self, task: LoadedTask, item: Item, tokenizer: PreTrainedTokenizerBase) -> list[Instance]:
        member = task.members[item.member]
        member.set_fewshot_seed(
            int(content_hash(f"{self._seed}:{item.hash}"), 16)
        )  # an item's shots do not depend on its neighbours
        context = member.fewshot_context(
            doc=item.doc,
            num_fewshot=task.shots[item.member],
            system_instruction=self._chat.system or None,
            apply_chat_template=self._chat.template,
            fewshot_as_multiturn=self._chat.template and self._chat.multiturn,
            chat_template=partial(_chat, tokenizer) if self._chat.template else None,
            gen_prefix=member.doc_to_prefix(item.doc),
        )
        asked = member.construct_requests(
            doc=item.doc,
            ctx=context,
            metadata=(task.info.name, 0, 1),
            apply_chat_template=self._chat.template,
        )
        return asked if isinstance(asked, list) else [asked]

    def _tokens(self, task: LoadedTask, suite: str) -> int | None:
        """Count about how many tokens a candidate reads; exact but for texts longer than the model's context."""
        if suite not in self._suites:
            return None
        pairs, texts, prompts = _by_kind(self._suites[suite].of(task))
        return (
            len(build_trie(dict(enumerate(pairs))))
            + sum(len(text.tokens) for text in texts)
            + sum(len(prompt.tokens) + prompt.max_new_tokens for prompt in prompts)
        )


def _range(numbers: Sequence[int]) -> int | str:
    """Write one number, or the least and the largest of several."""
    low, high = min(numbers), max(numbers)
    return low if low == high else f"{low} to {high}"


def _request(instance: Instance, encoder: Encoder, seed: str) -> Request:
    if instance.request_type == "loglikelihood":
        pair = encoder.pair(*instance.args)
        return Request(instance, pair, len(pair.continuation))
    if instance.request_type == "loglikelihood_rolling":
        tokens = encoder.text(*instance.args)
        if not tokens:
            raise TaskError("a text must have a token")
        return Request(instance, Text(tokens), len(tokens))
    text, given = instance.args
    options = normalize_gen_kwargs(given)
    sampling = sampling_of(options, int(seed, 16) >> 1)  # torch takes 63 bits
    return Request(instance, Prompt(encoder.text(text), tuple(options["until"]), options["max_gen_toks"], sampling), 0)


def _by_kind(requests: Iterable[Request]) -> tuple[list[Pair], list[Text], list[Prompt]]:
    """Return what the requests ask, the kinds apart, each in the order of the requests."""
    asked = [request.encoded for request in requests]
    return (
        [pair for pair in asked if isinstance(pair, Pair)],
        [text for text in asked if isinstance(text, Text)],
        [prompt for prompt in asked if isinstance(prompt, Prompt)],
    )


def windows_of(text: Text, prefix: int, length: int) -> tuple[Pair, ...]:
    """Cut a text into the pieces in which lm-eval predicts every token once, each after as much context as fits."""
    windows = get_rolling_token_windows(list(text.tokens), prefix_token=prefix, max_seq_len=length, context_len=1)
    pieces = map(make_disjoint_window, windows)
    return tuple(Pair(tuple(context), tuple(tokens), asks_greedy=False) for context, tokens in pieces)


def _answers(suite: _Suite, engine: Engine) -> list[Answered]:
    """Return the engine's answer to every request, in their order."""
    reading = suite.reading(engine.max_length)
    pairs, _, prompts = _by_kind(suite.requests)
    scores = engine.loglikelihoods(reading.pairs)
    of_pairs, of_windows = iter(scores[: len(pairs)]), iter(scores[len(pairs) :])
    of_texts = (math.fsum(score for score, _ in islice(of_windows, count)) for count in reading.windows)
    written = iter(engine.generate(prompts))

    def answer(request: Request) -> Answered:
        if isinstance(request.encoded, Pair):
            return Answered(next(of_pairs), request.length)
        if isinstance(request.encoded, Text):
            return Answered(next(of_texts), request.length)
        made = next(written)
        return Answered(made.text, made.tokens, broken_off=not made.ended, text=made.text)

    return [answer(request) for request in suite.requests]


def _chat(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], add_generation_prompt: bool = True
) -> str:
    """Write a conversation as lm-eval renders it: without the system message where a template refuses one."""

    def render(kept: list[dict[str, str]]) -> str:
        return str(
            tokenizer.apply_chat_template(
                kept,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    try:
        return render(messages)
    except jinja2.TemplateError:
        return render([message for message in messages if message["role"] != "system"])
