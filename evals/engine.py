"""Log-likelihoods of a candidate in memory: each shared context is read once, logits are made only where needed.

Stands between the harness (which knows tasks) and the model (which a worker merges in place). The engine keeps plans of
which tokens go together, the same for every candidate, so that two evaluations of one recipe agree bit for bit.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from evals.batches import Batch, packed_batches, plain_batches
from evals.errors import ScoreError
from evals.generation import Answer, answers
from evals.layerwise import LayerByLayer
from evals.memory import fits_whole, inner_size, recomputing, where_float64_is
from evals.predictions import Predictions
from evals.teachers import Beliefs, Taught
from evals.tokens import Encoder, Pair, Prompt
from evals.trie_attention import Reading, reads_tries

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKEN_BUDGET, MOST_TOKENS = 2048, 16384  # tokens in a pass on a CPU; at most on a GPU, where more is no faster
DEFAULT_LENGTH = 2048  # lm-eval's, for a model and tokenizer that state none
# How far packed and plain log-likelihoods of the probe may lie apart per token, in nats: rounding, not another model.
PROBE_TOLERANCE = {torch.bfloat16: 0.1, torch.float16: 0.02}
PROBE_TOLERANCE_FLOAT32 = 1e-3

Found = Callable[[Batch, torch.Tensor], torch.Tensor]  # of a batch and its states (Q, width): a number a token, (P,)


class Engine:
    """Scores token requests with the model as it is now; its weights may change between calls, its shape may not.

    A probe at construction compares the fast ways with a plain forward pass, and sets:
        packs: requests may be read as one trie (False: no attention of ours, ALiBi, recurrence).
        flexes: FlexAttention reads a trie's pass as a whole (False: no GPU, no compiler, soft caps or sinks).
        gathers: logits are the output embedding of the last hidden state (False: capped or scaled logits).

    Args:
        model: a causal language model on its device; put into evaluation mode.
        tokenizer: its tokenizer.
        token_budget: tokens in a forward pass, padding included; a longer row that cannot be cut is passed alone.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, token_budget: int) -> None:
        self.model = model.eval()
        self.encoder = Encoder(tokenizer)
        self.token_budget = token_budget
        self.max_length = _max_length(model.config, tokenizer)
        self._predictions = Predictions(self._logits, model.config.get_text_config().vocab_size)
        self._planned: dict[tuple[Pair, ...], list[Batch]] = {}
        self.packs = self.gathers = self.flexes = False
        expected = self._probe_plainly()
        self.gathers = self._head_is_last() and self._agrees(expected, packs=False, gathers=True)
        self.packs = self._agrees(expected, packs=True, gathers=self.gathers)
        if self.packs and model.device.type == "cuda":
            self.flexes = self._agrees(expected, packs=True, gathers=self.gathers, flexes=True)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer the engine was made with."""
        return self.encoder.tokenizer

    def loglikelihoods(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood in nats, and whether greedy decoding would give it, if asked.

        Raises:
            ScoreError: one is not finite.
        """
        batches = self.batches(pairs)
        if any(batch.plan is None for batch in batches):
            self.check_finite()
        return self._scored(batches, len(pairs))

    def generate(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """Return what greedy decoding makes of each prompt, up to the first stop string.

        Raises:
            ScoreError: logits are not finite.
            TaskError: an answer leaves no room for its prompt.
        """
        if prompts:
            self.check_finite()
        return answers(self.model, self.tokenizer, prompts, max_length=self.max_length, token_budget=self.token_budget)

    def beliefs(self, pairs: Sequence[Pair]) -> list[Beliefs]:
        """Find what the model holds likely at each token of each continuation; kept in the CPU's memory."""
        found: list[Beliefs] = []
        places = []
        with torch.inference_mode(), closing(self._read(self.batches(pairs))) as read:
            for batch, states in read:
                found.append(self._predictions.beliefs(batch, states.flatten(0, 1)[batch.nodes]))
                places += list(zip(batch.request.tolist(), batch.place.tolist(), strict=True))
        order = torch.tensor(sorted(range(len(places)), key=places.__getitem__))
        return Beliefs.join(found).at(order).split([len(pair.continuation) for pair in pairs])

    def agreements(self, pairs: Sequence[Pair], beliefs: Sequence[Beliefs]) -> list[float]:
        """Return minus the divergence from a teacher's beliefs, in nats, summed over each continuation.

        Raises:
            ScoreError: one is not finite.
        """
        batches = self.batches(pairs)
        if any(batch.plan is None for batch in batches):
            self.check_finite()
        with torch.inference_mode():
            found = self._summed(batches, len(pairs), self._agreements(pairs, beliefs))
        if not torch.isfinite(found).all():
            raise ScoreError("a divergence from a teacher is not finite: the candidate is not a usable model")
        return found.tolist()

    def backward(
        self,
        pairs: Sequence[Pair],
        loss: Callable[[torch.Tensor], torch.Tensor],
        beliefs: Sequence[Beliefs] | None = None,
    ) -> float:
        """Run a loss of the pairs' log-likelihoods (n,) backwards into the parameters that ask for gradients.

        All that is read together stays in memory until its gradients are there, so give few pairs at a time. Where the
        activations would take more than their share of what is free, they are recomputed instead.

        Args:
            pairs: n of them.
            loss: of their log-likelihoods; with beliefs of their `agreements`.
            beliefs: a teacher's, of each pair.

        Returns:
            The loss.

        Raises:
            ScoreError: it is not finite.
        """
        device = self.model.device
        packed, plain = self._by_reading(pairs)
        batches = plain_batches(plain, self.token_budget, device) + packed_batches(packed, sys.maxsize, device)
        of = self._predictions.logprobs if beliefs is None else self._agreements(pairs, beliefs)
        whole = (packed and plain) or fits_whole(self.model, sum(batch.tokens.numel() for batch in batches))
        with nullcontext() if whole else recomputing(self.model):
            value = loss(self._summed(batches, len(pairs), of))
            if not torch.isfinite(value):
                raise ScoreError("the loss is not finite: the candidate is not a usable model")
            with reads_tries(self.model) if packed and not whole else nullcontext():  # layers run again in it
                value.backward()
        return float(value.detach())

    @contextmanager
    def layer_by_layer(self, groups: Mapping[str, Sequence[Pair]]) -> Iterator[LayerByLayer]:
        """Read groups of requests through the model layer by layer, every distinct token once, without padding.

        Weights may change between layers: `LayerByLayer.advance` runs one group through the next layer.
        """
        device = self.model.device
        read = {group: self._by_reading(pairs) for group, pairs in groups.items()}
        packs = not any(plain for _, plain in read.values())
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            inner = stack.enter_context(reads_tries(self.model)) if packs else ""
            passes = {}
            for group, (packed, plain) in read.items():
                batches = (
                    packed_batches(packed, self.token_budget, device)
                    if packs
                    else plain_batches(packed | plain, 1, device)
                )
                passes[group] = [partial(self._states, **inputs) for inputs in self._inputs(batches, inner)]
            reading = LayerByLayer(self.model, passes)
            with reading.pausing():
                yield reading

    def check_finite(self) -> None:
        """Read 20 tokens and raise `ScoreError` unless every logit is finite.

        Causal attention on a CPU can give finite numbers for a NaN in inputs under 16 tokens (seen with torch 2.13);
        with a mask, as over a trie, it does not.
        """
        with torch.inference_mode():
            logits = self.model(input_ids=self._some_tokens(20)[None], use_cache=False).logits
        if not torch.isfinite(logits).all():
            raise ScoreError("the candidate's logits are not finite: its weights are not a usable model")

    def batches(self, pairs: Sequence[Pair]) -> list[Batch]:
        """Plan the forward passes that read these pairs, once for all candidates."""
        asked = tuple(pairs)
        if asked not in self._planned:
            self._planned[asked] = self._batches(asked)
        return self._planned[asked]

    def _by_reading(self, pairs: Sequence[Pair]) -> tuple[dict[int, Pair], dict[int, Pair]]:
        """Return the pairs that one trie can hold, by request, and the others."""
        cut = {request: pair.cut(self.max_length) for request, pair in enumerate(pairs)}
        longest = _window(self.model.config) if self.packs else 0
        packed = {i: pair for i, pair in cut.items() if len(pair.context) + len(pair.continuation) - 1 <= longest}
        return packed, {i: pair for i, pair in cut.items() if i not in packed}

    def _batches(self, pairs: Sequence[Pair]) -> list[Batch]:
        packed, plain = self._by_reading(pairs)
        device = self.model.device
        return plain_batches(plain, self.token_budget, device) + packed_batches(packed, self.token_budget, device)

    def _agreements(self, pairs: Sequence[Pair], beliefs: Sequence[Beliefs]) -> Found:
        return partial(self._predictions.agreements, taught=Taught.of(pairs, beliefs))

    def _summed(self, batches: Sequence[Batch], requests: int, of: Found) -> torch.Tensor:
        """Sum what `of` finds (P,) in each batch over each request, in float64."""
        sums = where_float64_is(torch.zeros(requests, device=self.model.device)).double()
        with closing(self._read(batches)) as read:
            for batch, states in read:
                found = of(batch, states.flatten(0, 1)[batch.nodes])
                sums = sums.index_add(0, batch.request.to(sums.device), where_float64_is(found).double())
        return sums

    def _scored(self, batches: Sequence[Batch], requests: int) -> list[tuple[float, bool]]:
        sums = where_float64_is(torch.zeros(requests, device=self.model.device)).double()
        greedy = torch.ones(requests, dtype=torch.bool, device=self.model.device)
        with torch.inference_mode(), closing(self._read(batches)) as read:  # else an error here leaves it open
            for batch, states in read:
                logprobs, best = self._predictions.scores(batch, states.flatten(0, 1)[batch.nodes])
                sums.index_add_(0, batch.request.to(sums.device), where_float64_is(logprobs).double())
                greedy[batch.request[~best]] = False  # also where it is not asked
        if not torch.isfinite(sums).all():
            bad = int((~torch.isfinite(sums)).sum())
            raise ScoreError(f"{bad} of {requests} log-likelihoods are not finite: the candidate is not a usable model")
        return list(zip(sums.tolist(), greedy.tolist(), strict=True))

    def _read(self, batches: Sequence[Batch]) -> Generator[tuple[Batch, torch.Tensor], None, None]:
        """Yield each batch with the hidden states of every node, or the logits themselves: (B, N, width)."""
        plain = [batch for batch in batches if batch.plan is None]
        packed = [batch for batch in batches if batch.plan is not None]
        for batch, inputs in zip(plain, self._inputs(plain, ""), strict=True):
            yield batch, self._states(**inputs)
        if packed:
            flexes = self.flexes and not torch.is_grad_enabled()
            with reads_tries(self.model) as inner:
                for batch, inputs in zip(packed, self._inputs(packed, inner, flexes), strict=True):
                    yield batch, self._states(**inputs)

    def _inputs(self, batches: Sequence[Batch], inner: str, flexes: bool = False) -> Iterator[dict[str, Any]]:
        """Yield what the model is called with for each batch, one after another.

        Args:
            inner: the attention implementation that the model had before it was to read tries.
            flexes: whether FlexAttention reads them.
        """
        carried: dict[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}
        for batch in batches:
            if batch.plan is None:
                yield {"input_ids": batch.tokens}
            else:
                trie = Reading(batch.plan, None if flexes else self.model.dtype, inner, carried)
                yield {"input_ids": batch.tokens, "position_ids": batch.depths, "trie": trie}

    def _states(self, **inputs: Any) -> torch.Tensor:
        states: torch.Tensor
        if self.gathers:
            states = self.model.base_model(**inputs, use_cache=False).last_hidden_state
        else:
            states = self.model(**inputs, use_cache=False).logits
        return states

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        return self.model.get_output_embeddings()(states) if self.gathers else states

    def _probe_pairs(self) -> list[Pair]:
        """Make two choices after one context and one after another: a packed row of them branches and starts twice."""
        tokens = self._some_tokens(48).tolist()
        context, other = tuple(tokens[:12]), tuple(tokens[24:33])
        choices = (tuple(tokens[12:19]), tuple(tokens[19:24]))
        return [*(Pair(context, choice) for choice in choices), Pair(other, tuple(tokens[33:]))]

    def _probe_plainly(self) -> list[float]:
        with torch.inference_mode():
            return [self._plainly(pair) for pair in self._probe_pairs()]

    def _head_is_last(self) -> bool:
        """Tell whether logits are what the output embedding gives, neither capped nor scaled, bit for bit.

        The probe's tolerance cannot tell: a cap of 30 changes small logits by less than rounding does.
        """
        given: list[torch.Tensor] = []
        head = self.model.get_output_embeddings()
        if head is None:
            return False
        hook = head.register_forward_hook(lambda module, inputs, output: given.append(output))
        try:
            with torch.inference_mode():
                logits = self.model(input_ids=self._some_tokens(20)[None], use_cache=False).logits
        finally:
            hook.remove()
        return len(given) == 1 and torch.equal(given[0].to(logits.dtype), logits)

    def _plainly(self, pair: Pair) -> float:
        tokens = torch.tensor([pair.context + pair.continuation], device=self.model.device)
        logprobs = self.model(input_ids=tokens[:, :-1], use_cache=False).logits[0].float().log_softmax(-1)
        first = len(pair.context) - 1
        return float(logprobs[first:].gather(-1, tokens[0, first + 1 :, None]).sum())

    def _agrees(self, expected: Sequence[float], *, packs: bool, gathers: bool, flexes: bool = False) -> bool:
        """Tell whether the probe, read this way, gives the plain log-likelihoods."""
        pairs = self._probe_pairs()
        before = self.gathers, self.flexes
        self.gathers, self.flexes = gathers, flexes
        try:  # a trie in three passes, so that a path is carried
            make, token_budget = (packed_batches, 16) if packs else (plain_batches, 64)
            found = self._scored(make(dict(enumerate(pairs)), token_budget, self.model.device), len(pairs))
        except Exception:  # whatever an architecture makes of arguments that it does not know: read it plainly
            return False
        finally:
            self.gathers, self.flexes = before
        tolerance = PROBE_TOLERANCE.get(self.model.dtype, PROBE_TOLERANCE_FLOAT32)
        return all(
            abs(score - plain) <= tolerance * len(pair.continuation)
            for (score, _), plain, pair in zip(found, expected, pairs, strict=True)
        )

    def _some_tokens(self, n: int) -> torch.Tensor:
        return (7 + 31 * torch.arange(n, device=self.model.device)) % self.model.config.get_text_config().vocab_size


def budget_for(model: PreTrainedModel, room: int) -> int:
    """Return the tokens of a forward pass: 2,048 on a CPU, elsewhere what fits in half of the room, from 256 to 16,384.

    A power of two, so that devices with about the same room batch alike.

    Args:
        room: bytes free on the model's device for what a pass holds.
    """
    if model.device.type == "cpu":
        return TOKEN_BUDGET
    config = model.config.get_text_config()
    width = 16 * config.hidden_size + 3 * inner_size(config)
    fits = room // 2 // (width * model.dtype.itemsize)  # per token: a layer's states, attention's copies, the MLP's
    return max(256, min(MOST_TOKENS, 1 << max(0, fits.bit_length() - 1)))


def _max_length(config: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the context length that lm-eval takes: the config's, else the tokenizer's, else 2048."""
    text = config.get_text_config()
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if getattr(text, name, None) is not None:
            return int(getattr(text, name))
    stated = tokenizer.model_max_length
    return int(stated) if stated is not None and stated < 10**9 else DEFAULT_LENGTH


def _window(config: Any) -> float:
    """Return the longest input that a layer reads as full attention would; longer ones are read plainly.

    Layers with local attention look back only so far, and LongRoPE turns every position of an input otherwise where
    the input is longer than those of the first training.
    """
    text = config.get_text_config()
    used = ["attention_chunk_size", "window_size"]
    if getattr(text, "use_sliding_window", True):
        used.append("sliding_window")
    rope = getattr(text, "rope_parameters", None) or {}
    first = rope.get("original_max_position_embeddings") if rope.get("rope_type") == "longrope" else None
    return min((width for width in (first, *(getattr(text, name, None) for name in used)) if width), default=math.inf)
