"""Reading and splitting tasks: what is refused and in which words, and that no item is in two suites."""

from __future__ import annotations

import json
import multiprocessing
import re
from pathlib import Path
from typing import Any

import pytest

from evals.engine import Engine
from evals.errors import ScoreError, TaskError
from evals.lm_examples import examples
from evals.lm_tasks import load_tasks
from evals.outcomes import HOLDOUT, REST, SEARCH, SENTINEL, Chat, TaskSpec
from tests.evals.conftest import load, questions, words, write_task

TEXTS = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "doc_to_choice": None,
    "metric_list": [{"metric": "bits_per_byte"}],
}


def refused(match: str, *paths: Path | str, **options: Any) -> None:
    with pytest.raises(TaskError, match=match):
        load(*paths, **options)


def test_suites_share_no_content(tmp_path: Path) -> None:
    rows = [{**row, "id": i} for i, row in enumerate(questions(20) + questions(20))]  # each twice, under another id
    harness = load(write_task(tmp_path / "twice", rows), search=12, holdout=REST)
    hashes = {suite: harness.suite_hash(suite)["twice"] for suite in (SEARCH, HOLDOUT)}
    assert len(hashes[SEARCH]) == len(set(hashes[SEARCH])) == 12
    assert len(hashes[HOLDOUT]) == len(set(hashes[HOLDOUT])) == 8
    assert not set(hashes[SEARCH]) & set(hashes[HOLDOUT])
    assert (harness.infos[0].search_items, harness.infos[0].holdout_items) == (12, 8)


def test_holdout_may_be_a_share_of_a_task(tmp_path: Path) -> None:
    harness = load(write_task(tmp_path / "t", questions(30)), search=10, holdout=0.4)
    assert (harness.infos[0].search_items, harness.infos[0].holdout_items) == (10, 12)
    with pytest.raises(TaskError, match="10 search and 24 holdout items asked for"):
        load(tmp_path / "t", search=10, holdout=0.8)


def test_split_depends_on_content_and_seed_only(tmp_path: Path) -> None:
    rows = questions(30)
    one = load(write_task(tmp_path / "a" / "t", rows), search=10, holdout=10)
    other = load(write_task(tmp_path / "b" / "t", rows[::-1]), search=10, holdout=10)
    assert one.suite_hash(SEARCH) == other.suite_hash(SEARCH)
    more = load(tmp_path / "a" / "t", search=15, holdout=10)
    assert more.suite_hash(SEARCH)["t"][:10] == one.suite_hash(SEARCH)["t"]
    assert more.suite_hash(HOLDOUT) == one.suite_hash(HOLDOUT)


def test_shots_come_from_no_suite(tmp_path: Path, engine: Engine) -> None:
    folder = write_task(tmp_path / "shots", questions(20), doc_to_text="{{question}}")
    harness = load(folder, search=8, holdout=REST, shots=2)
    harness.prepare(engine.tokenizer, SEARCH)
    scored = {item.doc["question"] for suite in (SEARCH, HOLDOUT) for item in harness.tasks[0].items[suite]}
    assert len(scored) == 17
    for asked in harness.requests(SEARCH):
        used = [row["question"] for row in questions(20) if row["question"] in asked.args[0]]
        assert len(used) == 3
        assert [q for q in used if q in scored] == [asked.doc["question"]]
    refused("task shots has 2 such items, 3 needed", folder, search=9, holdout=9, shots=3)
    write_task(tmp_path / "shots", questions(20), doc_to_text="{{question}}", fewshot_split="test")
    refused("task shots has 2 such items, 3 needed", folder, search=9, holdout=9, shots=2)


def test_shots_of_an_item_do_not_depend_on_its_neighbours(tmp_path: Path, engine: Engine) -> None:
    folder = write_task(tmp_path / "shots", questions(20))
    prompts = []
    for search in (2, 8):
        harness = load(folder, search=search, holdout=4, shots=1)
        harness.tasks[0].members[0].sampler.replace_df([dict(doc) for doc in questions(5)])
        harness.prepare(engine.tokenizer, SEARCH)
        prompts.append([asked.args[0] for asked in harness.requests(SEARCH)])
    assert prompts[1][: len(prompts[0])] == prompts[0]


