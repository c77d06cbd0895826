"""The items kept for certificates: no suite's, no worked example's, and no reason for other prompts than before."""

from __future__ import annotations

from pathlib import Path

import pytest

from evals.engine import Engine
from evals.outcomes import CERTIFY, HOLDOUT, REST, SEARCH, SPARE, SUITES
from tests.evals.conftest import load, questions, write_task

OTHER_SPLIT = {
    "dataset_kwargs": {"data_files": {"test": "quiz.jsonl", "train": "train.jsonl"}},
    "fewshot_split": "train",
}


def quiz(folder: Path, **settings: object) -> Path:
    write_task(folder, questions(60)[48:], task="train")
    (folder / "train.yaml").unlink()
    return write_task(folder, questions(40), task="quiz", **settings) / "quiz.yaml"


@pytest.mark.parametrize(("shots", "settings"), [(0, {}), (2, OTHER_SPLIT), (2, {"fewshot_split": "test"})])
@pytest.mark.parametrize("holdout", [12, 0.3, REST])
def test_spare_ones_change_no_item_and_no_prompt_of_the_suites(
    tmp_path: Path, engine: Engine, shots: int, settings: dict[str, object], holdout: float
) -> None:
    task = quiz(tmp_path / "quiz", **settings)
    before = load(task, search=12, holdout=holdout, shots=shots)
    spared = load(task, search=12, holdout=holdout, shots=shots, certify_items=SPARE)
    for suite in SUITES:
        assert spared.suite_hash(suite) == before.suite_hash(suite)
        before.prepare(engine.tokenizer, suite)
        spared.prepare(engine.tokenizer, suite)
    assert spared.request_hashes() == before.request_hashes()
    assert before.suite_hash(CERTIFY) == {"quiz": []}
    found = spared.suite_hash(CERTIFY)["quiz"]
    has_some = holdout != REST and settings.get("fewshot_split") != "test"
    assert len(found) == (8 if has_some else 0)
    assert bool(spared.notes) == (not has_some)
    assert not {*found} & {*spared.suite_hash(SEARCH)["quiz"], *spared.suite_hash(HOLDOUT)["quiz"]}


@pytest.mark.parametrize("holdout", [12, REST])
@pytest.mark.parametrize("shots", [0, 2])
def test_those_asked_for_are_kept_from_rest_and_from_worked_examples(
    tmp_path: Path, engine: Engine, holdout: int, shots: int
) -> None:
    task = quiz(tmp_path / "quiz", fewshot_split="test")
    harness = load(task, search=12, holdout=holdout, shots=shots, certify_items=0.2)
    items = {suite: set(harness.suite_hash(suite)["quiz"]) for suite in (*SUITES, CERTIFY)}
    assert len(items[CERTIFY]) == 8
    assert len(items[HOLDOUT]) == (12 if holdout == 12 else 40 - 12 - 8 - (3 if shots else 0))
    assert len(set.union(*items.values())) == sum(map(len, items.values()))
    kept = {item.doc["question"] for item in harness.tasks[0].items[CERTIFY]}
    for suite in SUITES:
        harness.prepare(engine.tokenizer, suite)
        asked = [str(request.args[0]) for request in harness.requests(suite)]
        assert not [text for text in asked for question in kept if f"Question: {question}\n" in text]


def test_too_few_are_taken_and_told(tmp_path: Path) -> None:
    task = write_task(tmp_path / "quiz", questions(24)) / "quiz.yaml"
    harness = load(task, search=10, holdout=10, certify_items=9)
    assert len(harness.suite_hash(CERTIFY)["quiz"]) == 4
    assert harness.notes == (
        "task quiz: 4 are left of 9 items for certificates; for more, lower items or holdout_items",
    )


def test_a_part_of_the_items_scores_as_in_the_whole(tmp_path: Path, engine: Engine) -> None:
    task = write_task(tmp_path / "quiz", questions(24)) / "quiz.yaml"
    harness = load(task, search=8, holdout=8, certify_items=8)
    chosen = harness.suite_hash(CERTIFY)["quiz"][2:5]
    part = harness.score(engine, CERTIFY, {"quiz": chosen})
    assert [outcome.item for outcome in part] == chosen
    whole = {outcome.item: outcome for outcome in harness.score(engine, CERTIFY)}
    assert [outcome.value for outcome in part] == [whole[item].value for item in chosen]
