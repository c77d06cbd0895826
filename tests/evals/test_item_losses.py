"""What outcomes lose: the order of two candidates that answer alike."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import pandas as pd
import pytest

from evals.item_losses import mean_losses
from evals.outcomes import SEARCH, Outcome, TaskInfo
from evals.statistics import F1

CHOICES = TaskInfo("choices", "domain", "", "multiple_choice", "acc", True, 0.25, 2, 2)
TEXT = TaskInfo("text", "general", "", "loglikelihood_rolling", "bits_per_byte", False, 0.0, 1, 1)
WRITTEN = TaskInfo("written", "general", "", "generate_until", "exact_match", True, 0.0, 2, 1)


def frame(*outcomes: Outcome) -> pd.DataFrame:
    return pd.DataFrame(map(asdict, outcomes))


def choice(*loglikelihoods: float, right: tuple[int, ...] = (0,), lengths: tuple[int, ...] = (1, 1)) -> Outcome:
    won = float(max(range(2), key=lambda i: loglikelihoods[i]) in right)
    return Outcome("choices", SEARCH, "a", won, 1.0, loglikelihoods, False, lengths, right=right)


def test_of_two_that_answer_alike_the_surer_loses_less() -> None:
    sure, unsure = (mean_losses(frame(choice(-1.0, low)), [CHOICES])["choices"] for low in (-3.0, -1.1))
    assert sure < unsure < math.log(2)
    assert sure == pytest.approx(math.log(1 + math.exp(-2.0)))


def test_a_metric_by_length_divides_by_it() -> None:
    rows = frame(choice(-1.0, -3.0, lengths=(1, 3)))
    by_length = mean_losses(rows, [replace(CHOICES, metric="acc_norm,none")])["choices"]
    assert by_length == pytest.approx(math.log(2))


def test_what_has_no_choices_loses_by_its_score() -> None:
    rows = frame(
        Outcome("text", SEARCH, "b", 30.0, 20.0, (-9.0,), False, (4,)),
        Outcome("written", SEARCH, "c", 1.0, 1.0, (), False),
        Outcome("written", SEARCH, "d", 0.0, 1.0, (), False),
        choice(-1.0, -3.0, right=(0, 1)),  # whatever is chosen is right
    )
    losses = mean_losses(rows, [CHOICES, TEXT, WRITTEN, replace(TEXT, name="absent")])
    assert losses == {"choices": -1.0, "text": 1.5, "written": -0.5}
    scored = [
        Outcome("written", SEARCH, item, 1.0, 1.0, (), False, statistic=F1, parts=parts)
        for item, parts in (("a", (1.0, 0.0, 0.0)), ("b", (0.0, 1.0, 1.0)))
    ]
    assert mean_losses(frame(*scored), [replace(WRITTEN, statistic=F1)]) == {"written": -0.5}
