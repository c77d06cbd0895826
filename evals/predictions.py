"""From hidden states at the wanted nodes of a batch to what they predict, a few rows of logits at a time.

Logits of a whole batch would be the largest tensor of all: rows times the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint

from evals.batches import Batch
from evals.teachers import Beliefs, Taught

LOGIT_BYTES = {"cpu": 24 * 2**20}  # float32 logits made at a time: malloc maps anew, and clears, what is above 32 MiB
LOGIT_BYTES_ELSEWHERE = 2**28
CACHED_ROWS = 32  # of which the log-sum is taken at a time: they stay in a CPU's cache, so it takes a third as long


@dataclass(frozen=True, slots=True)
class Predictions:
    """What batches predict, of the states (Q, width) at the nodes where logits are wanted.

    Args:
        logits: of states, or the logits themselves.
        vocabulary: tokens.
    """

    logits: Callable[[torch.Tensor], torch.Tensor]
    vocabulary: int

    def scores(self, batch: Batch, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log-probabilities of the targets (P,) in float32, and which are the likeliest tokens, if asked (P,).

        Args:
            states: what logits are made of at the wanted nodes, hidden states or the logits themselves (Q, width).
        """
        step = self._rows_at_once(states.device)
        chosen = torch.empty(len(batch.target), dtype=torch.float32, device=states.device)
        best = torch.zeros(len(batch.target), dtype=torch.bool, device=states.device)
        for start in range(0, len(states), step):
            logits = self.logits(states[start : start + step]).float()  # (step, V)
            wanted = ((batch.source >= start) & (batch.source < start + step)).nonzero()[:, 0]
            source, target = batch.source[wanted] - start, batch.target[wanted]
            highest, norms = map(torch.cat, zip(*map(_highest_and_norm, logits.split(CACHED_ROWS)), strict=True))
            chosen[wanted] = logits[source, target] - norms[source]
            asked = batch.asks_greedy[wanted]
            best[wanted[asked]] = _is_first_best(logits, highest, source[asked], target[asked])
        return chosen, best

    def logprobs(self, batch: Batch, states: torch.Tensor) -> torch.Tensor:
        """Return log-probabilities of the targets (P,) in float32, with gradients; the way back makes logits anew."""

        def part(rows: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return _exact(self.logits(rows)).log_softmax(-1)[source, target]

        step = self._rows_at_once(states.device)
        found, order = [], []
        for start in range(0, len(states), step):
            wanted = ((batch.source >= start) & (batch.source < start + step)).nonzero()[:, 0]
            given = states[start : start + step], batch.source[wanted] - start, batch.target[wanted]
            found.append(checkpoint(part, *given, use_reentrant=False))
            order.append(wanted)
        return torch.cat(found)[torch.cat(order).argsort()]

    def agreements(self, batch: Batch, states: torch.Tensor, *, taught: Taught) -> torch.Tensor:
        """Return minus the divergence at every predicted token (P,), with gradients, which make logits anew."""

        def part(rows: torch.Tensor, beliefs: Beliefs) -> torch.Tensor:
            return -beliefs.divergences(_exact(self.logits(rows)))

        step = self._rows_at_once(states.device)
        tokens = zip(*(x.split(step) for x in (batch.source, batch.request, batch.place)), strict=True)
        found = [
            checkpoint(part, states[source], taught.at(request, place), use_reentrant=False)
            for source, request, place in tokens
        ]
        return torch.cat(found)

    def beliefs(self, batch: Batch, states: torch.Tensor) -> Beliefs:
        """Find what is held likely at every predicted token, P of them; kept in the CPU's memory."""
        parts = states.split(self._rows_at_once(states.device))
        return Beliefs.join([Beliefs.of(_exact(self.logits(part))).to("cpu") for part in parts]).at(batch.source.cpu())

    def _rows_at_once(self, device: torch.device) -> int:
        size = LOGIT_BYTES.get(device.type, LOGIT_BYTES_ELSEWHERE)
        return max(1, size // (4 * self.vocabulary))


def _exact(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _highest_and_norm(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the maximum of each row, and the logarithm of its exponentials' sum, in two readings of the row."""
    highest = logits.amax(-1)
    return highest, highest + (logits - highest[:, None]).exp_().sum(-1).log()


def _is_first_best(
    logits: torch.Tensor, highest: torch.Tensor, source: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    """Tell whether target p is what argmax gives in row source[p] of the logits: (P,).

    argmax over a vocabulary takes ten times as long as its maximum, so only rows whose maximum is a target are asked.
    """
    best = logits[source, target] == highest[source]
    best[best.clone()] = logits[source[best]].argmax(-1) == target[best]  # of equal ones the first
    return best
