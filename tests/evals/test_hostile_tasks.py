"""Task and data files that are odd, huge or hostile: one error each, that names what is wrong, and soon."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evals import rows
from evals.engine import Engine
from evals.errors import TaskError
from evals.outcomes import HOLDOUT, SEARCH
from tests.evals.conftest import load, questions, write_task

pytestmark = pytest.mark.slow  # hundreds of crafted files

NESTED = "[" * 100_000 + "]" * 100_000


def aliases(levels: int) -> str:
    """A few lines that stand for 9 ** levels values."""
    lines = ["metadata:", "  l0: &l0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"  l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines) + "\n"


def refusal(*paths: Path | str, **options: Any) -> str:
    """The message with which tasks are refused, within seconds."""
    start = time.process_time()
    with pytest.raises(TaskError) as refused:
        load(*paths, **options)
    assert time.process_time() - start < 10
    return str(refused.value)


def task_with(folder: Path, lines: str) -> Path:
    """The file of a sound task with more lines at its end."""
    file = write_task(folder / "t", questions()) / "t.yaml"
    file.write_text(file.read_text() + lines)
    return file


@pytest.mark.parametrize("allow", [False, True])
def test_a_task_file_is_bounded_whoever_is_trusted(tmp_path: Path, allow: bool) -> None:
    def refused(lines: str) -> str:
        return refusal(task_with(tmp_path, lines), allow_task_code=allow)

    assert "with every alias written out, a task file may have 5,000,000 characters" in refused(aliases(12))
    assert "an alias stands within what it stands for" in refused("metadata: &m [*m]\n")
    assert "too deep in each other" in refused("metadata: " + "[" * 10_000 + "\n")
    assert "may hold 1,000,000 bytes" in refused("# " + "x" * 1_000_000)
    assert "t.yaml is included twice" in refused("include: t.yaml\n")
    (tmp_path / "t" / "other.inc").write_text("include: t.yaml\n")
    assert "t.yaml is included twice" in refused("include: other.inc\n")
    os.mkfifo(tmp_path / "t" / "pipe")
    assert "pipe: must be a regular file; given a pipe" in refused("include: pipe\n")
    device = os.path.relpath("/dev/zero", (tmp_path / "t").resolve())
    assert "zero: must be a regular file; given a device" in refused(f"include: {device}\n")
    assert "must be a regular file; given a folder" in refused("include: ../t\n")
    assert "task" in refused(f"metadata: {'9' * 5000}\n")


def test_aliases_that_stand_for_little_are_read(tmp_path: Path) -> None:
    file = task_with(tmp_path, aliases(3))
    assert load(file).infos[0].search_items == 12


def test_a_task_that_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    assert "given a pipe" in refusal(tmp_path / "pipe.yaml")
    assert "given a device" in refusal("/dev/zero")
    assert "NUL" in refusal("./a\0b.yaml")
    assert "255 bytes" in refusal("./" + "a" * 300 + ".yaml")
    assert "no user" in refusal("~nobody-of-that-name/x.yaml")
    (tmp_path / "empty").mkdir()
    assert "holds one task, or one group of tasks" in refusal(tmp_path / "empty")


def test_only_what_is_needed_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task's neighbours are not read; a group's are, within bounds, and one that is broken is missed by its name."""
    folder = write_task(tmp_path / "g", questions(), task="one")
    os.mkfifo(folder / "a.yaml")
    (folder / "b.yaml").write_text(aliases(12))
    (folder / "c.yaml").write_text("task: broken\n" + f"x: {NESTED}\n")
    assert load(folder / "one.yaml").infos[0].name == "one"
    (folder / "g.yaml").write_text("group: both\ntask: [one]\n")
    assert load(folder / "g.yaml").infos[0].name == "both"
    (folder / "g.yaml").write_text("group: both\ntask: [one, broken]\n")
    assert "'broken', which both names" in refusal(folder / "g.yaml")
    monkeypatch.setattr("evals.task_files.MOST_TASK_FILES", 3)
    assert "give the group a folder of its own" in refusal(folder / "g.yaml")


@pytest.mark.parametrize("field", ["doc_to_text", "doc_to_target", "doc_to_choice", "description"])
def test_a_template_that_runs_away_is_named(tmp_path: Path, field: str, engine: Engine) -> None:
    settings = {field: "{{ 'a' * 10**9 }}"}
    file = write_task(tmp_path / "t", questions(), **settings)
    with pytest.raises(TaskError, match=r"(?s)t.* item .*a template may make 4,000,000 characters") as refused:
        load(file).prepare(engine.tokenizer, SEARCH)
    assert field in str(refused.value) or field == "description"


def good(n: int = 6) -> list[str]:
    return [json.dumps(row) for row in questions(n)]


