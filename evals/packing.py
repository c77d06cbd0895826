"""Which tokens the model reads together: sequences become tries, tries become rows, rows become batches.

A trie holds each shared prefix once: the context of an item's choices, the shots of a task, the first words of two
sentences. Its nodes stand in depth-first order, so that a node's descendants are a contiguous range and "j is an
ancestor of i" is two comparisons. No torch here: plans are made once for a suite and serve every candidate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from evals.tokens import Pair

ROW_TOKENS = 128  # attention costs the square of a row; 64 to 256 measured within a tenth on a CPU, 128 best
BATCH_ROWS_ALIKE = 0.9  # the shortest row of a batch is at least this share of its longest


@dataclass(slots=True)
class Row:
    """Sequences that the model reads at once, as a trie of N nodes in depth-first order.

    Args:
        tokens: (N,) token ids.
        depths: (N,) positions; the root is 0.
        ends: (N,) node i is read by nodes i to ends[i] - 1.
        requests: whose continuations are predicted here, with the nodes that predict their tokens in order.
    """

    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    requests: list[tuple[int, list[int]]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Sequence:
    request: int
    tokens: tuple[int, ...]  # the model's input: the context and all but the last token of the continuation
    first: int  # the position that predicts the first token of the continuation


def plan(pairs: Sequence[Pair], *, token_budget: int, branching: bool) -> list[list[Row]]:
    """Batches of rows that predict every pair.

    Args:
        pairs: already cut to the model's length.
        token_budget: a batch holds at most so many tokens, padding included, or one row.
        branching: rows may branch; else each row is one sequence (which may hold others that are its prefixes).
    """
    sequences = sorted(
        (_Sequence(i, pair.context + pair.continuation[:-1], len(pair.context) - 1) for i, pair in enumerate(pairs)),
        key=lambda sequence: (sequence.tokens, sequence.request),
    )
    rows = [_trie(group) for group in (_branching if branching else _paths)(sequences, token_budget)]
    return list(_batches(rows, token_budget))


def _paths(sequences: Sequence[_Sequence], token_budget: int) -> Iterator[list[_Sequence]]:
    """Runs of sequences in which each is a prefix of the next."""
    group: list[_Sequence] = []
    for sequence in sequences:
        if group and sequence.tokens[: len(group[-1].tokens)] != group[-1].tokens:
            yield group
            group = []
        group.append(sequence)
    if group:
        yield group


def _branching(sequences: Sequence[_Sequence], token_budget: int) -> Iterator[list[_Sequence]]:
    """Runs of sequences for one row each; kin (with half their tokens in common) stay together where they fit."""
    group: list[_Sequence] = []
    size = 0
    for kin in _kin(sequences):
        longest = max(len(sequence.tokens) for sequence in kin)
        room = max(longest, min(max(ROW_TOKENS, 2 * longest), token_budget))
        if group and size + _growth(group[-1:] + kin) > room:
            yield group
            group, size = [], 0
        for sequence in kin:
            growth = _growth([*group[-1:], sequence]) if group else len(sequence.tokens)
            if group and size + growth > room:
                yield group
                group, size, growth = [], 0, len(sequence.tokens)
            group.append(sequence)
            size += growth
    if group:
        yield group


def _kin(sequences: Sequence[_Sequence]) -> Iterator[list[_Sequence]]:
    kin: list[_Sequence] = []
    for sequence in sequences:
        if kin and 2 * _common(kin[-1].tokens, sequence.tokens) < len(sequence.tokens):
            yield kin
            kin = []
        kin.append(sequence)
    if kin:
        yield kin


def _growth(sequences: Sequence[_Sequence]) -> int:
    """Nodes that all but the first sequence add to a trie that ends in the first."""
    return sum(len(after.tokens) - _common(before.tokens, after.tokens) for before, after in pairwise(sequences))


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i])


def _trie(sequences: Sequence[_Sequence]) -> Row:
    row = Row()
    path: list[int] = []  # nodes of the sequence added last
    before: tuple[int, ...] = ()
    for sequence in sequences:
        shared = _common(before, sequence.tokens)
        for node in path[shared:]:
            row.ends[node] = len(row.tokens)
        del path[shared:]
        for depth in range(shared, len(sequence.tokens)):
            path.append(len(row.tokens))
            row.tokens.append(sequence.tokens[depth])
            row.depths.append(depth)
            row.ends.append(-1)
        row.requests.append((sequence.request, path[sequence.first :]))
        before = sequence.tokens
    for node in path:
        row.ends[node] = len(row.tokens)
    return row


def _batches(rows: Sequence[Row], token_budget: int) -> Iterator[list[Row]]:
    """Rows of like length together, the longest first, so that a batch that does not fit fails early."""
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: -len(row.tokens)):
        if batch:
            longest = len(batch[0].tokens)
            full = (len(batch) + 1) * longest > token_budget
            if full or len(row.tokens) < BATCH_ROWS_ALIKE * longest:
                yield batch
                batch = []
        batch.append(row)
    if batch:
        yield batch
