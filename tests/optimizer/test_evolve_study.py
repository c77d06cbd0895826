"""A configuration of mergekit-evolve with five tasks: converted, checked, searched, and its best point exported."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from evals.engine import Engine
from evals.tokens import Prompt
from optimizer.run import open_run
from optimizer.strict_yaml import read_yaml
from tests.evals.conftest import questions, words, write_task
from tests.optimizer.test_cli import call
from tests.pico import pico_expert, pico_llama

pytestmark = pytest.mark.slow  # a whole study is run

GENOME = """\
genome:
  models: &models [./law, ./code]
  merge_method: task_arithmetic
  base_model: ./base
  tokenizer_source: base
  layer_granularity: 2
  allow_negative_weights: no
  filters: [q_proj, mlp]
tasks:
  - {name: knows, weight: 1.0, metric: "acc,none"}
  - {name: prefers, metric: "acc_norm,none"}
  - {name: agrees, metric: "f1,none"}
  - {name: foretells, metric: "perplexity,none"}
  - {name: writes, metric: "exact_match,none"}
limit: 30
num_fewshot: 0
apply_chat_template: False
"""
MEAN = {"aggregation": "mean", "higher_is_better": True}


class Teacher:
    """An expert that makes the answers of tasks, so that it beats the base."""

    def __init__(self, model: Path) -> None:
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.engine = Engine(loaded, AutoTokenizer.from_pretrained(model), token_budget=512)

    def written(self, texts: list[str]) -> list[str]:
        made = self.engine.generate([Prompt(self.engine.encoder.text(text), (".",), 3) for text in texts])
        return [answer.text for answer in made]

    def chosen(self, rows: list[dict[str, Any]]) -> list[int]:
        pair = self.engine.encoder.pair
        asked = [[pair(f"Question: {row['question']}\nAnswer:", f" {c}") for c in row["choices"]] for row in rows]
        scores = iter(self.engine.loglikelihoods([pair for pairs in asked for pair in pairs]))
        found = [[next(scores)[0] / len(choice) for choice in row["choices"]] for row in rows]
        return [max(range(len(each)), key=each.__getitem__) for each in found]


def tasks(folder: Path, teachers: list[Teacher]) -> None:
    """Write tasks; what is right is what one expert or the other answers."""
    texts = [words(i, 6) for i in range(90)]
    right = list(zip(*(teacher.written(texts) for teacher in teachers), strict=True))
    rows = [{"text": text, "last": f" {words(i + 3, 1)}", "answer": right[i][i % 2]} for i, text in enumerate(texts)]

    sample = Random(0).sample

    def asked(word: str, choices: int = 4) -> list[dict[str, Any]]:
        letters = [sample("abcdefghijklmnopqrstuvwxyz", choices) for _ in range(90)]
        found = [{"question": f"{word} {row['question']}", "choices": chosen}
                 for row, chosen in zip(questions(90), letters, strict=True)]  # fmt: skip
        golds = list(zip(*(teacher.chosen(found) for teacher in teachers), strict=True))
        return [{**row, "gold": golds[i][i % 2]} for i, row in enumerate(found)]

    said: dict[str, Any] = {"doc_to_text": "{{text}}", "doc_to_choice": None}
    foretold = {"output_type": "loglikelihood", "doc_to_target": "{{last}}", "metric_list": [{"metric": "perplexity"}]}
    written = {
        "output_type": "generate_until", "doc_to_target": "answer", "metric_list": [{"metric": "exact_match", **MEAN}],
        "generation_kwargs": {"until": ["."], "max_gen_toks": 3},
    }  # fmt: skip
    write_task(folder / "knows", asked("what"))
    write_task(folder / "prefers", asked("so"))
    write_task(folder / "agrees", asked("does", choices=2), metric_list=[{"metric": "f1"}])
    write_task(folder / "foretells", rows, **said, **foretold)
    write_task(folder / "writes", rows, **said, **written)
    write_task(folder / "keeps", questions(90))


def test_five_tasks_of_mergekit_evolve_are_searched_and_the_best_point_is_mergekits_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = pico_llama(tmp_path / "base", layers=4, dtype="float32", tied=False)
    for seed, name in enumerate(("law", "code"), start=1):
        pico_expert(base, tmp_path / name, seed=seed, scale=0.2)
    tasks(tmp_path / "tasks", [Teacher(tmp_path / name) for name in ("law", "code")])
    (tmp_path / "genome.yml").write_text(GENOME)
    words_of = ["--from-evolve", "genome.yml", "--include", "tasks", "--general", "keeps", "--out", "study.yaml"]
    assert call("init", *words_of).exit_code == 0
    changes = ["workers.count=0", "search.trials=16", "search.learned=0", "anchors.derived=none", "workers.threads=1"]
    sets = [word for change in changes for word in ("--set", change)]

    checked = call("check", "study.yaml", *sets)
    assert checked.exit_code == 0, checked.output
    told = " ".join(checked.stdout.split())
    kinds = ["kind q_proj q_proj: 4 tensors in 4 layers", "kind mlp_only mlp: 12 tensors in 4 layers"]
    for part in (*kinds, "f1", "perplexity"):
        assert part in told

    done = call("search", "study.yaml", *sets)
    assert done.exit_code == 0, done.output
    run = open_run(tmp_path / "runs/law-code")
    assert [(task.name, task.metric) for task in run.tasks if task.role == "domain"] == [
        ("knows", "acc"), ("prefers", "acc_norm"), ("agrees", "f1"), ("foretells", "perplexity"),
        ("writes", "exact_match"),
    ]  # fmt: skip
    assert run.points()[["domain_law", "domain_code", "forgetting", "forgetting_high"]].notna().all(axis=None)
    best = next(n for n in run.points().index[::-1] if run.kinds[n].stored == "search")
    assert call("export", "runs/law-code", "--trial", str(best), "--out", "best").exit_code == 0

    merged = load_file(tmp_path / "best/model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "best")
    assert model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=2, do_sample=False).shape == (1, 5)
    document = read_yaml(tmp_path / "best/mergekit.yaml")
    filters = [rule.get("filter") for rule in document["models"][0]["parameters"]["weight"]]
    assert filters[:2] == ["q_proj", "mlp"]
    config = pytest.importorskip("mergekit.config", reason="mergekit is not installed")
    from mergekit.merge import MergeOptions, run_merge

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    options = MergeOptions(quiet=True, copy_tokenizer=False)
    run_merge(config.MergeConfiguration.model_validate(document), str(tmp_path / "theirs"), options)
    theirs = load_file(tmp_path / "theirs/model.safetensors")
    for name, tensor in merged.items():
        torch.testing.assert_close(theirs[name], tensor, atol=2e-6, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