def with_line(folder: Path, n: int, **changes: Any) -> Path:
    """A task whose item at line n is changed."""
    task = write_task(folder / "t", questions(6))
    lines = good()
    lines[n - 1] = json.dumps(json.loads(lines[n - 1]) | changes)
    (task / "t.jsonl").write_text("\n".join(lines))
    return task


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f'{{"question": {NESTED}}}', r"t.jsonl, line 3: .*deep"),
        ('{"question": "q", "choices": ["a", "b"], "gold": 1' + "0" * 400 + "}", r"t.jsonl, line 3: .*401"),
        ('{"question": "q", "choices": ["a", "b"], "gold": ' + "9" * 5000 + "}", r"t.jsonl, line 3: .*5,000"),
        ('{"question": "q", "choices": ["a", "b"], "gold": 1e400}', r"t.jsonl, line 3: .*64 bits"),
        ('{"question": "q", "choices": ["a", "b"], "gold": 1' + "0" * 30 + "}", r"line 3: gold must be .*64 bits"),
        ('{"question": "q", "choices": ["a", "b"], "gold": "one"}', r"line 3: gold must be of one kind.*'one' after 0"),
        ('{"question": "q", "choices": "ab", "gold": 0}', r"line 3: choices must be of one kind"),
        ('{"question": "\\ud800", "choices": ["a", "b"], "gold": 0}', r"t.jsonl, line 3: .*surrogate"),
    ],
    ids=["nested", "401 digits", "5,000 digits", "1e400", "31 digits", "a word", "a text", "half a pair"],
)
def test_a_line_that_cannot_be_data_is_named(tmp_path: Path, line: str, message: str) -> None:
    task = write_task(tmp_path / "t", questions(6))
    lines = good()
    (task / "t.jsonl").write_text("\n".join([*lines[:2], line, *lines[3:]]))
    with pytest.raises(TaskError, match=message):
        load(task, search=2)


def test_data_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = write_task(tmp_path / "t", questions(6))
    monkeypatch.setattr(rows, "MOST_ROWS", 5)
    assert "may have 5 items; given more" in refusal(task, search=2)
    monkeypatch.setattr(rows, "MOST_COLUMNS", 2)
    monkeypatch.setattr(rows, "MOST_ROWS", 9)
    assert "line 1: items may have 2 different keys" in refusal(task, search=2)
    monkeypatch.setattr(rows, "LARGEST_DATA", 100)
    assert "t.jsonl: may hold 100 bytes" in refusal(task, search=2)


@pytest.mark.parametrize("loader", ["json", "text"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_a_data_file_is_a_file(tmp_path: Path, loader: str, make: Callable[[Path], None]) -> None:
    task = write_task(tmp_path / "t", questions(6), dataset_path=loader)
    (task / "t.jsonl").unlink()
    make(task / "t.jsonl")
    assert "t.jsonl must be a regular file" in refusal(task, search=2)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"choices": ["", "b", "c", "d"]}, "doc_to_choice: .*not empty: .*'', 'b'"),
        ({"gold": 4}, "doc_to_target: .*one of the 4 choices: 4 given"),
    ],
)
def test_a_bad_item_is_named_wherever_it_stands(tmp_path: Path, n: int, changes: Any, message: str) -> None:
    """lm-eval itself tries the first item, and raises whatever comes."""
    with pytest.raises(TaskError, match=rf"(?s)t.*item {n}: {message}.*t.jsonl, line {n}"):
        load(with_line(tmp_path, n, **changes), search=2)


def test_choices_that_are_numbers(tmp_path: Path) -> None:
    task = write_task(tmp_path / "t", [row | {"choices": [1, 2, 3, 4]} for row in questions(6)])
    assert "item 1: doc_to_choice: " in (said := refusal(task, search=2))
    assert "[1, 2, 3, 4] given; put numbers in quotes" in said


@pytest.mark.parametrize("target", ["gold", "{{gold}}"])
def test_one_gold_with_a_point_is_named_itself(tmp_path: Path, target: str) -> None:
    task = with_line(tmp_path, 4, gold=2.0)
    file = task / "t.yaml"
    file.write_text(file.read_text().replace("doc_to_target: gold", f"doc_to_target: '{target}'"))
    said = refusal(task, search=2)
    assert "item 4: doc_to_target: " in said
    assert "2.0" in said
    assert said.endswith("t.jsonl, line 4")


