"""Forward passes as tensors: what a model reads together, where its logits are wanted, and what they predict.

Stands between `packing`, which says what goes together, and the engine, which reads it. Made once for all candidates.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from evals.packing import BLOCK, DEVICE_BLOCK, Pass, Row, Trie, build_trie, passes, rows
from evals.tokens import Pair
from evals.trie_attention import Plan


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward pass: B rows padded to N tokens, logits at Q of their nodes, P predicted tokens.

    Args:
        tokens: (B, N).
        depths: (1, N) positions in a trie's pass; None where rows are plain sequences.
        plan: of the attention in a trie's pass.
        nodes: (Q,) where logits are wanted, counted through the rows.
        source, target, request: (P,) of which of the Q, of which token, and whose log-likelihood it adds to.
        place: (P,) which token of the request's continuation it is.
        asks_greedy: (P,) whether it is asked if the token is the likeliest.
    """

    tokens: torch.Tensor
    depths: torch.Tensor | None
    plan: Plan | None
    nodes: torch.Tensor
    source: torch.Tensor
    target: torch.Tensor
    request: torch.Tensor
    place: torch.Tensor
    asks_greedy: torch.Tensor


def plain_batches(pairs: Mapping[int, Pair], token_budget: int, device: torch.device) -> list[Batch]:
    """Make batches of requests as rows that do not branch, of at most so many tokens or one row."""
    return [_batch_of_rows(batch, pairs, device) for batch in rows(pairs, token_budget)]


def packed_batches(pairs: Mapping[int, Pair], token_budget: int, device: torch.device) -> list[Batch]:
    """Cut the trie of all requests into passes of at most so many tokens."""
    trie = build_trie(pairs)
    block = BLOCK if device.type == "cpu" else DEVICE_BLOCK
    planned = [*passes(trie, token_budget, block), None]
    return [_batch_of_trie(trie, this, following, pairs, device) for this, following in pairwise(planned) if this]


def _batch_of_trie(
    trie: Trie, this: Pass, following: Pass | None, pairs: Mapping[int, Pair], device: torch.device
) -> Batch:
    first, last = (bisect_left(trie.predictions, (node,)) for node in (this.start, this.stop))
    return Batch(
        tokens=torch.tensor([trie.tokens[this.start : this.stop]], device=device),
        depths=torch.tensor([trie.depths[this.start : this.stop]], device=device),
        plan=Plan.of(trie, this, following, device),
        **_predicted(((node - this.start, *what) for node, *what in trie.predictions[first:last]), pairs, device),
    )


def _batch_of_rows(batch: Sequence[Row], pairs: Mapping[int, Pair], device: torch.device) -> Batch:
    width = len(batch[0].tokens)  # the longest comes first
    return Batch(
        tokens=torch.tensor([[*row.tokens, *[0] * (width - len(row.tokens))] for row in batch], device=device),
        depths=None,
        plan=None,
        **_predicted(
            ((r * width + node, *what) for r, row in enumerate(batch) for node, *what in row.predictions), pairs, device
        ),
    )


def _predicted(
    predictions: Iterable[tuple[int, ...]], pairs: Mapping[int, Pair], device: torch.device
) -> dict[str, torch.Tensor]:
    """Return what a batch predicts: of (node, request, which token of its continuation)."""
    wanted: dict[int, int] = {}
    found = [
        (wanted.setdefault(node, len(wanted)), pairs[request].continuation[i], request, i, pairs[request].asks_greedy)
        for node, request, i in predictions
    ]
    table = torch.tensor(found, dtype=torch.long, device=device).reshape(-1, 5)
    return {
        "nodes": torch.tensor([*wanted], dtype=torch.long, device=device),
        **dict(zip(("source", "target", "request", "place"), table[:, :4].unbind(1), strict=True)),
        "asks_greedy": table[:, 4].bool(),
    }
