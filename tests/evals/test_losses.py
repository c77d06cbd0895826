"""What weights are learned from agrees with what is scored."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evals.engine import Engine
from evals.errors import TaskError
from evals.lm_examples import examples
from evals.losses import Example, task_losses
from evals.outcomes import Outcome
from tests.evals.conftest import load, questions, words, write_task


def lesson_of(folder: Path, engine: Engine, **options: Any) -> tuple[list[Example], list[Outcome], dict[str, float]]:
    """A task's examples, its outcomes, and its loss with the model as it is."""
    harness = load(folder, **options)
    outcomes = harness.score(engine, "search")
    taught = examples(harness, "search", engine)
    found = engine.loglikelihoods([pair for example in taught for pair in example.pairs])
    losses = task_losses(taught, torch.tensor([x for x, _ in found], dtype=torch.float64))
    return taught, outcomes, {task: float(loss) for task, loss in losses.items()}


def test_a_texts_loss_is_its_bits_per_byte(tmp_path: Path, engine: Engine) -> None:
    rows = [{"text": words(i, 4 + 9 * (i % 6))} for i in range(20)]  # some are longer than the context
    folder = write_task(
        tmp_path / "texts", rows, output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}",
        doc_to_choice=None, metric_list=[{"metric": "bits_per_byte"}],
    )  # fmt: skip
    taught, outcomes, losses = lesson_of(folder, engine)
    assert losses["texts"] == pytest.approx(sum(o.value for o in outcomes) / sum(o.weight for o in outcomes), rel=1e-9)
    assert [example.item for example in taught] == [outcome.item for outcome in outcomes]


@pytest.mark.parametrize(("metric", "size"), [("acc", lambda choice: 1), ("acc_norm", len)])
def test_a_questions_loss_is_the_cross_entropy_of_its_choices(
    metric: str, size: Any, tmp_path: Path, engine: Engine
) -> None:
    rows = questions()
    folder = write_task(tmp_path / "quiz", rows)
    taught, outcomes, losses = lesson_of(folder, engine, metric=metric)
    by_texts = {tuple(outcome.loglikelihoods): outcome for outcome in outcomes}
    assert len(by_texts) == len(outcomes)
    expected = []
    for example, outcome in zip(taught, outcomes, strict=True):
        scores = np.array(outcome.loglikelihoods) / np.array(example.lengths)
        (right,) = example.right
        expected.append(math.log(np.exp(scores - scores[right]).sum()))
        assert outcome.value == float(scores.argmax() == right)
    assert losses["quiz"] == pytest.approx(np.mean(expected), rel=1e-6)
    sizes = {tuple(float(size(choice)) for choice in row["choices"]) for row in rows}
    assert {example.lengths for example in taught} <= sizes


def test_several_right_answers_are_right_together() -> None:
    example = Example("quiz", "0", (), (0, 2), (1.0, 1.0, 1.0), 1.0)
    chances = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    assert float(example.loss(chances.log())) == pytest.approx(-math.log(0.5))


def test_a_written_answer_teaches_its_reference(tmp_path: Path, engine: Engine) -> None:
    rows = [{"question": f"{i} and {words(i, 2)}", "answer": words(i + 1, 2)} for i in range(20)]
    folder = write_task(
        tmp_path / "written", rows, output_type="generate_until", doc_to_text="{{question}}:", doc_to_choice=None,
        doc_to_target="{{answer}}", generation_kwargs={"until": ["\n"], "max_gen_toks": 4},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )  # fmt: skip
    taught, _, losses = lesson_of(folder, engine)
    answers = {engine.tokenizer.decode(example.pairs[0].continuation).strip() for example in taught}
    assert answers <= {row["answer"] for row in rows}
    assert losses["written"] > 0


def test_an_answer_without_a_reference_teaches_nothing(tmp_path: Path, engine: Engine) -> None:
    rows = [{"question": f"{i}", "answer": " "} for i in range(20)]
    folder = write_task(
        tmp_path / "blank", rows, output_type="generate_until", doc_to_text="{{question}}:", doc_to_choice=None,
        doc_to_target="{{answer}}", generation_kwargs={"until": ["\n"], "max_gen_toks": 4},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )  # fmt: skip
    harness = load(folder)
    harness.prepare(engine.tokenizer, "search")
    with pytest.raises(TaskError, match="no reference to learn from"):
        examples(harness, "search", engine)
