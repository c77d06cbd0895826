"""From text to token ids, by the rules of lm-eval's HFLM, so that log-likelihoods are of the same tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from evals.errors import TaskError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Pair:
    """A continuation to be scored after its context, both as token ids and neither empty.

    Args:
        asks_greedy: whether it matters that greedy decoding would give the continuation; for whole texts it does not.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    asks_greedy: bool = True

    def cut(self, max_length: int) -> Pair:
        """Cut the context on the left, as lm-eval does, so that the model's input fits."""
        if len(self.continuation) > max_length:
            raise TaskError(
                f"a continuation must fit in the context: {len(self.continuation)} tokens given, the model reads "
                f"{max_length}"
            )
        room = max_length + 1 - len(self.continuation)
        return replace(self, context=self.context[-room:])

    def fits(self, max_length: int) -> bool:
        """Tell whether a model of that length reads all of the context."""
        return len(self.context) + len(self.continuation) <= max_length + 1


@dataclass(frozen=True, slots=True)
class Text:
    """A text of which every token is scored; one that is longer than the model reads is scored in windows."""

    tokens: tuple[int, ...]

    def fits(self, max_length: int) -> bool:
        """Return true: windows leave nothing out, whatever the length."""
        return True


@dataclass(frozen=True, slots=True)
class Sampling:
    """How an answer is drawn.

    Args:
        temperature: above 0.
        top_k: of the likeliest tokens only so many; 0: all.
        top_p: of the likeliest tokens only as many as have this share together; 1: all.
        seed: of 64 bits: the same gives the same draws, whatever stands beside it.
    """

    temperature: float
    top_k: int
    top_p: float
    seed: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text to be continued, greedily or by draws.

    Args:
        tokens: the prompt's ids.
        stop: strings at the first of which the answer ends.
        max_new_tokens: at most so many tokens are made.
        sampling: None: the likeliest token each time.
    """

    tokens: tuple[int, ...]
    stop: tuple[str, ...]
    max_new_tokens: int
    sampling: Sampling | None = None

    def fits(self, max_length: int) -> bool:
        """Tell whether a model of that length reads the whole prompt and has room for the longest answer."""
        return len(self.tokens) + self.max_new_tokens <= max_length


class Encoder:
    """The tokenizer of one model, used as lm-eval uses it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if prefix is None:
            raise TaskError("the tokenizer needs a begin or end token: texts without a context are scored after it")
        self.prefix: int = prefix
        self._prefix_text = str(tokenizer.decode([prefix]))

    def text(self, text: str) -> tuple[int, ...]:
        """Return a text's ids, with the tokenizer's special tokens unless the text itself starts with the first."""
        if text.startswith(self._prefix_text):
            return tuple(self.tokenizer.encode(text, add_special_tokens=False))
        return tuple(self.tokenizer.encode(text))

    def pair(self, context: str, continuation: str) -> Pair:
        """Return the ids of a context and what follows it; spaces at the seam belong to the continuation."""
        if context:
            kept = context.rstrip()
            whole, head = self.text(context + continuation), self.text(kept)
            pair = Pair(head, whole[len(head) :])
        else:
            tokens = tuple(self.tokenizer.encode(continuation, add_special_tokens=False))
            pair = Pair(tokens[:1], tokens[1:]) if tokens[:1] == (self.prefix,) else Pair((self.prefix,), tokens)
        if not pair.context or not pair.continuation:
            raise TaskError(
                f"context and continuation must each have a token: {context[-40:]!r} and {continuation[:40]!r} given"
            )
        return pair