def test_a_bank_takes_what_the_others_leave(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "t", questions(60))
    plain = load(folder, search=14, holdout=20)
    for asked, found in {20: 20, 500: 40}.items():
        harness = load(folder, search=14, holdout=20, bank_items=asked)
        (info,) = harness.infos
        assert (info.search_items, info.drawn_items, info.holdout_items) == (found, 14, 20)
        assert harness.suite_hash("search")["t"][:14] == plain.suite_hash("search")["t"]
        assert harness.suite_hash("holdout") == plain.suite_hash("holdout")
        assert not harness.notes
    assert load(folder, search=14, bank_items=500).infos[0].search_items == 30  # half, where the holdout is the rest
    for small in ({"search": 8, "holdout": 20}, {"search": 14, "holdout": 46}):
        harness = load(folder, bank_items=500, **small)
        assert (harness.infos[0].search_items, harness.infos[0].drawn_items) == (small["search"], 0)
        assert "has no bank" in harness.notes[0]


def test_drawn_items_alone_are_scored_as_among_all(tmp_path: Path, engine: Engine) -> None:
    harness = load(write_task(tmp_path / "t", questions(40)), write_task(tmp_path / "u", questions(40)), search=14,
                   holdout=10, bank_items=30)  # fmt: skip
    whole = {(o.task, o.item): o for o in harness.score(engine, "search")}
    chosen = tuple(harness.suite_hash("search")["u"][3:9])
    part = harness.score(engine, "search", {"t": harness.suite_hash("search")["t"], "u": chosen})
    assert [o.item for o in part if o.task == "u"] == list(chosen)
    assert len([o for o in part if o.task == "t"]) == 30
    for outcome in part:
        before = whole[outcome.task, outcome.item]
        assert outcome.loglikelihoods == pytest.approx(before.loglikelihoods, abs=1e-4)
        assert outcome.right == before.right
        assert len(outcome.right) == 1
    assert len(examples(harness, "search", engine)) == 60  # a lesson learns from whole banks


def test_too_few_items(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "few", questions(10))
    refused("too few items: .*few has 10 different items, 8 search and 3 holdout items", folder, search=8, holdout=3)
    refused("few has 10 different items, 10 search and the rest", folder, search=10)
    refused("each suite needs items", folder, search=0)
    refused("each suite needs items", folder, search=2, holdout=0)


def test_bad_rows_are_named(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "t", questions(6))
    data = folder / "t.jsonl"
    good = data.read_text().splitlines()
    for line, message in {
        '{"question": "q", "choices": ["a", "b"], "gold": NaN}': "t.jsonl, line 3: .*finite; given NaN",
        '{"question": "q", ': "t.jsonl, line 3: not JSON",
        '["q"]': "must be a JSON object: .*t.jsonl, line 3",
        json.dumps({"question": "q", "choices": ["a", "b"], "gold": 2}): "t, item 3: .*2 choices: 2 given.*, line 3",
        json.dumps({"question": "q", "choices": ["a", "b"], "gold": -1}): "t, item 3: .*2 choices: -1 given.*, line 3",
        json.dumps({"question": "q", "choices": ["a"], "gold": 0}): "t, item 3: .*two or more choices.*, line 3",
    }.items():
        data.write_text("\n".join([*good[:2], line, *good[3:]]))
        refused(message, folder, search=2)
    data.write_text("")
    refused("no item in .*t.jsonl", folder)
    data.unlink()
    refused("no data file .*t.jsonl", folder)
    (folder / "t.yaml").write_text("task: t\ndataset_path: json\n")
    refused("t.yaml: dataset_path: json is a format of files.*name yours: dataset_kwargs", folder)


