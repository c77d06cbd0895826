"""Log-likelihoods of a candidate in memory: each shared context is read once, logits are made only where needed.

Stands between the harness (which knows tasks) and the model (which a worker merges in place). The engine keeps plans of
which tokens go together, the same for every candidate, so that two evaluations of one recipe agree bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from evals.errors import ScoreError, TaskError
from evals.packing import PASS_TOKENS, Row, plan
from evals.tokens import Encoder, Pair, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOGIT_BYTES = {"cpu": 24 * 2**20}  # float32 logits made at a time: malloc maps anew, and clears, what is above 32 MiB
LOGIT_BYTES_ELSEWHERE = 2**28
CACHED_ROWS = (
    32  # of which the log-sum is taken at a time: they stay in a CPU's cache, and it takes a third of the time
)
DEFAULT_LENGTH = 2048  # lm-eval's, for a model and tokenizer that state none
GENERATION_ROWS = 64  # prompts continued together at most: a step costs about the same for 16 and for 64
# How far packed and plain log-likelihoods of the probe may lie apart per token, in nats: rounding, not another model.
PROBE_TOLERANCE = {torch.bfloat16: 0.1, torch.float16: 0.02}
PROBE_TOLERANCE_FLOAT32 = 1e-3


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward pass: B rows padded to N tokens, logits at Q of their nodes, P predicted tokens.

    Args:
        stem: which batch, by its place in the plan, stands before every row; its keys and values are used again.
        tokens, depths: (B, N).
        ends: (B, N), where each node's descendants end; None where no row branches and none has a stem, so that plain
            causal order holds.
        row, node: (Q,) where logits are wanted.
        source, target, request: (P,) of which of the Q, of which token, and whose log-likelihood it adds to.
    """

    stem: int | None
    tokens: torch.Tensor
    depths: torch.Tensor
    ends: torch.Tensor | None
    row: torch.Tensor
    node: torch.Tensor
    source: torch.Tensor
    target: torch.Tensor
    request: torch.Tensor


@dataclass(frozen=True, slots=True)
class Answer:
    """What greedy decoding made of a prompt.

    Args:
        text: up to the first stop string.
        tokens: how many were written.
        ended: at a stop string or the end token; False where the limit of tokens broke it off.
    """

    text: str
    tokens: int
    ended: bool


