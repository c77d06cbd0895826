"""The engine: packed equals plain for many architectures, twice is the same bits, and a NaN is never a score."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from evals import trie_attention
from evals.engine import Engine, budget_for
from evals.errors import ScoreError, TaskError
from evals.packing import Trie, build_trie, passes, rows
from evals.predictions import Predictions
from evals.tokens import Encoder, Pair, Prompt
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
    assert engine.packs == packs
    read = sum(batch.tokens.numel() for batch in engine.batches(asked))
    assert (read == len(build_trie(dict(enumerate(asked))))) == packs  # after the same shots: each token once


CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2"])
def test_flex_attention_gives_the_plain_numbers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trie_attention, "_flex_attention", lambda: flex_attention)  # the same arithmetic, uncompiled
    model = toy(kind, **PACKING[kind])
    engine = Engine(model, byte_tokenizer(), token_budget=64)
    engine.packs = engine.flexes = True
    for asked in (pairs(), pairs_after_shots()):
        if kind == "gemma2":
            with pytest.raises(ValueError, match="plain scaled dot products only"):
                engine.loglikelihoods(asked)
        else:
            found = [score for score, _ in engine.loglikelihoods(asked)]
            assert found == pytest.approx([plainly(model, pair) for pair in asked], abs=2e-4)


@CUDA
@pytest.mark.parametrize(("kind", "packs"), [*((k, True) for k in PACKING), *((k, False) for k in PLAIN)])
def test_a_cuda_device_gives_the_plain_numbers(kind: str, packs: bool) -> None:
    sizes = {"hidden_size": 64, "head_dim": 16, "n_embd": 64} | (PACKING if packs else PLAIN)[kind]
    model = toy(kind, **sizes).eval()
    asked = [*pairs(), *pairs_after_shots()]
    expected = [plainly(model, pair) for pair in asked]
    engine = Engine(model.cuda(), byte_tokenizer(), token_budget=256)
    assert (engine.packs, engine.flexes) == (packs, packs and kind != "gemma2")
    found = [score for score, _ in engine.loglikelihoods(asked)]
    assert found == pytest.approx(expected, abs=5e-3)
    with torch.enable_grad():
        model.requires_grad_(True)
        loss = engine.backward(asked[:5], lambda x: -x.sum())
    assert loss == pytest.approx(-sum(expected[:5]), abs=5e-3)


LONG_ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [8.0] * 4}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("mistral", {"sliding_window": 40}),
        ("phi3", {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 40}),
    ],
)
def test_only_what_is_longer_than_a_window_is_read_plainly(kind: str, options: dict[str, Any]) -> None:
    model = toy(kind, **options)
    engine = Engine(model, byte_tokenizer(), token_budget=256)
    asked = pairs(longest=60)
    found = [score for score, _ in engine.loglikelihoods(asked)]
    assert found == pytest.approx([plainly(model, pair) for pair in asked], abs=2e-4)
    plans = [batch.plan for batch in engine.batches(asked)]
    assert None in plans
    assert any(plan is not None for plan in plans)


@pytest.mark.parametrize(("kind", "option"), [("gemma2", "final_logit_softcapping"), ("granite", "logits_scaling")])
def test_a_head_that_is_hardly_changed_is_noticed(kind: str, option: str) -> None:
    def engine(value: float | None) -> Engine:
        return Engine(toy(kind, **(PACKING[kind] | {option: value})), byte_tokenizer(), token_budget=256)

    assert not engine(1000.0 if kind == "gemma2" else 1.001).gathers  # either changes no logit by a thousandth
    assert engine(None if kind == "gemma2" else 1.0).gathers


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


def test_equal_pairs_are_planned_once_and_others_anew() -> None:
    engine = Engine(toy("llama"), byte_tokenizer(), token_budget=256)
    planned = engine.batches(pairs())
    assert engine.batches(pairs()) is planned
    assert engine.batches(pairs(seed=1)) is not planned


def test_an_error_between_passes_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy("llama")
    engine = Engine(model, byte_tokenizer(), token_budget=256)
    before = model.config._attn_implementation
    monkeypatch.setattr(Predictions, "scores", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:  # keeps the traceback, and so the frames
        engine.loglikelihoods(pairs())
    assert model.config._attn_implementation == before, caught


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
    engine = Engine(toy("llama"), byte_tokenizer(), token_budget=256)
    plain = Engine(toy("llama"), byte_tokenizer(), token_budget=256)
    plain.packs = False
    short = [Pair((5,), (7,)), Pair((6, 7), (8, 9))]  # where attention without a mask was seen to hide it
    prompt = Prompt((5, 6), (), 4)
    for reader in (engine, plain):
        reader.generate([prompt])
        reader.model.get_parameter(where).data[5] = float("nan")
        for asked in (pairs(), short):
            with pytest.raises(ScoreError, match="not finite"):
                reader.loglikelihoods(asked)
        with pytest.raises(ScoreError, match="not finite"):
            reader.generate([prompt])


def test_a_token_budget_is_a_power_of_two_that_fits() -> None:
    on_cpu = toy("llama")
    with torch.device("meta"):
        elsewhere = AutoModelForCausalLM.from_config(on_cpu.config, dtype=torch.bfloat16)
    assert budget_for(on_cpu, 0) == 2048
    assert budget_for(elsewhere, 1 << 40) == 16384
    assert budget_for(elsewhere, 0) == 256
    token = 2 * (16 * 32 + 3 * 64)  # bytes
    assert budget_for(elsewhere, 2 * 5000 * token) == 4096


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


REQUESTS = st.lists(
    st.builds(
        Pair,
        st.lists(st.integers(0, 2), min_size=1, max_size=9).map(tuple),
        st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple),
    ),
    max_size=40,
)


def past(trie: Trie, node: int) -> list[int]:
    return [j for j in range(node + 1) if trie.ends[j] > node]


@settings(max_examples=100, deadline=None)
@given(REQUESTS)
def test_each_token_is_predicted_after_exactly_its_own_past(asked: list[Pair]) -> None:
    trie = build_trie(dict(enumerate(asked)))
    for node, request, i in trie.predictions:
        before = past(trie, node)
        assert [trie.tokens[j] for j in before] == [*asked[request].context, *asked[request].continuation[:i]]
        assert [trie.depths[j] for j in before] == [*range(len(before))]
        assert trie.above(node) == before[:-1]
    expected = [(request, i) for request, pair in enumerate(asked) for i in range(len(pair.continuation))]
    assert sorted(what for _, *what in trie.predictions) == sorted(map(list, expected))
    assert len(trie) == len({(*pair.context, *pair.continuation)[:n] for pair in asked for n in lengths(pair)})


def lengths(pair: Pair) -> range:
    """Of what is read for a pair, and of all that it begins with."""
    return range(1, len(pair.context) + len(pair.continuation))


@settings(max_examples=100, deadline=None)
@given(REQUESTS, st.integers(1, 60))
def test_passes_hold_every_node_once_and_carry_what_they_read(asked: list[Pair], budget: int) -> None:
    trie = build_trie(dict(enumerate(asked)))
    read: list[int] = []
    kept: set[int] = set()
    for this in passes(trie, budget):
        assert 0 < this.stop - this.start <= budget
        assert set(this.carried) <= kept  # of the pass before, or carried by it
        assert [trie.depths[node] for node in this.carried] == [*range(len(this.carried))]
        for block in this.blocks:
            nodes = range(block.start, block.stop)
            assert {j for node in nodes for j in past(trie, node)} == {*block.above, *nodes}
            assert {node for node in block.above if node < this.start} <= set(this.carried)
            read += nodes
        kept = {*this.carried, *range(this.start, this.stop)}
    assert read == [*range(len(trie))]


@settings(max_examples=60, deadline=None)
@given(REQUESTS, st.integers(1, 60))
def test_rows_hold_every_request_once(asked: list[Pair], budget: int) -> None:
    seen: list[tuple[int, int]] = []
    for batch in rows(dict(enumerate(asked)), budget):
        assert len(batch) == 1 or len(batch) * len(batch[0].tokens) <= budget
        for row in batch:
            for node, request, i in row.predictions:
                assert row.tokens[: node + 1] == (*asked[request].context, *asked[request].continuation[:i])
                seen.append((request, i))
    assert sorted(seen) == [(request, i) for request, pair in enumerate(asked) for i in range(len(pair.continuation))]
