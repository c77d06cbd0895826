"""Which tokens the model reads together: requests become one trie, cut into passes of the token budget.

A trie holds each shared beginning once: the shots of a task, the context of an item's choices, the first words of two
sentences. Its nodes stand in depth-first order. So "j is an ancestor of i" is two comparisons, j <= i < ends[j], and
all that a run of nodes reads from before itself is the path to its first node. So any run will do as a pass, and every
node is read exactly once, without padding. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from evals.tokens import Pair

PLAN = 4  # a new number whenever the same requests come to be read together in another way: that moves last bits
BLOCK = 64  # nodes whose attention is computed together, at least; they read one another and the path to the first
DEVICE_BLOCK = 512  # on a GPU, where kernels are started for each
PADDING = 32  # tokens: what a forward pass costs beside its own; rows that cannot branch are padded by no more


@dataclass(slots=True, eq=False)
class Trie:
    """What is read, as N nodes in depth-first order; there are as many roots as first tokens.

    Args:
        tokens: (N,) token ids.
        depths: (N,) positions; a root's is 0.
        parents: (N,) of a root: -1.
        ends: (N,) node i is read by nodes i to ends[i] - 1.
        predictions: (P, 3), by node: the node that predicts, the request, and which token of its continuation.
    """

    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    predictions: list[tuple[int, int, int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)

    def above(self, node: int) -> list[int]:
        """Return the nodes that a node reads beside itself, from its root down: one of each depth."""
        path: list[int] = []
        while (node := self.parents[node]) >= 0:
            path.append(node)
        return path[::-1]


@dataclass(frozen=True, slots=True)
class Block:
    """Nodes `start` to `stop` - 1, and those they read from before `start`."""

    start: int
    stop: int
    above: list[int]


@dataclass(frozen=True, slots=True)
class Pass:
    """Nodes `start` to `stop` - 1 of a trie, in one forward pass.

    Args:
        carried: nodes of earlier passes that are read in this one; node carried[d] has depth d.
        blocks: in order, all of the pass.
    """

    start: int
    stop: int
    carried: list[int]
    blocks: list[Block]


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence of tokens, and what its nodes predict, as in a trie."""

    tokens: tuple[int, ...]
    predictions: list[tuple[int, int, int]]


def build_trie(pairs: Mapping[int, Pair]) -> Trie:
    """Build the trie of what the model reads to predict every request's continuation: all but its last token."""
    trie = Trie()
    path: list[int] = []
    before: tuple[int, ...] = ()
    for request in _in_order(pairs):
        tokens, first = _read(pairs[request]), len(pairs[request].context) - 1
        shared = _common(before, tokens)
        for node in path[shared:]:
            trie.ends[node] = len(trie)
        del path[shared:]
        for depth in range(shared, len(tokens)):
            trie.parents.append(path[-1] if path else -1)
            path.append(len(trie))
            trie.tokens.append(tokens[depth])
            trie.depths.append(depth)
            trie.ends.append(-1)
        trie.predictions += [(node, request, i) for i, node in enumerate(path[first:])]
        before = tokens
    for node in path:
        trie.ends[node] = len(trie)
    trie.predictions.sort()
    return trie


def passes(trie: Trie, token_budget: int, block: int = BLOCK) -> Iterator[Pass]:
    """Yield the trie in as few passes as the budget allows, all of about one size, in blocks of at least so many."""
    count = -(-len(trie) // token_budget)
    for i in range(count):
        start, stop = i * len(trie) // count, (i + 1) * len(trie) // count
        yield Pass(start, stop, trie.above(start), list(_blocks(trie, start, stop, block)))


def _blocks(trie: Trie, start: int, stop: int, least: int) -> Iterator[Block]:
    """Yield runs of nodes: the deeper, the longer, as each run takes up its path anew."""
    while start < stop:
        size = least * max(1, trie.depths[start] // (2 * least))
        yield Block(start, min(start + size, stop), trie.above(start))
        start += size


def rows(pairs: Mapping[int, Pair], token_budget: int) -> list[list[Row]]:
    """Make batches of rows that do not branch, for models that read nothing else; a row may hold its prefixes.

    A batch's rows are of like length, and come longest first, so that a batch that does not fit fails early.

    Args:
        pairs: by request.
        token_budget: a batch holds at most so many tokens, padding included, or one row.
    """
    made: list[Row] = []
    for request in _in_order(pairs):
        tokens, first = _read(pairs[request]), len(pairs[request].context) - 1
        predictions = [(node, request, node - first) for node in range(first, len(tokens))]
        if made and tokens[: len(made[-1].tokens)] == made[-1].tokens:
            predictions += made.pop().predictions
        made.append(Row(tokens, predictions))
    batches: list[list[Row]] = []
    padding = 0
    for row in sorted(made, key=lambda row: -len(row.tokens)):
        longest = len(batches[-1][0].tokens) if batches else 0
        padding += longest - len(row.tokens)
        if not batches or (len(batches[-1]) + 1) * longest > token_budget or padding > PADDING:
            batches.append([])
            padding = 0
        batches[-1].append(row)
    return batches


def _in_order(pairs: Mapping[int, Pair]) -> list[int]:
    """Sort requests by what is read for them, a prefix before what it begins."""
    return sorted(pairs, key=lambda request: (_read(pairs[request]), request))


def _read(pair: Pair) -> tuple[int, ...]:
    return pair.context + pair.continuation[:-1]


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Count the tokens that two sequences begin with alike."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