class Engine:
    """Scores token requests with the model as it is now; its weights may change between calls, its shape may not.

    A probe at construction compares the fast ways with a plain forward pass, and sets:
        packs: rows may branch (False: no custom masks, ALiBi, recurrence).
        stems: keys and values of a prefix may be kept for the rows that share it.
        gathers: logits are the output embedding of the last hidden state (False: capped or scaled logits).

    Args:
        model: a causal language model on its device; put into evaluation mode.
        tokenizer: its tokenizer.
        token_budget: tokens in a forward pass, padding included; a longer sequence is passed alone.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, token_budget: int) -> None:
        self.model = model.eval()
        self.encoder = Encoder(tokenizer)
        self.token_budget = token_budget
        self.max_length = _max_length(model.config, tokenizer)
        self._plans: dict[int, tuple[object, Sequence[Batch]]] = {}
        self.packs = self.stems = self.gathers = False
        expected = self._probe_plainly()
        self.gathers = self._agrees(expected, packs=False, stems=False, gathers=True)
        self.packs = self._agrees(expected, packs=True, stems=False, gathers=self.gathers)
        self.stems = self.packs and self._agrees(expected, packs=True, stems=True, gathers=self.gathers)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer the engine was made with."""
        return self.encoder.tokenizer

    def loglikelihoods(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation in nats, and whether it is what greedy decoding would give.

        Raises:
            ScoreError: one is not finite.
        """
        return self._scored(self._planned(pairs, lambda: self._batches(pairs, branching=self.packs)), len(pairs))

    def rolling(self, texts: Sequence[Sequence[Pair]]) -> list[float]:
        """The log-likelihood of each text in nats, a text being the windows that predict it."""
        windows = [pair for text in texts for pair in text]
        scored = iter(
            self._scored(self._planned(texts, lambda: self._batches(windows, branching=self.packs)), len(windows))
        )
        return [math.fsum(next(scored)[0] for _ in text) for text in texts]

    def generate(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """What greedy decoding makes of each prompt, up to the first stop string."""
        answers: dict[int, Answer] = {}
        for batch in _prompt_batches(prompts, self.token_budget):
            answers.update(zip(batch, self._continued([prompts[i] for i in batch]), strict=True))
        return [answers[i] for i in range(len(prompts))]

    def check_finite(self) -> None:
        """Read 20 tokens and raise `ScoreError` unless every logit is finite.

        Attention on a CPU can give finite numbers for a NaN in inputs under 16 tokens (seen with torch 2.13).
        """
        with torch.inference_mode():
            logits = self.model(input_ids=self._some_tokens(20)[None], use_cache=False).logits
        if not torch.isfinite(logits).all():
            raise ScoreError("the candidate's logits are not finite: its weights are not a usable model")

    def _planned(self, requests: object, make: Callable[[], Sequence[Batch]]) -> Sequence[Batch]:
        """Batches made once for these very requests; the requests are kept, so their id stays theirs."""
        if id(requests) not in self._plans:
            self._plans[id(requests)] = (requests, make())
        return self._plans[id(requests)][1]

    def _batches(self, pairs: Sequence[Pair], *, branching: bool) -> Sequence[Batch]:
        pairs = [pair.cut(self.max_length) for pair in pairs]
        longest = max((len(pair.context) + len(pair.continuation) for pair in pairs), default=0)
        window = _window(self.model.config)
        stems = self.stems and longest <= window
        batches = plan(
            pairs,
            token_budget=self.token_budget,
            branching=branching,
            pass_tokens=PASS_TOKENS if stems else None,
        )
        if branching and max((len(rows[0].tokens) for rows in batches), default=0) > window:
            batches = plan(pairs, token_budget=self.token_budget, branching=False)
        return _batches_of(batches, pairs, self.model.device)

    def _scored(self, batches: Sequence[Batch], requests: int) -> list[tuple[float, bool]]:
        sums = torch.zeros(requests, dtype=torch.float64, device=self.model.device)
        greedy = torch.ones(requests, dtype=torch.bool, device=self.model.device)
        last_use = {batch.stem: i for i, batch in enumerate(batches)}
        kept: dict[int | None, Cache] = {}
        with torch.inference_mode():
            for i, batch in enumerate(batches):
                states, cache = self._read(batch, kept.get(batch.stem), keep=i in last_use)
                if cache is not None:
                    kept[i] = cache
                if last_use[batch.stem] == i:
                    kept.pop(batch.stem, None)
                logprobs, best = self._predictions(batch, states[batch.row, batch.node])
                sums.index_add_(0, batch.request, logprobs.double())
                greedy[batch.request[~best]] = False
        if not torch.isfinite(sums).all():
            bad = int((~torch.isfinite(sums)).sum())
            raise ScoreError(f"{bad} of {requests} log-likelihoods are not finite: the candidate is not a usable model")
        return list(zip(sums.tolist(), greedy.tolist(), strict=True))

    def _read(self, batch: Batch, stem: Cache | None, *, keep: bool) -> tuple[torch.Tensor, Cache | None]:
        """Hidden states of every node, or the logits themselves (B, N, width), and the keys and values if kept."""
        cache = _widened(stem, len(batch.tokens)) if stem is not None else DynamicCache() if keep else None
        reading: dict[str, Any] = {"input_ids": batch.tokens, "use_cache": cache is not None, "past_key_values": cache}
        if batch.ends is not None:
            before = 0 if stem is None else stem.get_seq_length()
            reading |= {"attention_mask": _mask(batch.ends, before, self.model.dtype), "position_ids": batch.depths}
        read = self.model.base_model(**reading).last_hidden_state if self.gathers else self.model(**reading).logits
        return read, cache if keep else None

    def _predictions(self, batch: Batch, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of the targets (P,) in float32, and whether each is the likeliest token (P,).

        Args:
            states: what logits are made of at the wanted nodes, hidden states or the logits themselves (Q, width).
        """
        size = LOGIT_BYTES.get(states.device.type, LOGIT_BYTES_ELSEWHERE)
        step = max(1, size // (4 * self.model.config.get_text_config().vocab_size))
        chosen = torch.empty(len(batch.target), dtype=torch.float32, device=states.device)
        best = torch.empty(len(batch.target), dtype=torch.bool, device=states.device)
        for start in range(0, len(states), step):
            logits = self._logits(states[start : start + step]).float()  # (step, V)
            wanted = ((batch.source >= start) & (batch.source < start + step)).nonzero()[:, 0]
            source, target = batch.source[wanted] - start, batch.target[wanted]
            norms = torch.cat([part.logsumexp(-1) for part in logits.split(CACHED_ROWS)])
            chosen[wanted] = logits[source, target] - norms[source]
            best[wanted] = _is_first_best(logits, source, target)
        return chosen, best

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        return self.model.get_output_embeddings()(states) if self.gathers else states

    def _continued(self, prompts: Sequence[Prompt]) -> list[Answer]:
        room = self.max_length - prompts[0].max_new_tokens
        if room <= 0:
            raise TaskError(
                f"an answer must leave room for its prompt: max_gen_toks {prompts[0].max_new_tokens} given, the model "
                f"reads {self.max_length} tokens"
            )
        tokenizer = self.encoder.tokenizer
        rows = [prompt.tokens[-room:] for prompt in prompts]
        width = max(len(row) for row in rows)
        known = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id)  # lm-eval's order
        pad = next((token for token in known if token is not None), 0)
        tokens = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=self.model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=self.model.device)
        stop = [*prompts[0].stop]
        if tokenizer.eos_token_id is not None:
            stop.append(str(tokenizer.decode([tokenizer.eos_token_id])))
        made = self.model.generate(
            input_ids=tokens,
            attention_mask=mask,
            max_length=width + prompts[0].max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
            use_cache=True,
            stopping_criteria=[_stopper(tokenizer, stop, width)],
        )
        written = made[:, width:]
        counts = [max(1, len(row) - _trailing(row, pad)) for row in written.tolist()]
        whole = tokenizer.batch_decode(written)
        shown = tokenizer.batch_decode(written, skip_special_tokens=True)
        return [
            Answer(_until(text, stop), tokens, any(term and term in all_of_it for term in stop))
            for text, tokens, all_of_it in zip(shown, counts, whole, strict=True)
        ]

    def _probe_pairs(self) -> list[Pair]:
        """Two choices after one context and one after another: a packed row of them branches and starts twice."""
        tokens = self._some_tokens(48).tolist()
        context, other = tuple(tokens[:12]), tuple(tokens[24:33])
        choices = (tuple(tokens[12:19]), tuple(tokens[19:24]))
        return [*(Pair(context, choice) for choice in choices), Pair(other, tuple(tokens[33:]))]

    def _probe_plainly(self) -> list[float]:
        with torch.inference_mode():
            return [self._plainly(pair) for pair in self._probe_pairs()]

    def _plainly(self, pair: Pair) -> float:
        tokens = torch.tensor([pair.context + pair.continuation], device=self.model.device)
        logprobs = self.model(input_ids=tokens[:, :-1], use_cache=False).logits[0].float().log_softmax(-1)
        first = len(pair.context) - 1
        return float(logprobs[first:].gather(-1, tokens[0, first + 1 :, None]).sum())

    def _agrees(self, expected: Sequence[float], *, packs: bool, stems: bool, gathers: bool) -> bool:
        """Whether the probe, read this way, gives the plain log-likelihoods."""
        pairs = self._probe_pairs()
        budget, pass_tokens = (20, 0) if stems else (64, None)  # 20 are too few for one row, so that a stem pays
        before, self.gathers = self.gathers, gathers
        try:
            rows = plan(pairs, token_budget=budget, branching=packs, pass_tokens=pass_tokens)
            found = self._scored(_batches_of(rows, pairs, self.model.device), len(pairs))
        except Exception:  # whatever an architecture makes of arguments that it does not know: read it plainly
            return False
        finally:
            self.gathers = before
        tolerance = PROBE_TOLERANCE.get(self.model.dtype, PROBE_TOLERANCE_FLOAT32)
        return all(
            abs(score - plain) <= tolerance * len(pair.continuation)
            for (score, _), plain, pair in zip(found, expected, pairs, strict=True)
        )

    def _some_tokens(self, n: int) -> torch.Tensor:
        return (7 + 31 * torch.arange(n, device=self.model.device)) % self.model.config.get_text_config().vocab_size


