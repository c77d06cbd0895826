"""In bf16 every way to batch rounds otherwise: ours lies as near to the float32 numbers as HFLM's does.

Minutes of a real model, so not in the default run: pytest -m real tests/evals/test_parity_real.py
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from evals.engine import Engine
from evals.lm_harness import Harness
from evals.outcomes import SEARCH
from evals.tokens import Pair
from optimizer.demo.models import build_base
from optimizer.demo.tasks import OWN_TASKS, write_python_prose
from optimizer.errors import CheckpointError
from tests.conftest import ROOT
from tests.evals.conftest import load, write_task
from tests.evals.test_parity import evaluate

pytestmark = [pytest.mark.slow, pytest.mark.real]

BATCH_SIZES = (1, 16)
FACTOR = 1.5  # of the root mean squares of some fifty roundings, or of the counts of flips


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Engine]:
    """SmolLM2-135M in bf16, and the same numbers in float32."""
    folder = ROOT / "runs" / "demo-inputs" / "base"
    if not (folder / "config.json").exists():
        try:
            folder = build_base(tmp_path_factory.mktemp("real") / "base")
        except CheckpointError as error:
            pytest.skip(str(error))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rounded, wide = (
        Engine(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), tokenizer, token_budget=2048)
        for dtype in (torch.bfloat16, torch.float32)
    )
    return rounded, wide


@dataclass(frozen=True, slots=True)
class Case:
    """A task and how many of its items are scored."""

    write: str
    items: int
    metric: str
    shots: int = 0


CASES = {
    "four choices": Case("words", 40, "acc"),
    "four choices, three shots": Case("words", 12, "acc_norm", shots=3),
    "rolling text": Case("prose", 6, "bits_per_byte"),
    "answers of 12 tokens": Case("written", 16, "exact_match"),
}


def write(case: Case, folder: Path) -> Path:
    """The task's folder, with so many items and three more for the shots."""
    if case.write == "prose":
        made = write_python_prose(folder)
        file = next(made.glob("*.jsonl"))
        file.write_text("".join(file.read_text().splitlines(keepends=True)[: case.items]))
        return made
    source = OWN_TASKS / "general_knowledge"
    settings = yaml.safe_load((source / "general_knowledge.yaml").read_text())
    rows = [json.loads(line) for line in (source / "general_knowledge.jsonl").read_text().splitlines()]
    own: dict[str, Any] = {"task": case.write}
    if case.shots:
        own["fewshot_config"] = {"sampler": "first_n", "samples": rows[-case.shots - 1 :]}
    if case.write == "written":
        own |= {
            "output_type": "generate_until",
            "doc_to_target": "{{choices[gold]}}",
            "doc_to_choice": None,
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 12, "do_sample": False},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        }
    kept = {key: value for key, value in settings.items() if key not in ("dataset_kwargs", "metadata")}
    return write_task(folder / case.write, rows[: case.items], **kept | own)


@dataclass(frozen=True, slots=True)
class Answers:
    """Of every item in one order: log-likelihoods of its choices or its text, what was written, the metric's value."""

    loglikelihoods: torch.Tensor  # (all choices of all items,)
    texts: list[str]
    values: list[float]

    @classmethod
    def of(cls, answers: Iterable[Any], values: Iterable[float]) -> Answers:
        flat = [answer[0] if isinstance(answer, tuple | list) else answer for answer in answers]
        numbers = [answer for answer in flat if not isinstance(answer, str)]
        texts = [answer for answer in flat if isinstance(answer, str)]
        return cls(torch.tensor(numbers, dtype=torch.float64), texts, list(values))

    def distance(self, other: Answers) -> float:
        """Root mean square of the differences between log-likelihoods, in nats; 0 where there are none."""
        apart = self.loglikelihoods - other.loglikelihoods
        return float(apart.square().mean().sqrt()) if len(apart) else 0.0

    def flips(self, other: Answers) -> int:
        """Answers of another text, or items that are right here and wrong there; a text that is scored never flips."""
        if not set(self.values) <= {0.0, 1.0}:
            return 0
        mine, others = (self.texts, other.texts) if self.texts else (self.values, other.values)
        return sum(a != b for a, b in zip(mine, others, strict=True))

    @property
    def score(self) -> float:
        return fmean(self.values)


