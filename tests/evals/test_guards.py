"""Guards mark what a person would call wrong, and flag a merge that writes as the base does as seldom as they say."""

from __future__ import annotations

import asyncio
import email
import inspect
import json
import logging
from collections.abc import Sequence
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from evals.guards import (
    CUT,
    EMPTY,
    LANGUAGE,
    LEVEL,
    LONGER,
    LOOPING,
    SHORTER,
    WRITTEN,
    Guards,
    is_looping,
    sign_test,
)
from evals.outcomes import TaskInfo

TASKS = (
    TaskInfo("notes", "general", "", WRITTEN, "exact_match", True, 0.0, 0, 0),
    TaskInfo("quiz", "general", "", "multiple_choice", "acc", True, 0.25, 0, 0),
)
GERMAN = (
    "Der Patient klagt seit drei Tagen über starke Schmerzen im rechten Knie.",
    "Bitte nehmen Sie die Tabletten morgens und abends nach dem Essen ein.",
    "Die Untersuchung ergab keine Hinweise auf eine frische Verletzung des Knochens.",
    "Wenn das Fieber weiter steigt, sollte ein Arzt gerufen werden.",
    "Zwischen beiden Messungen lagen etwa zwanzig Minuten Ruhe.",
    "Das Gerät wurde gereinigt und für die nächste Messung vorbereitet.",
)


def english(number: int) -> list[str]:
    """So many different sentences of some eighty characters, from the standard library."""
    modules: Sequence[ModuleType] = (asyncio, email, inspect, json, logging)
    docs = [doc for module in modules for value in vars(module).values() if (doc := inspect.getdoc(value))]
    found = sorted({" ".join(doc.split())[:80] for doc in docs if len(doc) > 100})
    assert len(found) >= number
    return found[:: len(found) // number][:number]


def answers(texts: Sequence[str], **columns: object) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "task": "notes",
            "suite": "search",
            "item": [f"{i:03d}" for i in range(len(texts))],
            "broken_off": False,
            "answer": texts,
            "lengths": [(len(text) // 4,) for text in texts],
            **columns,
        }
    )


def compared(base: pd.DataFrame, merge: pd.DataFrame) -> pd.DataFrame:
    return Guards(base, TASKS).of(merge).set_index("guard")


def test_a_merge_that_writes_as_the_base_is_not_flagged() -> None:
    some = english(60)
    found = compared(answers(some), answers(some[::-1]))
    assert list(found.index) == [CUT, EMPTY, LOOPING, LANGUAGE, LONGER, SHORTER]
    assert (found["items"] == 60).all()
    assert not found["is_flagged"].any()


@pytest.mark.parametrize(
    ("guard", "change"),
    [
        (EMPTY, lambda text: " \n"),
        (LOOPING, lambda text: text[:40] * 3),
        (LANGUAGE, lambda text: GERMAN[len(text) % len(GERMAN)]),
        (LANGUAGE, lambda text: "Пациент жалуется на сильную боль."),
        (LANGUAGE, lambda text: text[:40] + " 患者は三日前から膝の痛みを訴えている。"),
        (LONGER, lambda text: text + " " + " ".join(sorted(GERMAN[0].split() + text.split())) + text[::-1]),
        (SHORTER, lambda text: text[:20]),
    ],
)
def test_each_guard_sees_what_it_is_for(guard: str, change: object) -> None:
    base = english(60)
    merge = [change(text) if i % 3 == 0 else text for i, text in enumerate(base)]  # type: ignore[operator]
    found = compared(answers(base), answers(merge))
    assert found.loc[guard, "is_flagged"]
    assert 0.9 / 3 <= found.loc[guard, "share"] <= 1 / 3
    assert found.loc[guard, "base_share"] <= 0.05


def test_an_answer_that_is_broken_off_is_seen_without_its_text() -> None:
    base = english(30)
    cut = [i < 12 for i in range(30)]
    found = compared(answers(base, answer=None), answers(base, answer=None, broken_off=cut))
    assert found.loc[CUT, ["share", "worse", "better", "is_flagged"]].tolist() == [0.4, 12, 0, True]
    assert LANGUAGE not in found.index


def test_what_the_base_does_too_is_no_fault_of_the_merge() -> None:
    base = answers([GERMAN[0] * 3] * 40, broken_off=True)
    assert not compared(base, base)["is_flagged"].any()
    found = compared(base, answers([GERMAN[0]] * 40))
    assert found.loc[LOOPING, ["share", "base_share", "better"]].tolist() == [0.0, 1.0, 40]
    assert not found.loc[[CUT, LOOPING], "is_flagged"].any()


def test_few_letters_tell_no_language() -> None:
    found = compared(answers(["B", "C"] * 30), answers(["D", "the answer is certainly D"] * 30))
    assert found.loc[LANGUAGE, "share"] == 0.0
    digits = compared(answers(["7"] * 30), answers(["seven"] * 30))
    assert digits.loc[LANGUAGE, "share"] == 0.0


def test_only_what_both_have_is_compared() -> None:
    base, other = answers(english(30)), answers(english(30), item=[f"x{i}" for i in range(30)])
    assert compared(base, other).empty
    assert (compared(base, base.iloc[:20])["items"] == 20).all()
    quiz = base.assign(task="quiz")
    assert not Guards(quiz, TASKS).is_needed
    assert Guards(quiz, TASKS).of(quiz).empty


def test_counting_and_lists_are_no_loops() -> None:
    for sound in (GERMAN[1], "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14", " ".join(GERMAN)):
        assert not is_looping(sound)
    for broken in ("no no no no no no no no no no", "a" * 30, GERMAN[2] * 3, "それは病気です。" * 6):
        assert is_looping(broken)


@pytest.mark.parametrize(("worse", "better"), [(0, 0), (9, 0), (3, 7), (40, 22)])
def test_the_sign_test_is_the_exact_one(worse: int, better: int) -> None:
    expected = binomtest(worse, worse + better, alternative="greater").pvalue if worse + better else 1.0
    assert sign_test(worse, better) == pytest.approx(expected)


@pytest.mark.slow
def test_flags_without_cause_are_as_rare_as_asked() -> None:
    """500 merges that break off, say nothing and stretch their answers as often as the base, on other items."""
    rng, flagged = np.random.default_rng(0), 0
    for _ in range(500):
        sides = []
        for _ in range(2):
            texts = np.where(rng.random(60) < 0.1, "", "a word or two")
            lengths = [(int(n),) for n in rng.geometric(0.02, 60)]
            sides.append(answers(list(texts), broken_off=rng.random(60) < 0.2, lengths=lengths))
        flagged += bool(compared(*sides)["is_flagged"].any())
    assert flagged / 500 <= LEVEL + 2 * np.sqrt(LEVEL * (1 - LEVEL) / 500)
