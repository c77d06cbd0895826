"""Drawn answers: by the model's own chances, the same for the same seed, whatever stands beside them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from evals.engine import Engine
from evals.generation import _likely
from evals.outcomes import SEARCH
from evals.tokens import Prompt, Sampling
from tests.evals.conftest import load, words, write_task

PLAIN = Sampling(1.0, 0, 1.0, 0)


def draws(engine: Engine, sampling: Sampling, n: int, length: int = 1) -> list[str]:
    tokens = engine.encoder.text("amber")
    prompts = [Prompt(tokens, (), length, replace(sampling, seed=seed)) for seed in range(n)]
    return [answer.text for answer in engine.generate(prompts)]


def test_a_token_is_drawn_by_its_chance(engine: Engine) -> None:
    tokens = torch.tensor([engine.encoder.text("amber")])
    with torch.inference_mode():
        chances = (engine.model(tokens).logits[0, -1] / 0.05).softmax(0)
    likely = [int(token) for token in chances.topk(3).indices]
    found = Counter(draws(engine, replace(PLAIN, temperature=0.05), 600))
    for token in likely:
        share, chance = found[engine.tokenizer.decode([token])] / 600, float(chances[token])
        assert share == pytest.approx(chance, abs=4 * (chance * (1 - chance) / 600) ** 0.5 + 1e-9)


def test_what_is_not_among_the_likeliest_is_left_out() -> None:
    row = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    shares = {
        "all": _likely(row, PLAIN).softmax(0).tolist(),
        "two": _likely(row, replace(PLAIN, top_k=2)).softmax(0).tolist(),
        "most": _likely(row, replace(PLAIN, top_p=0.7)).softmax(0).tolist(),
        "cold": _likely(row, replace(PLAIN, temperature=0.01)).softmax(0).tolist(),
    }
    assert shares["all"] == pytest.approx([0.5, 0.3, 0.15, 0.05])
    assert shares["two"] == pytest.approx([0.625, 0.375, 0, 0])
    assert shares["most"] == pytest.approx([0.625, 0.375, 0, 0])
    assert shares["cold"] == pytest.approx([1, 0, 0, 0], abs=1e-6)


def test_an_answer_hangs_on_its_seed_alone(engine: Engine) -> None:
    together = draws(engine, PLAIN, 12, length=6)
    assert together == draws(engine, PLAIN, 12, length=6)
    assert len(set(together)) > 6
    tokens = engine.encoder.text("amber")
    alone = [engine.generate([Prompt(tokens, (), 6, replace(PLAIN, seed=seed))])[0].text for seed in range(12)]
    assert alone == together
    greedy = engine.generate([Prompt(tokens, (), 6), Prompt(tokens, (), 6, PLAIN)])
    assert greedy[0] == engine.generate([Prompt(tokens, (), 6)])[0]
    assert greedy[1].text == together[0]


WRITTEN: dict[str, Any] = {
    "output_type": "generate_until", "doc_to_text": "text", "doc_to_target": "answer", "doc_to_choice": None,
    "generation_kwargs": {"until": ["."], "max_gen_toks": 1, "do_sample": True, "temperature": 0.05},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}  # fmt: skip


def test_the_mean_over_draws_is_the_chance_of_a_right_answer(tmp_path: Path, engine: Engine) -> None:
    texts = [words(i, 3) for i in range(20)]
    right = [answer.text for answer in engine.generate([Prompt(engine.encoder.text(text), (), 1) for text in texts])]
    rows = [{"text": text, "answer": answer} for text, answer in zip(texts, right, strict=True)]
    one, many = (
        load(write_task(tmp_path / f"r{k}", rows, repeats=k, **WRITTEN), search=12, holdout=4) for k in (1, 16)
    )
    firsts, means = one.score(engine, SEARCH), many.score(engine, SEARCH)
    assert {row.value for row in firsts} <= {0.0, 1.0}
    assert all(float(16 * row.value).is_integer() and len(row.lengths) == 16 for row in means)
    assert [row.answer.split("\n")[0] for row in means] == [row.answer for row in firsts]  # type: ignore[union-attr]
    assert means == many.score(engine, SEARCH)
    by_item = {row.item: row.value for row in means}
    for text, answer in zip(texts, right, strict=True):
        with torch.inference_mode():
            logits = engine.model(torch.tensor([engine.encoder.text(text)])).logits[0, -1]
        chance = float((logits / 0.05).softmax(0).max())
        item = next((row.item for row in firsts if text in asked_of(one, row.item)), None)
        if item is not None and answer:
            assert by_item[item] == pytest.approx(chance, abs=4 * (chance * (1 - chance) / 16) ** 0.5 + 0.1)


def asked_of(harness: Any, item: str) -> str:
    return next(str(a.requests[0].instance.args[0]) for a in harness.asked(SEARCH) if a.item.hash == item)


def test_a_tasks_own_filter_gets_all_draws_as_in_lm_eval(tmp_path: Path, engine: Engine) -> None:
    rows = [{"text": words(i, 3), "answer": "x"} for i in range(20)]
    vote = [{"name": "vote", "filter": [{"function": "majority_vote"}, {"function": "take_first"}]}]
    path = write_task(tmp_path / "t", rows, repeats=7, filter_list=vote, **WRITTEN)
    harness = load(path, search=12, holdout=4)
    for row, asked in zip(harness.score(engine, SEARCH), harness.asked(SEARCH), strict=True):
        instance = asked.requests[0].instance
        assert len(instance.resps) == 7
        assert row.value in (0.0, 1.0)
        assert instance.filtered_resps["vote"] == Counter(instance.resps).most_common(1)[0][0]