def _batches_of(plan: Sequence[Sequence[Row]], pairs: Sequence[Pair], device: torch.device) -> list[Batch]:
    stems = {id(rows[0]): i for i, rows in enumerate(plan)}  # a stem is alone in its batch
    return [
        _batch(rows, pairs, None if rows[0].stem is None else stems[id(rows[0].stem)], device=device) for rows in plan
    ]


def _batch(rows: Sequence[Row], pairs: Sequence[Pair], stem: int | None, *, device: torch.device) -> Batch:
    width = len(rows[0].tokens)  # rows come longest first
    wanted: dict[tuple[int, int], int] = {}
    source: list[int] = []
    target: list[int] = []
    request: list[int] = []
    for r, row in enumerate(rows):
        for index, skipped, nodes in row.requests:
            source += [wanted.setdefault((r, node), len(wanted)) for node in nodes]
            target += pairs[index].continuation[skipped : skipped + len(nodes)]
            request += [index] * len(nodes)
    branches = any(end != len(row.tokens) for row in rows for end in row.ends)

    def tensor(values: Sequence[Any]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    def padded(values: Sequence[int]) -> list[int]:
        return [*values, *[0] * (width - len(values))]

    ends = tensor([[*row.ends, *range(len(row.ends) + 1, width + 1)] for row in rows])  # padding reads itself only
    return Batch(
        stem=stem,
        tokens=tensor([padded(row.tokens) for row in rows]),
        depths=tensor([padded(row.depths) for row in rows]),
        ends=ends if branches or stem is not None else None,
        row=tensor([r for r, _ in wanted]),
        node=tensor([node for _, node in wanted]),
        source=tensor(source),
        target=tensor(target),
        request=tensor(request),
    )


def _mask(ends: torch.Tensor, before: int, dtype: torch.dtype) -> torch.Tensor:
    """0 where a node may read another, its ancestor or itself, else the lowest number: (B, 1, N, before + N).

    Args:
        ends: (B, N), where each node's descendants end.
        before: tokens of the stem, which every node reads.
    """
    order = torch.arange(ends.shape[1], device=ends.device)
    hidden = (order[:, None] < order) | (order[:, None] >= ends[:, None, :])  # (B, N, N)
    mask = torch.zeros(*ends.shape, before + ends.shape[1], dtype=dtype, device=ends.device)
    mask[..., before:].masked_fill_(hidden, torch.finfo(dtype).min)
    return mask[:, None]


def _widened(stem: Cache, rows: int) -> Cache:
    """The stem's keys and values for each of the rows, for a model to add its own to."""
    cache = DynamicCache()
    for i, layer in enumerate(stem.layers):
        assert isinstance(layer, CacheLayerMixin)
        assert layer.keys is not None
        assert layer.values is not None
        cache.update(layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1), i)
    return cache


