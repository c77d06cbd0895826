"""Small tasks and a pico model for the tests of evals; nothing here or below may reach a network."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from evals.engine import Engine
from evals.lm_harness import Harness
from evals.lm_tasks import load_tasks
from evals.outcomes import REST, Chat, TaskSpec
from tests.pico import pico_llama

CONTEXT = 96  # tokens of the pico model, so that some items are longer
WORDS = "amber Birke ćwierk дуб été fjörd γάτα hügel île jazz 木 ñandú øre περί 🌳 salt tide".split()  # noqa: SIM905


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The pico model in float32, with a context of CONTEXT tokens."""
    folder = pico_llama(tmp_path_factory.mktemp("models") / "base", dtype="float32", context=CONTEXT)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return Engine(model, AutoTokenizer.from_pretrained(folder), token_budget=256)


def words(seed: int, n: int) -> str:
    """Words that differ with the seed, some of them not in ASCII."""
    return " ".join(WORDS[(seed * 7 + i * (seed % 5 + 1) + i * i) % len(WORDS)] for i in range(n))


def questions(n: int = 24) -> list[dict[str, Any]]:
    """Four-choice items; every seventh is longer than the pico model's context."""
    return [
        {
            "question": f"{i}: {words(i, 20 if i % 7 == 6 else 3)}",
            "choices": [words(i + c, 1 + (i + c) % 3) + str(c) for c in range(4)],
            "gold": i % 4,
        }
        for i in range(n)
    ]


def write_task(folder: Path, rows: Sequence[Mapping[str, Any]], **settings: Any) -> Path:
    """A task folder: one JSON-lines file and one YAML file whose settings default to multiple choice."""
    folder.mkdir(parents=True, exist_ok=True)
    name = settings.get("task", folder.name)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    defaults = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
    }
    config = {key: value for key, value in (defaults | settings).items() if value is not None}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config, allow_unicode=True, sort_keys=False))
    return folder


def load(*paths: Path | str, search: int = 12, holdout: int | float = REST, **options: Any) -> Harness:
    """Tasks as general ones, with search items first."""
    code = options.pop("allow_task_code", False)
    given = {"template": "chat_template", "system": "system", "multiturn": "multiturn"}
    chat = Chat(**{key: options.pop(name) for key, name in given.items() if name in options})
    specs = [TaskSpec(str(path), "general", search_items=search, holdout_items=holdout, **options) for path in paths]
    return load_tasks(specs, seed=0, chat=chat, allow_task_code=code)
