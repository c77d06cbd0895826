"""From lm-eval's instances to what a model is given: requests with their tokens, and a suite of them as it is read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING

from lm_eval.api.instance import Instance
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from evals.errors import TaskError
from evals.lm_asked import AskedItem, LoadedTask, Request
from evals.lm_metric import sampling_of
from evals.tokens import Encoder, Pair, Prompt, Text

if TYPE_CHECKING:
    from evals.teachers import Beliefs


@dataclass(frozen=True, slots=True)
class TextToBase(Text):
    """A text of which the predictions are compared with the base's."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What a model of one length is given of a suite.

    Args:
        pairs: the suite's pairs, then the windows of its texts.
        windows: how many windows each text has.
        to_base: the windows of each text that is compared with the base.
    """

    pairs: tuple[Pair, ...]
    windows: tuple[int, ...]
    to_base: tuple[tuple[Pair, ...], ...]


@dataclass(frozen=True, slots=True)
class Suite:
    """A suite's items in the order they are scored, with all their requests."""

    items: tuple[AskedItem, ...]
    prefix: int
    readings: dict[int, Reading] = field(default_factory=dict)
    base: dict[tuple[Pair, ...], tuple[Beliefs, ...]] = field(default_factory=dict)  # what it says, by text

    @property
    def requests(self) -> Iterator[Request]:
        """All requests, in the order of the items."""
        return (request for asked in self.items for request in asked.requests)

    def of(self, task: LoadedTask) -> list[Request]:
        """Return the requests of one task."""
        return [request for asked in self.items if asked.task is task for request in asked.requests]

    def part(self, only: Mapping[str, Sequence[str]]) -> Suite:
        """Return some of the items of some tasks, by hash."""
        wanted = {(name, item) for name, items in only.items() for item in items}
        found = tuple(asked for asked in self.items if (asked.task.info.name, asked.item.hash) in wanted)
        return Suite(found, self.prefix, base=self.base)

    def unread_by_base(self, max_length: int) -> list[tuple[Pair, ...]]:
        """Return the texts that are compared with the base, and that it has not read yet, each as its windows."""
        return [windows for windows in self.reading(max_length).to_base if windows not in self.base]

    def reading(self, max_length: int) -> Reading:
        """Return what a model of that length reads, made once for all candidates."""
        if max_length not in self.readings:
            pairs, texts, _ = by_kind(self.requests)
            cut = [(text, windows_of(text, self.prefix, max_length)) for text in texts]
            windows = [pieces for text, pieces in cut if not isinstance(text, TextToBase)]
            to_base = tuple(pieces for text, pieces in cut if isinstance(text, TextToBase))
            read = (*pairs, *chain.from_iterable(windows))
            self.readings[max_length] = Reading(read, tuple(map(len, windows)), to_base)
        return self.readings[max_length]


def request_of(instance: Instance, encoder: Encoder, seed: str) -> Request:
    """Make a request of an instance, with its tokens.

    Args:
        seed: of an answer that is sampled, hexadecimal.
    """
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


def to_base(request: Request) -> Request:
    """Let a text's predictions be compared with the base's."""
    assert isinstance(request.encoded, Text), "only whole texts are"
    return replace(request, encoded=TextToBase(request.encoded.tokens))


def by_kind(requests: Iterable[Request]) -> tuple[list[Pair], list[Text], list[Prompt]]:
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