def test_bad_task_files_are_named(tmp_path: Path) -> None:
    def bad(match: str, name: str, **settings: Any) -> None:
        refused(match, write_task(tmp_path / name, questions(), **settings))

    bad("no split nope in data_files, which has test", "split", test_split="nope")
    bad("no split absent in data_files", "shots", fewshot_config={"split": "absent"})
    absent = "column cannot be read: item 1: doc_to_text: UndefinedError: 'absent' is undefined; .*column.jsonl, line 1"
    bad(absent, "column", doc_to_text="{{absent}}")
    bad("line .*: metric 'accc' is not one of lm-eval's", "metric", metric_list=[{"metric": "accc"}])
    middle = [{"metric": "acc", "aggregation": "median", "higher_is_better": True}]
    bad("has acc, of which usable: none", "median", metric_list=middle)
    bad("f1 is of two choices, of which the second is looked for: .* has 4", "two", metric_list=[{"metric": "f1"}])
    refused("of which usable: acc, acc_norm; 'f1' given", write_task(tmp_path / "f1", questions()), metric="f1")
    broken = write_task(tmp_path / "broken", questions()) / "broken.yaml"
    broken.write_text("task: [broken")
    refused("broken.yaml is not YAML", broken)
    refused("no task file or folder", tmp_path / "absent")
    twice = write_task(tmp_path / "twice", questions())
    write_task(twice, questions(), task="other")
    refused("twice has other.yaml, twice.yaml; name the file", twice)
    refused("task names must differ: other", twice / "other.yaml", twice / "other.yaml")


@pytest.mark.parametrize(
    "line",
    [
        "process_docs: !function evil.touch",
        "process_docs: !%66unction evil.touch",
        "custom_dataset: evil.touch",
        "use_prompt: promptsource:evil",
        "include: /etc/task.yaml",
        "include: evil.inc",
        "unsafe_code: true",
        "doc_to_target: \"{{ cycler.__init__.__globals__.os.system('touch MARKER') }}\"",
        "description: \"{{ ''['__cla' ~ 'ss__'].__mro__ }}\"",
    ],
)
def test_task_code_runs_only_when_allowed(tmp_path: Path, line: str, engine: Engine) -> None:
    folder = write_task(tmp_path / "evil", questions())
    marker = folder / "marker"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\ndef touch(docs): return docs\n")
    (folder / "evil.inc").write_text("process_docs: !function evil.touch\n")
    file = folder / "evil.yaml"
    key = line.split(":")[0]
    kept = [old for old in file.read_text().splitlines() if not old.startswith(f"{key}:")]
    file.write_text("\n".join([*kept, line.replace("MARKER", str(marker))]) + "\n")
    with pytest.raises(TaskError, match=r"runs code|relative|unsafe|SecurityError"):
        load(file).prepare(engine.tokenizer, SEARCH)
    assert not marker.exists()
    if line.startswith("process_docs: !function"):
        load(file, allow_task_code=True)
        assert marker.exists()


def test_answers_decoded_in_other_ways_are_refused(tmp_path: Path) -> None:
    rows = [{"text": words(i, 3), "answer": "x"} for i in range(20)]
    settings: dict[str, Any] = {
        "output_type": "generate_until",
        "doc_to_text": "text",
        "doc_to_target": "answer",
        "doc_to_choice": None,
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }

    def bad(match: str, name: str, repeats: object = 1, **options: object) -> None:
        path = write_task(
            tmp_path / name, rows, repeats=repeats, generation_kwargs={"until": ["."], **options}, **settings
        )
        refused(match, path)

    bad("beams asks for num_beams", "beams", num_beams=3)
    bad("greedy answers are the same each time: task .*same asks for repeats: 4", "same", repeats=4)
    bad("repeats must be a whole number from 1 to 256: 0 given", "none", repeats=0, do_sample=True)
    bad("drawn answers have temperature above 0", "cold", do_sample=True, temperature=-1.0)
    bad("top_p above 0 and at most 1: top_p 1.5 given", "top", do_sample=True, temperature=1.0, top_p=1.5)
    load(write_task(tmp_path / "t", questions(), repeats=3))  # nothing is written, and nothing changes


def test_group_that_weighs_tasks_alike_is_refused(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "g", questions(), task="a")
    write_task(folder, questions(), task="b")
    rule = "aggregate_metric_list: [{metric: acc, weight_by_size: false}]"
    (folder / "g.yaml").write_text(f"group: both\ntask: [a, b]\n{rule}\n")
    refused("group both weighs its tasks alike", folder)