def ours(harness: Harness, engine: Engine) -> Answers:
    outcomes = harness.score(engine, SEARCH)
    return Answers.of((asked.resps[0] for asked in harness.requests(SEARCH)), (o.value / o.weight for o in outcomes))


def theirs(lm: HFLM, folder: Path, case: Case, docs: Sequence[str]) -> Answers:
    logged = evaluate(lm, folder / f"{folder.name}.yaml", num_fewshot=case.shots)["samples"][folder.name]
    samples = {repr(sample["doc"]): sample for sample in logged}
    answers = [answer for doc in docs for answer in samples[doc]["filtered_resps"]]
    return Answers.of(answers, (_value(samples[doc][case.metric]) for doc in docs))


def _value(metric: float | tuple[float, int]) -> float:
    """An item's value from lm-eval's: as it is, or bits per byte from log-likelihood and bytes."""
    return -metric[0] / math.log(2) / metric[1] if isinstance(metric, tuple | list) else float(metric)


@pytest.mark.parametrize("name", CASES)
def test_as_near_to_float32_as_hflm(
    name: str, tmp_path: Path, real: tuple[Engine, Engine], capsys: pytest.CaptureFixture[str]
) -> None:
    """In float32 ours and HFLM's numbers are the same (test_parity), so ours stand for what bf16 rounds."""
    rounded, wide = real
    case = CASES[name]
    folder = write(case, tmp_path)
    harness = load(folder, search=case.items - 1, shots=case.shots, metric=case.metric)
    exact, found = ours(harness, wide), ours(harness, rounded)
    docs = [repr(item.doc) for item in harness.tasks[0].items[SEARCH]]
    lms = [HFLM(rounded.model, tokenizer=rounded.tokenizer, batch_size=size) for size in BATCH_SIZES]
    alone, together = (theirs(lm, folder, case, docs) for lm in lms)
    pairs = {
        "ours and float32": (found, exact),
        "HFLM at 1 and float32": (alone, exact),
        "HFLM at 16 and float32": (together, exact),
        "HFLM at 1 and at 16": (alone, together),
        "ours and HFLM at 1": (found, alone),
        "ours and HFLM at 16": (found, together),
    }
    with capsys.disabled():
        scores = ", ".join(f"{answers.score:.3f}" for answers in (found, alone, together, exact))
        print(f"\n{name}, {len(docs)} items: scores of ours, HFLM at 1, at 16, float32: {scores}")
        for what, (a, b) in pairs.items():
            print(f"  {what}: {a.distance(b):.4f} nats apart, {a.flips(b)} flips")
    assert found.distance(exact) <= FACTOR * min(alone.distance(exact), together.distance(exact))
    assert found.flips(exact) <= max(1, FACTOR * max(alone.flips(exact), together.flips(exact)))


@pytest.mark.parametrize("name", ["four choices", "rolling text"])
def test_in_float32_as_near_to_float64_as_hflm(
    name: str, tmp_path: Path, real: tuple[Engine, Engine], capsys: pytest.CaptureFixture[str]
) -> None:
    """Choices alike, whole texts much nearer: where the two differ in a fourth decimal, the rounding is HFLM's."""
    _, wide = real
    case = replace(CASES[name], items=7)
    folder = write(case, tmp_path)
    harness = load(folder, search=case.items - 1, metric=case.metric)
    found = ours(harness, wide)
    docs = [repr(item.doc) for item in harness.tasks[0].items[SEARCH]]
    alone, together = (
        theirs(HFLM(wide.model, tokenizer=wide.tokenizer, batch_size=size), folder, case, docs) for size in BATCH_SIZES
    )
    model = deepcopy(wide.model).double()
    exact = Answers.of((_exactly(model, pair) for pair in harness.pairs(SEARCH, wide.max_length)), [])
    apart = [answers.distance(exact) for answers in (found, alone, together)]
    with capsys.disabled():
        print("\n{}, float32 and float64: ours {:.1e} nats apart, HFLM at 1 {:.1e}, at 16 {:.1e}".format(name, *apart))
    assert apart[0] <= FACTOR * min(apart[1:])


def _exactly(model: Any, pair: Pair) -> float:
    tokens = torch.tensor([pair.context + pair.continuation])
    with torch.inference_mode():
        logprobs = model(input_ids=tokens[:, :-1]).logits[0].log_softmax(-1)
    first = len(pair.context) - 1
    return float(logprobs[first:].gather(-1, tokens[0, first + 1 :, None]).sum())
