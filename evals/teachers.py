"""What a teacher model holds likely at each token of a text, kept small, and how far a candidate is from it.

Beside the likeliest tokens all the rest is one event, so that a divergence is one over the whole vocabulary; it is at
most what the full one is. Kept instead of read anew in each step: that would cost a merge and a forward pass a step,
and while a step lasts 4 bytes for each token of the vocabulary at each position, where this is 520 bytes in all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate

import torch

from evals.tokens import Pair

LIKELIEST = 64  # tokens kept at each position
BYTES_PER_TOKEN = 8 * LIKELIEST + 8


@dataclass(frozen=True, slots=True, eq=False)
class Beliefs:
    """A teacher's log-probabilities in nats at T positions, such as those that predict a pair's continuation.

    Args:
        tokens: (T, k) the likeliest, int32.
        logprobs: (T, k) theirs, float32.
        rest: (T,) of all other tokens together, float32.
        entropy: (T,) of the whole distribution in nats, float32.
    """

    tokens: torch.Tensor
    logprobs: torch.Tensor
    rest: torch.Tensor
    entropy: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor) -> Beliefs:
        """Take the beliefs from logits (T, V), with k = 64 or all but one token of a smaller vocabulary."""
        logprobs = logits.log_softmax(-1)
        top, tokens = logprobs.topk(min(LIKELIEST, logits.shape[-1] - 1), dim=-1)
        rest = logprobs.scatter(-1, tokens, -torch.inf).logsumexp(-1)
        entropy = torch.special.entr(logprobs.exp()).sum(-1)
        return cls(tokens.to(torch.int32), top.float(), rest.float(), entropy.float())

    @classmethod
    def join(cls, parts: Sequence[Beliefs]) -> Beliefs:
        """Put beliefs one after another."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def at(self, positions: torch.Tensor) -> Beliefs:
        """Return those at some positions, (n,)."""
        return self._each(lambda part: part[positions])

    def to(self, device: torch.device | str) -> Beliefs:
        """Return the same on a device."""
        return self._each(lambda part: part.to(device))

    def split(self, sizes: Sequence[int]) -> list[Beliefs]:
        """Take them apart again, so many positions each."""
        ends = list(accumulate(sizes))
        return [self.at(torch.arange(end - size, end)) for size, end in zip(sizes, ends, strict=True)]

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Beliefs:
        return Beliefs(*(change(getattr(self, field.name)) for field in fields(self)))

    def divergences(self, logits: torch.Tensor) -> torch.Tensor:
        """Return KL(teacher || candidate) in nats at each position, (T,), from the candidate's logits (T, V)."""
        tokens, norms = self.tokens.long(), logits.logsumexp(-1)
        top = logits.gather(-1, tokens) - norms[:, None]
        rest = logits.scatter(-1, tokens, -torch.inf).logsumexp(-1) - norms  # 1 - sum would lose what is near 0
        of_top, of_rest = self.logprobs.to(logits.dtype), self.rest.to(logits.dtype)
        return (of_top.exp() * (of_top - top)).sum(-1) + of_rest.exp() * (of_rest - rest)


@dataclass(frozen=True, slots=True)
class Taught:
    """The beliefs of all requests one after another, and where each request's begin."""

    beliefs: Beliefs
    starts: torch.Tensor

    @classmethod
    def of(cls, pairs: Sequence[Pair], beliefs: Sequence[Beliefs]) -> Taught:
        sizes = [len(pair.continuation) for pair in pairs]
        assert sizes == [len(part.rest) for part in beliefs], "beliefs are of these pairs"
        return cls(Beliefs.join(beliefs), torch.tensor([0, *sizes[:-1]]).cumsum(0))

    def at(self, request: torch.Tensor, place: torch.Tensor) -> Beliefs:
        """Return those at tokens of the continuations, given each one's request and its place there, (n,)."""
        return self.beliefs.at(self.starts[request.cpu()] + place.cpu()).to(request.device)
