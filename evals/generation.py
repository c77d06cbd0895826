"""Answers to prompts, greedy or drawn: decoded together with a key-value cache, each up to its first stop string.

Stands beside log-likelihoods in the engine; what a prompt is and which stops it has, the harness knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from evals.errors import TaskError
from evals.tokens import Prompt, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROWS = 64  # prompts continued together at most: a step costs about the same for 16 and for 64


@dataclass(frozen=True, slots=True)
class Answer:
    """What decoding made of a prompt.

    Args:
        text: up to the first stop string.
        tokens: how many were written.
        ended: at a stop string or the end token; False where the limit of tokens broke it off.
    """

    text: str
    tokens: int
    ended: bool


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_length: int,
    token_budget: int,
) -> list[Answer]:
    """Write what a model makes of each prompt, up to the first stop string.

    Args:
        max_length: tokens that the model reads; a prompt is cut on the left until its answer fits behind it.
        token_budget: tokens decoded together, padding and answers included, or one prompt.

    Raises:
        TaskError: an answer leaves no room for its prompt.
    """
    found: dict[int, Answer] = {}
    for batch in _batches(prompts, token_budget):
        found.update(zip(batch, _continued(model, tokenizer, [prompts[i] for i in batch], max_length), strict=True))
    return [found[i] for i in range(len(prompts))]


def _batches(prompts: Sequence[Prompt], token_budget: int) -> Iterator[list[int]]:
    """Yield prompts with the same stops together, the longest first."""

    def key(i: int) -> tuple[tuple[str, ...], int, bool, int, tuple[int, ...]]:
        prompt = prompts[i]
        return prompt.stop, prompt.max_new_tokens, prompt.sampling is None, -len(prompt.tokens), prompt.tokens

    batch: list[int] = []
    for i in sorted(range(len(prompts)), key=key):
        if batch:
            first = prompts[batch[0]]
            width = len(first.tokens) + first.max_new_tokens
            full = len(batch) >= ROWS or (len(batch) + 1) * width > token_budget
            if full or key(i)[:3] != key(batch[0])[:3]:
                yield batch
                batch = []
        batch.append(i)
    if batch:
        yield batch


def _continued(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], max_length: int
) -> list[Answer]:
    """Write answers to prompts that have the same stops and the same limit, all of them drawn or none."""
    limit = prompts[0].max_new_tokens
    room = max_length - limit
    if room <= 0:
        raise TaskError(
            f"an answer must leave room for its prompt: max_gen_toks {limit} given, the model reads {max_length} tokens"
        )
    rows = [prompt.tokens[-room:] for prompt in prompts]
    width = max(len(row) for row in rows)
    known = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id)  # lm-eval's order
    pad = next((token for token in known if token is not None), 0)
    tokens = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    stop = [*prompts[0].stop]
    if tokenizer.eos_token_id is not None:
        stop.append(str(tokenizer.decode([tokenizer.eos_token_id])))
    generate: Any = model.generate  # transformers' types lose it
    made = generate(
        input_ids=tokens,
        attention_mask=mask,
        max_length=width + limit,
        do_sample=False,
        pad_token_id=pad,
        use_cache=True,
        logits_processor=[draw for draw in [_drawer(prompts)] if draw],
        stopping_criteria=[_stopper(tokenizer, stop, width)],
    )
    written = made[:, width:]
    counts = [max(1, len(row) - _trailing(row, pad)) for row in written.tolist()]
    whole = tokenizer.batch_decode(written)
    shown = tokenizer.batch_decode(written, skip_special_tokens=True)
    return [
        Answer(_until(text, stop), count, any(term and term in all_of_it for term in stop))
        for text, count, all_of_it in zip(shown, counts, whole, strict=True)
    ]


def _drawer(prompts: Sequence[Prompt]) -> Callable[..., torch.Tensor] | None:
    """Have the likeliest token be a draw, by noise of each prompt's own (the Gumbel-max trick); None: nothing is drawn.

    Source: Maddison, Tarlow and Minka, "A* Sampling", 2014, section 2.
    """
    wanted = [prompt.sampling for prompt in prompts if prompt.sampling is not None]
    if not wanted:
        return None
    seeds = [torch.Generator().manual_seed(sampling.seed) for sampling in wanted]

    def draw(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        rows = [_likely(row.float(), sampling) for row, sampling in zip(scores, wanted, strict=True)]
        noise = [-torch.log(-torch.log(torch.rand(len(row), generator=seed).clamp_(1e-20, 1 - 1e-7)))
                 for row, seed in zip(rows, seeds, strict=True)]  # fmt: skip
        return torch.stack(rows) + torch.stack(noise).to(scores.device)

    return draw


def _likely(row: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Scale one row of logits (tokens,) and leave out what is not among the likeliest."""
    row = row / sampling.temperature
    if 0 < sampling.top_k < len(row):
        row = row.masked_fill(row < row.topk(sampling.top_k).values[-1], -torch.inf)
    if sampling.top_p < 1:
        ordered, places = row.sort(descending=True)
        before = ordered.softmax(0).cumsum(0) - ordered.softmax(0)  # share of those that are likelier
        row = row.index_fill(0, places[before >= sampling.top_p], -torch.inf)
    return row


def _stopper(tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], width: int) -> Callable[..., torch.Tensor]:
    def stops(tokens: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        texts = tokenizer.batch_decode(tokens[:, width:])
        done = [any(term and term in text for term in stop) for text in texts]
        return torch.tensor(done, device=tokens.device)

    return stops


def _trailing(tokens: Sequence[int], pad: int) -> int:
    """Count how many of a row's last tokens are padding."""
    return next((i for i, token in enumerate(reversed(tokens)) if token != pad), len(tokens))


def _until(text: str, stop: Sequence[str]) -> str:
    for term in stop:
        text = text.split(term)[0] if term else text
    return text
