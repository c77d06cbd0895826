"""Which tokens the model reads together: sequences become tries, tries become rows on stems, rows become batches.

A trie holds each shared prefix once: the shots of a task, the context of an item's choices, the first words of two
sentences. A prefix that many rows share is a stem, read once, whose keys and values the rows above it use again.
Nodes stand in depth-first order, so that "j is an ancestor of i" is two comparisons. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from evals.tokens import Pair

PLAN = 3  # a new number whenever the same requests come to be read together in another way: that moves last bits
ROW_TOKENS = 256  # attention costs the square of a row, first words are read once a row; 128 to 256 take the same time
OPEN_ROWS = 64  # the last of the rows begun, in which room is looked for
PASS_TOKENS = 32  # what a forward pass costs beside its tokens, in tokens; as much padding is worth avoiding one
ATTENTION = 1 / 2000  # what reading one earlier token costs, in tokens: 1 / 3456 by arithmetic at a width of 576


@dataclass(slots=True, eq=False)
class Row:
    """Sequences that the model reads at once, as a trie of N nodes in depth-first order.

    Args:
        stem: the row, one unbranched path, that stands before every node of this one.
        tokens: (N,) token ids.
        depths: (N,) positions; the first token of all is 0.
        ends: (N,) node i is read by nodes i to ends[i] - 1.
        requests: whose continuations are predicted here: the request, which of its tokens is the first that is
            predicted here, and the nodes that predict it and the following ones. A stem may predict the first of them.
    """

    stem: Row | None = None
    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    requests: list[tuple[int, int, list[int]]] = field(default_factory=list)

    @property
    def height(self) -> int:
        """Tokens that stand before each of the rows on this one."""
        return len(self.tokens) + (self.stem.height if self.stem else 0)


@dataclass(frozen=True, slots=True)
class _Sequence:
    request: int
    tokens: tuple[int, ...]  # the model's input: the context and all but the last token of the continuation
    first: int  # the position that predicts the first token of the continuation


def plan(
    pairs: Sequence[Pair], *, token_budget: int, branching: bool, pass_tokens: int | None = None
) -> list[list[Row]]:
    """Batches of rows that predict every pair; the rows of a batch have one stem, which is a batch before them.

    Args:
        pairs: already cut to the model's length.
        token_budget: a batch holds at most so many tokens, padding included, or one row.
        branching: rows may branch; else each row is one sequence (which may hold others that are its prefixes).
        pass_tokens: where rows may branch, a prefix becomes a stem if that saves more than a forward pass costs beside
            its tokens, as a number of tokens (`PASS_TOKENS`); None: there are no stems.
    """
    sequences = sorted(
        (_Sequence(i, pair.context + pair.continuation[:-1], len(pair.context) - 1) for i, pair in enumerate(pairs)),
        key=_order,
    )
    if not branching:
        return list(_batches([_trie(group, None) for group in _paths(sequences)], token_budget))
    if pass_tokens is None:
        return list(_on_stem(sequences, None, token_budget))
    return list(_on_stems(sequences, None, token_budget, pass_tokens))


def _paths(sequences: Sequence[_Sequence]) -> Iterator[list[_Sequence]]:
    """Runs of sequences in which each is a prefix of the next."""
    group: list[_Sequence] = []
    for sequence in sequences:
        if group and sequence.tokens[: len(group[-1].tokens)] != group[-1].tokens:
            yield group
            group = []
        group.append(sequence)
    if group:
        yield group


def _on_stems(
    sequences: Sequence[_Sequence], stem: Row | None, token_budget: int, pass_tokens: int
) -> Iterator[list[Row]]:
    """Batches on a stem, then each further stem that pays, followed by the batches on it."""
    height = stem.height if stem else 0
    further: list[tuple[list[_Sequence], int]] = []
    here: list[_Sequence] = []
    waiting = [(list(sequences), height)]
    while waiting:
        group, shared = waiting.pop()
        for run in _runs(group, shared):
            top = _common(run[0].tokens, run[-1].tokens)
            if _stem_pays(run, height, top, token_budget, pass_tokens):
                further.append((run, top))
            elif _size(run, height) > _room(run, height, token_budget):
                here += [sequence for sequence in run if len(sequence.tokens) == top]
                waiting.append(([sequence for sequence in run if len(sequence.tokens) > top], top))
            else:
                here += run
    yield from _on_stem(sorted(here, key=_order), stem, token_budget)
    for run, top in further:
        row = _trie([replace(sequence, tokens=sequence.tokens[:top]) for sequence in run], stem)
        yield [row]
        yield from _on_stems(
            [sequence for sequence in run if len(sequence.tokens) > top], row, token_budget, pass_tokens
        )


def _runs(sequences: Sequence[_Sequence], shared: int) -> Iterator[list[_Sequence]]:
    """Sorted sequences with `shared` tokens in common, apart by the token that follows."""
    run: list[_Sequence] = []
    for sequence in sequences:
        if run and sequence.tokens[shared] != run[-1].tokens[shared]:
            yield run
            run = []
        run.append(sequence)
    if run:
        yield run


def _stem_pays(run: Sequence[_Sequence], height: int, top: int, token_budget: int, pass_tokens: int) -> bool:
    """Whether to read tokens `height` to `top` of a run once, in a pass of their own, or with each row."""
    stem, size, room = top - height, _size(run, height), _room(run, height, token_budget)
    if size <= room or stem >= room:
        return False
    rows = -(-(size - stem) // (room - stem))
    repeated = (size + (rows - 1) * stem) * (1 + ATTENTION * (height + room))
    above = (size - stem) * (1 + ATTENTION * (top + _room(run, top, token_budget)))
    return above + stem * (1 + ATTENTION * top) + pass_tokens < repeated


def _room(sequences: Sequence[_Sequence], height: int, token_budget: int) -> int:
    return _row_tokens(max(len(sequence.tokens) for sequence in sequences) - height, token_budget)


def _row_tokens(longest: int, token_budget: int) -> int:
    """How long a row may get that holds a sequence of so many tokens."""
    return max(longest, min(max(ROW_TOKENS, 2 * longest), token_budget))


def _on_stem(sequences: Sequence[_Sequence], stem: Row | None, token_budget: int) -> Iterator[list[Row]]:
    groups = _branching(sequences, stem.height if stem else 0, token_budget)
    return _batches([_trie(group, stem) for group in groups], token_budget)


def _branching(sequences: Sequence[_Sequence], height: int, token_budget: int) -> list[list[_Sequence]]:
    """Sequences for one row each: the largest kin first, each in the first row that has room for it."""
    kins = [(_size(kin, height), kin) for kin in _kin(sequences, height, token_budget)]
    groups: list[list[_Sequence]] = []
    left: list[int] = []
    for size, kin in sorted(kins, key=lambda sized: -sized[0]):
        for g in range(max(0, len(groups) - OPEN_ROWS), len(groups)):
            growth = size - max(0, _common(groups[g][0].tokens, kin[0].tokens) - height)
            if growth <= left[g]:
                groups[g] += kin
                left[g] -= growth
                break
        else:
            groups.append(kin)
            left.append(max(0, min(ROW_TOKENS, token_budget) - size))
    return [sorted(group, key=_order) for group in groups]


def _kin(sequences: Sequence[_Sequence], height: int, token_budget: int) -> Iterator[list[_Sequence]]:
    """Sequences that stay together: half of their tokens in common, and no more of them than a row may hold."""
    kin: list[_Sequence] = []
    size = longest = 0
    for sequence in sequences:
        own = len(sequence.tokens) - height
        shared = _common(kin[-1].tokens, sequence.tokens) - height if kin else 0
        longest = max(longest, own)
        if kin and (2 * shared < own or size + own - shared > _row_tokens(longest, token_budget)):
            yield kin
            kin, size, longest, shared = [], 0, own, 0
        kin.append(sequence)
        size += own - shared
    if kin:
        yield kin


def _order(sequence: _Sequence) -> tuple[tuple[int, ...], int]:
    return sequence.tokens, sequence.request


def _size(sequences: Sequence[_Sequence], height: int) -> int:
    """Nodes of a trie of sorted sequences, from `height` on."""
    grown = sum(len(after.tokens) - _common(before.tokens, after.tokens) for before, after in pairwise(sequences))
    return len(sequences[0].tokens) - height + grown


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """How many tokens two sequences begin with alike."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _trie(sequences: Sequence[_Sequence], stem: Row | None) -> Row:
    row = Row(stem)
    height = stem.height if stem else 0
    path: list[int] = []  # nodes of the sequence added last
    before = sequences[0].tokens[:height]
    for sequence in sequences:
        shared = _common(before, sequence.tokens)
        for node in path[shared - height :]:
            row.ends[node] = len(row.tokens)
        del path[shared - height :]
        for depth in range(shared, len(sequence.tokens)):
            path.append(len(row.tokens))
            row.tokens.append(sequence.tokens[depth])
            row.depths.append(depth)
            row.ends.append(-1)
        skipped = max(0, height - sequence.first)  # predicted by the stem
        if nodes := path[sequence.first + skipped - height :]:
            row.requests.append((sequence.request, skipped, nodes))
        before = sequence.tokens
    for node in path:
        row.ends[node] = len(row.tokens)
    return row


def _batches(rows: Sequence[Row], token_budget: int) -> Iterator[list[Row]]:
    """Rows of like length together, the longest first, so that a batch that does not fit fails early."""
    batch: list[Row] = []
    padding = 0
    for row in sorted(rows, key=lambda row: -len(row.tokens)):
        if batch:
            longest = len(batch[0].tokens)
            tokens = (len(batch) + 1) * longest
            padding += longest - len(row.tokens)
            if tokens > token_budget or padding > PASS_TOKENS:
                yield batch
                batch = []
                padding = 0
        batch.append(row)
    if batch:
        yield batch