def _is_first_best(logits: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Whether target p is what argmax gives in row source[p] of the logits: (P,).

    argmax over a vocabulary takes ten times as long as its maximum, so only rows whose maximum is a target are asked.
    """
    best = logits[source, target] == logits.amax(-1)[source]
    best[best.clone()] = logits[source[best]].argmax(-1) == target[best]  # of equal ones the first
    return best


def _prompt_batches(prompts: Sequence[Prompt], token_budget: int) -> Iterator[list[int]]:
    """Prompts with the same stops together, the longest first."""

    def key(i: int) -> tuple[tuple[str, ...], int, int, tuple[int, ...]]:
        return prompts[i].stop, prompts[i].max_new_tokens, -len(prompts[i].tokens), prompts[i].tokens

    batch: list[int] = []
    for i in sorted(range(len(prompts)), key=key):
        if batch:
            first = prompts[batch[0]]
            width = len(first.tokens) + first.max_new_tokens
            full = len(batch) >= GENERATION_ROWS or (len(batch) + 1) * width > token_budget
            if full or key(i)[:2] != key(batch[0])[:2]:
                yield batch
                batch = []
        batch.append(i)
    if batch:
        yield batch


def _stopper(tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], width: int) -> Callable[..., torch.Tensor]:
    def stops(tokens: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        texts = tokenizer.batch_decode(tokens[:, width:])
        done = [any(term and term in text for term in stop) for text in texts]
        return torch.tensor(done, device=tokens.device)

    return stops


def _trailing(tokens: Sequence[int], pad: int) -> int:
    """How many of a row's last tokens are padding."""
    return next((i for i, token in enumerate(reversed(tokens)) if token != pad), len(tokens))


def _until(text: str, stop: Sequence[str]) -> str:
    for term in stop:
        text = text.split(term)[0] if term else text
    return text


def _max_length(config: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """The context length that lm-eval takes: the config's, else the tokenizer's, else 2048."""
    text = config.get_text_config()
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if getattr(text, name, None) is not None:
            return int(getattr(text, name))
    stated = tokenizer.model_max_length
    return int(stated) if stated is not None and stated < 10**9 else DEFAULT_LENGTH


def _window(config: Any) -> float:
    """How far layers with local attention look back; rows that branch must be shorter, as masks replace windows."""
    text = config.get_text_config()
    used = ["attention_chunk_size", "window_size"]
    if getattr(text, "use_sliding_window", True):
        used.append("sliding_window")
    return min((width for name in used if (width := getattr(text, name, None))), default=math.inf)
