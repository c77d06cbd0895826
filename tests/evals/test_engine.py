"""The engine: packed equals plain for many architectures, twice is the same bits, and a NaN is never a score."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from evals.engine import Engine
from evals.errors import ScoreError, TaskError
from evals.packing import Row, plan
from evals.tokens import Encoder, Pair
from tests.pico import byte_tokenizer

SIZES = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def toy(kind: str, **options: object) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **(SIZES | options))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            parameter.data.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.15)
    return model


def pairs(n: int = 30, *, seed: int = 0, longest: int = 40) -> list[Pair]:
    """Contexts with one to four continuations; some contexts begin alike, some continuations too."""
    rng = random.Random(seed)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, 259) for _ in range(rng.randint(low, high)))

    head = tokens(10, 10)
    made = []
    while len(made) < n:
        context = (head if rng.random() < 0.5 else ()) + tokens(1, longest)
        stem = tokens(0, 2)
        made += [Pair(context, stem + tokens(1, 5)) for _ in range(rng.randint(1, 4))]
    return made


def pairs_after_shots(n: int = 60) -> list[Pair]:
    """Items that begin with the same 150 tokens, half of them with 80 more: a stem on a stem."""
    rng = random.Random(1)
    shots, more = (tuple(rng.randrange(3, 259) for _ in range(size)) for size in (150, 80))
    return [
        Pair(shots + more * (i % 2) + pair.context, pair.continuation)
        for i, pair in enumerate(pairs(n, seed=2, longest=20))
    ] + [Pair(shots[:-2], shots[-2:]), Pair(shots, (5,))]


def plainly(model: PreTrainedModel, pair: Pair) -> float:
    tokens = torch.tensor([pair.context + pair.continuation])
    with torch.inference_mode():
        logprobs = model(input_ids=tokens[:, :-1]).logits[0].log_softmax(-1)
    first = len(pair.context) - 1
    return sum(logprobs[first + i, token].item() for i, token in enumerate(pair.continuation))


PACKING = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "olmo2": {},
    "phi": {},
    "phi3": {},
    "gpt_neox": {},
    "gpt2": {"n_positions": 512, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "gemma2": {"final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8, "sliding_window": 512},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
}
PLAIN = {
    "bloom": {"n_layer": 2, "n_head": 4},
    "mamba": {"state_size": 8, "hidden_act": "silu"},
    "mistral": {"sliding_window": 16},
}


@pytest.mark.parametrize(("kind", "packs"), [*((k, True) for k in PACKING), *((k, False) for k in PLAIN)])
def test_every_architecture_gives_the_plain_numbers(kind: str, packs: bool) -> None:
    model = toy(kind, **(PACKING if packs else PLAIN)[kind])
    engine = Engine(model, byte_tokenizer(), token_budget=256)
    for asked in (pairs(), pairs_after_shots()):
        found = [score for score, _ in engine.loglikelihoods(asked)]
        assert found == pytest.approx([plainly(model, pair) for pair in asked], abs=2e-4)
    items, after_shots = (batches for _, batches in engine._plans.values())
    assert any(batch.ends is not None for batch in items) == packs
    assert len({batch.stem for batch in after_shots} - {None}) == 2 * packs


def test_capped_logits_are_not_made_from_hidden_states() -> None:
    assert not Engine(toy("gemma2", **PACKING["gemma2"]), byte_tokenizer(), token_budget=256).gathers
    assert Engine(toy("llama"), byte_tokenizer(), token_budget=256).gathers


def test_twice_the_same_bits_in_bfloat16_also_after_another_candidate() -> None:
    model = toy("llama").to(torch.bfloat16)
    engine = Engine(model, byte_tokenizer(), token_budget=256)
    asked = pairs()
    first = engine.loglikelihoods(asked)
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
        assert engine.loglikelihoods(asked) != first
        for name, parameter in model.named_parameters():
            parameter.copy_(kept[name])
    assert engine.loglikelihoods(asked) == first


def test_greedy_means_what_decoding_would_give() -> None:
    model = toy("llama")
    engine = Engine(model, byte_tokenizer(), token_budget=256)
    context = pairs()[0].context
    made = model.generate(torch.tensor([context]), max_new_tokens=5, do_sample=False, pad_token_id=2)[0].tolist()
    best = tuple(made[len(context) :])
    other = (*best[:-1], (best[-1] + 1) % 259)
    assert [greedy for _, greedy in engine.loglikelihoods([Pair(context, best), Pair(context, other)])] == [True, False]


@pytest.mark.parametrize("where", ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"])
def test_a_nan_is_an_error(where: str) -> None:
    model = toy("llama")
    engine = Engine(model, byte_tokenizer(), token_budget=256)
    asked = pairs()
    engine.check_finite()
    model.get_parameter(where).data[5] = float("nan")
    with pytest.raises(ScoreError, match="not finite"):
        engine.loglikelihoods(asked)
    with pytest.raises(ScoreError, match="not finite"):
        engine.check_finite()


def test_a_continuation_longer_than_the_context_is_refused() -> None:
    engine = Engine(toy("llama", max_position_embeddings=64), byte_tokenizer(), token_budget=64)
    with pytest.raises(TaskError, match="65 tokens given, the model reads 64"):
        engine.loglikelihoods([Pair((0,), tuple(range(65)))])


def test_text_that_begins_with_the_prefix_token_is_not_given_another() -> None:
    encoder = Encoder(byte_tokenizer())
    assert encoder.pair("", "<s>ab") == Pair((0,), encoder.text("ab"))
    assert encoder.pair("", "ab") == Pair((0,), encoder.text("ab"))
    assert encoder.text("<s>ab")[0] == 0
    with pytest.raises(TaskError, match="must each have a token"):
        encoder.pair("  ", "ab")


def ancestors(row: Row, node: int) -> list[tuple[int, int]]:
    """Tokens and depths of all that a node reads, through the stems."""
    below = [] if row.stem is None else ancestors(row.stem, len(row.stem.tokens) - 1)
    return below + [(row.tokens[j], row.depths[j]) for j in range(node + 1) if row.ends[j] > node]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.builds(
            Pair,
            st.lists(st.integers(0, 2), min_size=1, max_size=9).map(tuple),
            st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple),
        ),
        max_size=40,
    ),
    st.booleans(),
    st.sampled_from([None, 0, -20]),
    st.integers(1, 60),
)
def test_each_token_is_predicted_after_exactly_its_own_past(
    asked: list[Pair], branching: bool, pass_tokens: int | None, budget: int
) -> None:
    seen: list[tuple[int, int]] = []
    read: list[Row] = []
    for batch in plan(asked, token_budget=budget, branching=branching, pass_tokens=pass_tokens):
        assert len(batch) == 1 or len(batch) * len(batch[0].tokens) <= budget
        for row in batch:
            for request, skipped, nodes in row.requests:
                for i, node in enumerate(nodes, start=skipped):
                    past = ancestors(row, node)
                    assert [token for token, _ in past] == [*asked[request].context, *asked[request].continuation[:i]]
                    assert [depth for _, depth in past] == [*range(len(past))]
                    seen.append((request, i))
            if not branching:
                assert set(row.ends) == {len(row.tokens)}
        assert len({id(row.stem) for row in batch}) == 1
        assert batch[0].stem is None or batch[0].stem in read
        read += batch
    assert sorted(seen) == [(request, i) for request, pair in enumerate(asked) for i in range(len(pair.continuation))]


def test_each_context_is_read_once_also_where_a_row_ends() -> None:
    asked = []
    for item in range(20):
        context = (3 + item, *range(50, 80))
        asked += [Pair(context, (100 + choice, 7, 8)) for choice in range(4)]
    packed = [row for batch in plan(asked, token_budget=256, branching=True) for row in batch]
    assert len(packed) > 1
    assert sum(len(row.tokens) for row in packed) == 20 * (31 + 4 * 2)