def test_nan_names_no_score(tmp_path: Path, engine: Engine) -> None:
    harness = load(write_task(tmp_path / "t", questions()))
    before = harness.score(engine, SEARCH)
    weight = engine.model.model.norm.weight
    kept = weight.data.clone()
    weight.data[3] = float("nan")
    try:
        with pytest.raises(ScoreError):
            harness.score(engine, SEARCH)
    finally:
        weight.data.copy_(kept)
    assert harness.score(engine, SEARCH) == before


def test_describe_counts_tokens_once_prepared(tmp_path: Path, engine: Engine) -> None:
    harness = load(write_task(tmp_path / "t", questions()))
    assert harness.describe()[0]["search_tokens"] is None
    harness.prepare(engine.tokenizer, SEARCH)
    row = harness.describe()[0]
    assert row["search_items"] == 12
    assert 12 * 20 < row["search_tokens"] < 12 * 200
    assert row["holdout_tokens"] is None


def test_infos_name_no_local_path(tmp_path: Path) -> None:
    harness = load(write_task(tmp_path / "t", questions()))
    assert not re.search("/|tmp", repr(harness.infos))


def _load_in_a_process(folder: str) -> list[str]:
    from evals.lm_tasks import load_tasks

    spec = TaskSpec(folder, "general", search_items=5, holdout_items=5)
    return load_tasks([spec], seed=0, chat=Chat(), allow_task_code=False).suite_hash(SEARCH)["t"]


@pytest.mark.slow  # lm-eval reads its 14,000 task files
def test_unknown_name() -> None:
    refused("no task, group or tag 'zzzz' in lm-eval; a path needs a slash: ./zzzz", "zzzz")
    refused(
        "no task, group or tag 'hellaswagg' in lm-eval; did you mean hellaswag.*a slash: ./hellaswagg", "hellaswagg"
    )


@pytest.mark.slow
def test_many_processes_load_the_same_task_at_once(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "t", questions())
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        results = pool.map(_load_in_a_process, [str(folder)] * 4, chunksize=1)
    assert all(result == results[0] for result in results)


def test_a_sentinel_has_no_search_item_and_teaches_nothing(tmp_path: Path, engine: Engine) -> None:
    general = TaskSpec(str(write_task(tmp_path / "g", questions())), "general", search_items=6, holdout_items=6)
    path = str(write_task(tmp_path / "s", [{"text": f"{i} {words(i, 5)}"} for i in range(9)], **TEXTS))
    sentinel = TaskSpec(path, SENTINEL, search_items=0, holdout_items=REST)
    harness = load_tasks([general, sentinel], seed=0, chat=Chat(), allow_task_code=False)
    assert (harness.infos[1].search_items, harness.infos[1].holdout_items) == (0, 9)
    assert harness.suite_hash(SEARCH)["s"] == []
    for suite in (SEARCH, HOLDOUT):
        harness.prepare(engine.tokenizer, suite)
    assert {outcome.task for outcome in harness.score(engine, SEARCH)} == {"g"}
    assert [outcome.task for outcome in harness.score(engine, HOLDOUT)].count("s") == 9
    assert {example.task for example in examples(harness, SEARCH, engine)} == {"g"}
    assert [row["search_tokens"] > 0 for row in harness.describe()] == [True, False]


def test_only_a_sentinel_may_have_no_search_item(tmp_path: Path) -> None:
    path = str(write_task(tmp_path / "t", questions(10)))
    for role, items, holdout, message in (
        ("general", 0, 3, "each suite needs items: task .* has 0 and 3"),
        (SENTINEL, 2, 3, "the search has no items of a sentinel task: task .* has 2"),
        (SENTINEL, 0, 0, "each suite needs items"),
        (SENTINEL, 0, 11, "has 10 different items, 11 holdout items asked for; lower holdout_items"),
    ):
        spec = TaskSpec(path, role, search_items=items, holdout_items=holdout)
        with pytest.raises(TaskError, match=message):
            load_tasks([spec], seed=0, chat=Chat(), allow_task_code=False)
