"""A teacher's beliefs: exact where they are kept whole, never more than the full divergence, and none from oneself."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import kl_div

from evals.engine import Engine
from evals.teachers import LIKELIEST, Beliefs
from evals.tokens import Pair

PAIRS = [
    Pair((5, 9, 11, 3), (7, 2)), Pair((5, 9, 11, 3), (8,)), Pair((5, 9, 4), (1, 6, 30)),
    Pair(tuple(range(3, 90)), (3, 9, 9, 12, 5, 5, 7, 40, 41, 42, 43, 44)),
]  # fmt: skip


def logits(seed: int, vocabulary: int = 200) -> torch.Tensor:
    return 3 * torch.randn(5, vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def full(teacher: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    found = kl_div(candidate.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True)
    return found.sum(-1)


def test_all_but_one_token_is_the_whole_vocabulary() -> None:
    teacher, candidate = logits(0, 40), logits(1, 40)
    assert torch.allclose(Beliefs.of(teacher).divergences(candidate), full(teacher, candidate), rtol=1e-5)


def test_the_rest_as_one_event_is_at_most_the_whole_divergence() -> None:
    teacher, candidate = logits(0), logits(1)
    found = Beliefs.of(teacher).divergences(candidate)
    assert (found <= full(teacher, candidate)).all()
    assert (found > 0.8 * full(teacher, candidate)).all()
    probabilities = Beliefs.of(teacher).logprobs.exp().sum(-1) + Beliefs.of(teacher).rest.exp()
    assert torch.allclose(probabilities, torch.ones(5), atol=1e-6)


def test_a_rest_of_almost_nothing_is_not_lost() -> None:
    sure = torch.zeros(1, 200, dtype=torch.float64)
    sure[0, :LIKELIEST] = 60.0
    found = Beliefs.of(logits(0)[:1]).divergences(sure)
    assert torch.isfinite(found).all()
    assert found > 20 * Beliefs.of(logits(0)[:1]).rest.exp()


def test_a_model_agrees_with_itself_alone(engine: Engine) -> None:
    beliefs = engine.beliefs(PAIRS)
    assert [len(part.rest) for part in beliefs] == [len(pair.continuation) for pair in PAIRS]
    assert engine.agreements(PAIRS, beliefs) == pytest.approx([0.0] * len(PAIRS), abs=1e-5)
    for pair, held in zip(PAIRS, beliefs, strict=True):
        tokens = torch.tensor([pair.context + pair.continuation])[:, -engine.max_length - 1 :]
        with torch.inference_mode():
            plain = engine.model(input_ids=tokens[:, :-1], use_cache=False).logits[0, -len(pair.continuation) :]
        assert torch.allclose(held.divergences(plain), torch.zeros(len(held.rest)), atol=1e-5)
        assert torch.allclose(held.logprobs[:, 0], plain.log_softmax(-1).amax(-1), atol=1e-5)
    other = Beliefs.of(logits(3, 259)[:2].float())
    told = engine.agreements(PAIRS[:1], [other])
    with torch.inference_mode():
        plain = engine.model(input_ids=torch.tensor([[5, 9, 11, 3, 7]]), use_cache=False).logits[0, -2:]
    assert told == pytest.approx([-float(other.divergences(plain).sum())], rel=1e-5)
