"""From a model to outcomes: builds the requests of a study's tasks, and turns the engine's answers into outcomes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import jinja2
from lm_eval.api.instance import Instance

from evals.errors import TaskError, error_text
from evals.lm_asked import Answered, AskedItem, LoadedTask, Request
from evals.lm_outcomes import as_one_score, measured_outcome
from evals.lm_requests import Suite, TextToBase, by_kind, request_of, to_base
from evals.lm_split import Item, content_hash, right_choices
from evals.outcomes import CERTIFY, SUITES, Chat, Outcome, TaskInfo
from evals.packing import build_trie
from evals.tokens import Encoder, Pair, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from evals.engine import Engine


class Harness:
    """The tasks of a study, their items in disjoint suites, and the way from a model to outcomes."""

    def __init__(self, tasks: Sequence[LoadedTask], *, seed: int, chat: Chat) -> None:
        self.tasks = tuple(tasks)
        self._seed = seed
        self._chat = chat
        self._suites: dict[str, Suite] = {}
        self._parts: dict[tuple[str, tuple[tuple[str, tuple[str, ...]], ...]], Suite] = {}

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
        self._suites[suite] = Suite(tuple(items), encoder.prefix)

    def score(self, engine: Engine, suite: str, only: Mapping[str, Sequence[str]] | None = None) -> list[Outcome]:
        """Return one outcome per item of a suite, from the model as it is now.

        Args:
            only: of these tasks only these items, by hash; None: all. Items that are compared with the base need
                `read_base` before.

        Raises:
            ScoreError: the model gives numbers that are not finite.
        """
        prepared = self._suite(engine, suite, only)
        answers = iter(_answers(prepared, engine))
        measured = [
            measured_outcome(asked, [*islice(answers, len(asked.requests))], suite, engine.max_length)
            for asked in prepared.items
        ]
        return as_one_score(prepared.items, measured)

    def needs_base(self, engine: Engine, suite: str, only: Mapping[str, Sequence[str]] | None = None) -> bool:
        """Tell whether some items are compared with the base, which has not read them; arguments as `score`."""
        return bool(self._suite(engine, suite, only).unread_by_base(engine.max_length))

    def read_base(self, engine: Engine, suite: str, only: Mapping[str, Sequence[str]] | None = None) -> None:
        """Keep what the base says where it is compared with; it must be the engine's model. Arguments as `score`."""
        asked = self._suite(engine, suite, only)
        unread = asked.unread_by_base(engine.max_length)
        found = iter(engine.beliefs([*chain.from_iterable(unread)]) if unread else ())
        for windows in unread:
            asked.base[windows] = tuple(islice(found, len(windows)))

    def _suite(self, engine: Engine, suite: str, only: Mapping[str, Sequence[str]] | None) -> Suite:
        if suite not in self._suites:
            self.prepare(engine.tokenizer, suite)
        return self._suites[suite] if only is None else self._part(suite, only)

    def _part(self, suite: str, only: Mapping[str, Sequence[str]]) -> Suite:
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
            asked = tuple(
                request_of(instance, encoder, content_hash(f"{self._seed}:{item.hash}:{i}:{repeat}"))
                for i, instance in enumerate(instances)
                for repeat in range(repeats)
            )
        except Exception as error:  # templates, examples and task code raise whatever they like
            raise TaskError(f"task {task.info.name}, item {item.hash}: {error_text(error)}") from error
        return tuple(map(to_base, asked)) if task.info.is_to_base else asked

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
        pairs, texts, prompts = by_kind(self._suites[suite].of(task))
        return (
            len(build_trie(dict(enumerate(pairs))))
            + sum(len(text.tokens) for text in texts)
            + sum(len(prompt.tokens) + prompt.max_new_tokens for prompt in prompts)
        )


def _range(numbers: Sequence[int]) -> int | str:
    """Write one number, or the least and the largest of several."""
    low, high = min(numbers), max(numbers)
    return low if low == high else f"{low} to {high}"


def _answers(suite: Suite, engine: Engine) -> list[Answered]:
    """Return the engine's answer to every request, in their order."""
    reading = suite.reading(engine.max_length)
    pairs, _, prompts = by_kind(suite.requests)
    compared = iter(_answers_to_base(suite, engine, reading.to_base))
    scores = engine.loglikelihoods(reading.pairs)
    of_pairs, of_windows = iter(scores[: len(pairs)]), iter(scores[len(pairs) :])
    of_texts = (math.fsum(score for score, _ in islice(of_windows, count)) for count in reading.windows)
    written = iter(engine.generate(prompts))

    def answer(request: Request) -> Answered:
        if isinstance(request.encoded, Pair):
            return Answered(next(of_pairs), request.length)
        if isinstance(request.encoded, TextToBase):
            return Answered(next(compared), request.length)
        if isinstance(request.encoded, Text):
            return Answered(next(of_texts), request.length)
        made = next(written)
        return Answered(made.text, made.tokens, broken_off=not made.ended, text=made.text)

    return [answer(request) for request in suite.requests]


def _answers_to_base(suite: Suite, engine: Engine, texts: Sequence[tuple[Pair, ...]]) -> list[float]:
    """Return the mean log-likelihood in nats of what the base expects of each text: minus its entropy and the KL."""
    assert all(text in suite.base for text in texts), "the base has read them"
    beliefs = [held for text in texts for held in suite.base[text]]
    found = iter(engine.agreements([*chain.from_iterable(texts)], beliefs) if texts else ())
    return [
        math.fsum(islice(found, len(text))) - math.fsum(float(held.entropy.double().sum()) for held in suite.base[text])
        for text in texts
    ]


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
