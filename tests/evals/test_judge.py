"""A program as a metric: it reads answers as JSON lines and writes a number for each."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from evals.engine import Engine
from evals.errors import TaskError
from evals.outcomes import SEARCH
from tests.evals.conftest import load, questions, words, write_task

WRITTEN: dict[str, Any] = {
    "output_type": "generate_until", "doc_to_text": "text", "doc_to_target": "answer", "doc_to_choice": None,
    "generation_kwargs": {"until": ["."], "max_gen_toks": 4},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}  # fmt: skip
ROWS = [{"text": words(i, 3), "answer": words(i, 1)} for i in range(20)]
JUDGE = """
import json, pathlib, sys
rows = [json.loads(line) for line in sys.stdin]
pathlib.Path(sys.argv[1]).write_text(json.dumps(rows))
for row in rows:
    print(len(row["answer"]) / 8)
"""


def judge(folder: Path, code: str = JUDGE) -> tuple[str, ...]:
    (folder / "judge.py").write_text(code)
    return (sys.executable, str(folder / "judge.py"), str(folder / "seen.json"))


def test_a_program_gives_answers_their_numbers(tmp_path: Path, engine: Engine) -> None:
    path = write_task(tmp_path / "t", ROWS, **WRITTEN)
    with pytest.raises(TaskError, match=r"judge runs a program, .*set evals\.allow_task_code only if you trust it"):
        load(path, judge=judge(tmp_path))
    harness = load(path, search=12, holdout=4, judge=judge(tmp_path), allow_task_code=True)
    outcomes = harness.score(engine, SEARCH)
    (info,) = harness.infos
    assert (info.metric, info.higher_is_better, info.statistic) == ("judge", True, "")
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert [row["item"] for row in seen] == [row.item for row in outcomes]
    assert [len(row["answer"]) / 8 for row in seen] == [row.value for row in outcomes]
    assert [row["answer"] for row in seen] == [row.answer for row in outcomes]
    assert {(row["prompt"], row["target"]) for row in seen} <= {(row["text"], row["answer"]) for row in ROWS}
    assert seen[0]["doc"]["text"] == seen[0]["prompt"]


def test_each_drawn_answer_is_judged_and_an_item_has_their_mean(tmp_path: Path, engine: Engine) -> None:
    drawn = WRITTEN | {"generation_kwargs": {"until": ["."], "max_gen_toks": 4, "do_sample": True}, "repeats": 3}
    harness = load(
        write_task(tmp_path / "t", ROWS, **drawn), search=12, holdout=4, judge=judge(tmp_path), allow_task_code=True
    )
    outcomes = harness.score(engine, SEARCH)
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert len(seen) == 36
    lengths = [len(row["answer"]) / 8 for row in seen]
    assert [row.value for row in outcomes] == pytest.approx([sum(lengths[i : i + 3]) / 3 for i in range(0, 36, 3)])


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; sys.exit('no key')", "ended with 1: no key"),
        ("print(1)", "must write a number for each answer, 12 lines; it wrote 1"),
        ("import sys\nfor _ in sys.stdin: print('good')", "line 1: must be a number; it wrote 'good'"),
        ("import sys\nfor _ in sys.stdin: print('nan')", "line 1: must be finite; it wrote nan"),
    ],
)
def test_a_program_that_gives_no_numbers_is_named(code: str, message: str, tmp_path: Path, engine: Engine) -> None:
    path = write_task(tmp_path / "t", ROWS, **WRITTEN)
    harness = load(path, search=12, holdout=4, judge=judge(tmp_path, code), allow_task_code=True)
    with pytest.raises(TaskError, match=f"task t: judge .*{message}"):
        harness.score(engine, SEARCH)


def test_what_cannot_be_judged_is_refused(tmp_path: Path, engine: Engine) -> None:
    with pytest.raises(TaskError, match=r"a judge reads written answers: task .* has multiple_choice"):
        load(write_task(tmp_path / "q", questions()), judge=("x",), allow_task_code=True)
    path = write_task(tmp_path / "t", ROWS, **WRITTEN)
    with pytest.raises(TaskError, match=r"metric is judge, or judge,FILTER with one of none; 'exact_match' given"):
        load(path, judge=("x",), metric="exact_match", allow_task_code=True)
    lost = load(path, search=12, holdout=4, judge=("/no/such/program",), allow_task_code=True)
    with pytest.raises(TaskError, match="judge /no/such/program cannot be run"):
        lost.score(engine, SEARCH)