def test_a_metric_that_a_task_does_not_give_is_refused_before_a_search(tmp_path: Path) -> None:
    task = write_task(tmp_path / "t", questions(), metric_list=None)
    (task / "own.py").write_text("def near(*_, **__):\n    return 1.0\n")
    file = task / "t.yaml"
    code = "metric_list:\n  - metric: !function own.near\n    aggregation: mean\n    higher_is_better: true\n"
    file.write_text(file.read_text() + code + "  - {metric: acc, aggregation: mean, higher_is_better: true}\n")
    assert "task t lists 'near' and gives acc" in refusal(file, allow_task_code=True)
    assert load(file, allow_task_code=True, metric="acc").infos[0].metric == "acc"


def test_texts_scored_in_another_unit_than_asked_for_are_noted(tmp_path: Path) -> None:
    rows = [{"text": f"a text of {i} words"} for i in range(20)]
    settings: dict[str, Any] = {"output_type": "loglikelihood_rolling", "doc_to_choice": None, "doc_to_text": ""}
    settings |= {"doc_to_target": "{{text}}", "metric_list": [{"metric": "word_perplexity"}]}
    task = write_task(tmp_path / "t", rows, **settings)
    note = "task t is scored in bits_per_byte, not in word_perplexity"
    assert [found[: len(note)] for found in load(task).notes] == [note]
    both = [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}]
    task = write_task(tmp_path / "t", rows, **(settings | {"metric_list": both}))
    assert load(task).notes == ()
    assert [found[: len(note)] for found in load(task, metric="word_perplexity").notes] == [note]


def test_a_hub_task_without_a_network_says_how_to_get_it(tmp_path: Path) -> None:
    task = write_task(
        tmp_path / "t", questions(), dataset_path="nobody/nothing", dataset_name="main", dataset_kwargs=None
    )
    said = refusal(task)
    for words in (
        "datasets.load_dataset('nobody/nothing', 'main')",
        "HF_DATASETS_CACHE",
        "HF_HUB_OFFLINE=1",
        "JSON lines",
    ):
        assert words in said


def test_all_items_filtered_away_are_never_all_items(tmp_path: Path) -> None:
    task = write_task(tmp_path / "t", questions())
    (task / "own.py").write_text("def none(docs):\n    return docs.filter(lambda doc: False)\n")
    file = task / "t.yaml"
    file.write_text(file.read_text() + "process_docs: !function own.none\n")
    assert "no item is left" in refusal(file, allow_task_code=True)


def test_examples_that_are_none_are_named(tmp_path: Path, engine: Engine) -> None:
    for name, samples in (("a", [1, 2, 3]), ("b", [{"question": 1}] * 3), ("c", "three")):
        task = write_task(tmp_path / name, questions(), fewshot_config={"samples": samples})
        with pytest.raises(TaskError, match=rf"task .*{name}"):
            load(task, shots=2).prepare(engine.tokenizer, SEARCH)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_fewshot": "five"},
        {"metric_list": "acc"},
        {"metric_list": [1]},
        {"output_type": ["multiple_choice"]},
        {"dataset_kwargs": {"data_files": {"test": 7}}},
        {"dataset_kwargs": [1]},
        {"generation_kwargs": "x", "output_type": "generate_until"},
        {"filter_list": [{"name": "x"}]},
        {"doc_to_text": {"a": 1}},
        {"test_split": 1},
        {"target_delimiter": 5},
        {"fewshot_config": {"sampler": "none"}},
        {"process_docs": "x"},
    ],
    ids=str,
)
def test_settings_of_another_kind_are_one_error(tmp_path: Path, settings: Any, engine: Engine) -> None:
    task = write_task(tmp_path / "t", questions(), **settings)
    with pytest.raises(TaskError, match=r"task|t\.yaml"):
        load(task).prepare(engine.tokenizer, SEARCH)


def test_an_item_of_a_megabyte_is_read_and_counted_as_cut(tmp_path: Path, engine: Engine) -> None:
    rows = [{"text": "word " * (200_000 if i == 2 else 3), "last": f"{i}"} for i in range(6)]
    settings = {"output_type": "loglikelihood", "doc_to_text": "text", "doc_to_target": "last", "doc_to_choice": None}
    settings["metric_list"] = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    harness = load(write_task(tmp_path / "t", rows, **settings), search=3)
    outcomes = [outcome for suite in (SEARCH, HOLDOUT) for outcome in harness.score(engine, suite)]
    assert sum(outcome.truncated for outcome in outcomes) == 1


def test_items_in_any_order_are_scored_under_their_own_name(tmp_path: Path, engine: Engine) -> None:
    """And one that is there twice counts once, whatever its id."""
    rows = [row | {"id": 7} for row in questions(12)]
    mixed = [*rows[::-1], *rows[3:5]]
    one = load(write_task(tmp_path / "a" / "t", rows), search=6).score(engine, SEARCH)
    assert load(write_task(tmp_path / "b" / "t", mixed), search=6).score(engine, SEARCH) == one
