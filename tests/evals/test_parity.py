"""The numbers are lm-eval's: every kind of task against `simple_evaluate` with HFLM, item by item."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from evals.engine import Engine
from evals.lm_harness import Harness
from evals.outcomes import HOLDOUT, SEARCH, Outcome
from tests.evals.conftest import load, questions, words, write_task

pytestmark = pytest.mark.slow  # lm-eval runs beside ours

TOLERANCE = 1e-4  # nats per log-likelihood


WRITTEN: dict[str, Any] = {  # a task whose answers of four tokens are written, not chosen
    "output_type": "generate_until",
    "doc_to_text": "{{text}}",
    "doc_to_target": "{{answer}}",
    "doc_to_choice": None,
    "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 4, "do_sample": False},
}


@pytest.fixture(scope="module")
def reference(engine: Engine) -> HFLM:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return HFLM(pretrained=engine.model, tokenizer=engine.tokenizer, batch_size=8)


def evaluate(reference: HFLM, path: Path, **options: Any) -> dict[str, Any]:
    """What lm-eval itself makes of all items of a task file written by `write_task` (or of a group of them)."""
    folder = path.parent
    for file in folder.glob("*.yaml"):  # lm-eval takes data files from the current folder
        config = yaml.safe_load(file.read_text())
        for split, data in config.get("dataset_kwargs", {}).get("data_files", {}).items():
            config["dataset_kwargs"]["data_files"][split] = str(folder / data)
        file.write_text(yaml.safe_dump(config, allow_unicode=True, sort_keys=False))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    name = yaml.safe_load(path.read_text()).get("group") or path.stem
    return lm_eval.simple_evaluate(
        model=reference, tasks=[name], task_manager=manager, bootstrap_iters=0, log_samples=True, **options
    )


def scored(harness: Harness, engine: Engine) -> list[Outcome]:
    return [outcome for suite in (SEARCH, HOLDOUT) for outcome in harness.score(engine, suite)]


def check(harness: Harness, engine: Engine, theirs: dict[str, Any], metric: str) -> None:
    """Every item's log-likelihoods and metric, then the mean, agree with lm-eval's samples."""
    task = harness.tasks[0]
    outcomes = scored(harness, engine)
    items = [item for suite in (SEARCH, HOLDOUT) for item in task.items[suite]]
    samples = {(name, repr(sample["doc"])): sample for name, logged in theirs["samples"].items() for sample in logged}
    assert len(samples) == len(outcomes)
    for outcome, item in zip(outcomes, items, strict=True):
        sample = samples[task.members[item.member].task_name, repr(item.doc)]
        if outcome.loglikelihoods:
            expected = [answer[0] if isinstance(answer, tuple) else answer for answer in sample["filtered_resps"]]
            assert outcome.loglikelihoods == pytest.approx(expected, abs=TOLERANCE)
        if metric != "bits_per_byte":
            assert outcome.value == sample[metric]
    assert any(o.value for o in outcomes if o.suite == SEARCH) or metric == "exact_match"
    group = task.info.name
    results = theirs["results"][group]
    pooled = sum(o.value for o in outcomes) / sum(o.weight for o in outcomes)
    assert pooled == pytest.approx(results[f"{metric},{task.filter}"], rel=1e-5)


@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
def test_multiple_choice(tmp_path: Path, engine: Engine, reference: HFLM, metric: str) -> None:
    folder = write_task(tmp_path / "mc", questions())
    harness = load(folder, metric=metric)
    check(harness, engine, evaluate(reference, folder / "mc.yaml"), metric)
    assert harness.infos[0].chance == 0.25


def test_long_items_are_cut_as_lm_eval_cuts_them_and_counted(tmp_path: Path, engine: Engine, reference: HFLM) -> None:
    folder = write_task(tmp_path / "mc", questions())
    harness = load(folder)
    check(harness, engine, evaluate(reference, folder / "mc.yaml"), "acc")
    truncated = {o.item for o in scored(harness, engine) if o.truncated}
    assert len(truncated) == 3  # items 6, 13 and 20


def test_one_token_choices(tmp_path: Path, engine: Engine, reference: HFLM) -> None:
    rows = [{**row, "choices": list("ABCD")} for row in questions()]
    folder = write_task(tmp_path / "letters", rows, target_delimiter="")
    check(load(folder), engine, evaluate(reference, folder / "letters.yaml"), "acc")


def test_empty_context(tmp_path: Path, engine: Engine, reference: HFLM) -> None:
    rows = [{"choices": [f"{words(i, 4)} {a}" for a in ("is", "are")], "gold": i % 2} for i in range(30)]
    folder = write_task(tmp_path / "pairs", rows, doc_to_text="", target_delimiter="")
    check(load(folder), engine, evaluate(reference, folder / "pairs.yaml"), "acc")


def test_spaces_at_the_seam(tmp_path: Path, engine: Engine, reference: HFLM) -> None:
    folder = write_task(tmp_path / "seam", questions(), doc_to_text="{{question}}  \n ", target_delimiter="")
    check(load(folder), engine, evaluate(reference, folder / "seam.yaml"), "acc")


def test_a_context_for_each_choice(tmp_path: Path, engine: Engine, reference: HFLM) -> None:
    rows = [{"gap": i % 2, "starts": [words(i, 2), words(i + 3, 3)], "rest": words(i + 1, 2)} for i in range(24)]
    folder = write_task(tmp_path / "gaps", rows, doc_to_text="gap", doc_to_choice="starts", doc_to_target="{{rest}}")
    check(load(folder), engine, evaluate(reference, folder / "gaps.yaml"), "acc")


def test_fixed_shots(tmp_path: Path, engine: Engine, reference: HFLM) -> None:
    shots = [{"question": words(90 + i, 2), "choices": list("abcd"), "gold": i} for i in range(4)]
    short = [row for i, row in enumerate(questions()) if i % 7 != 6]
    folder = write_task(
        tmp_path / "shots",
        short,
        doc_to_text="{{question}}",
        fewshot_delimiter="\n",
        description="Pick.\n",
        fewshot_config={"sampler": "first_n", "samples": shots},
    )
    theirs = evaluate(reference, folder / "shots.yaml", num_fewshot=2)
    assert theirs["samples"]["shots"][0]["arguments"][0][0].count("\n") == 3
    check(load(folder, shots=2), engine, theirs, "acc")


@pytest.mark.parametrize("sampler", ["default", "first_n"])
def test_as_many_fixed_examples_as_shots_are_enough(
    tmp_path: Path, engine: Engine, reference: HFLM, sampler: str
) -> None:
    shots = [{"question": words(90 + i, 1), "choices": list("abcd"), "gold": i} for i in range(3)]
    folder = write_task(
        tmp_path / "all",
        [row for i, row in enumerate(questions()) if i % 7 != 6],
        doc_to_text="{{question}}",
        fewshot_delimiter="\n",
        fewshot_config={"sampler": sampler, "samples": shots},
    )
    theirs = evaluate(reference, folder / "all.yaml", num_fewshot=3)
    harness = load(folder, shots=3)
    if sampler == "first_n":  # else lm-eval draws the order once for the task, and we for each item
        check(harness, engine, theirs, "acc")
    harness.prepare(engine.tokenizer, SEARCH)
    for asked in harness.requests(SEARCH):
        assert all(shot["question"] in asked.args[0] for shot in shots)


def test_a_tasks_own_number_of_shots_is_lm_evals(tmp_path: Path, engine: Engine, reference: HFLM) -> None:
    """A group whose members differ in it, too; the study's own number overrides both."""
    shots = [{"question": words(90 + i, 1), "choices": list("abcd"), "gold": i} for i in range(4)]
    short = [row for i, row in enumerate(questions()) if i % 7 != 6]
    fixed = {"fewshot_config": {"sampler": "first_n", "samples": shots}, "doc_to_text": "{{question}}"}
    folder = write_task(tmp_path / "own", short, task="two", num_fewshot=2, **fixed)
    write_task(folder, [{**row, "question": row["question"][::-1]} for row in short], task="none", **fixed)
    (folder / "both.yaml").write_text("group: both\ntask: [two, none]\naggregate_metric_list: [{metric: acc}]\n")
    theirs = evaluate(reference, folder / "two.yaml")
    assert theirs["samples"]["two"][0]["arguments"][0][0].count("\n\n") == 2
    check(load(folder / "two.yaml"), engine, theirs, "acc")
    check(load(folder / "both.yaml"), engine, evaluate(reference, folder / "both.yaml"), "acc")
    found = [
        load(folder / f"{name}.yaml", **given).describe()[0]
        for name, given in (
            ("two", {}),
            ("both", {}),
            ("none", {}),
            ("two", {"shots": 0}),
            ("both", {"shots": 1}),
        )
    ]
    assert [(row["shots"], row["shots_from"]) for row in found] == [
        (2, "task"),
        ("0 to 2", "task"),
        (0, ""),
        (0, "study"),
        (1, "study"),
    ]


def test_rolling_text_shorter_and_longer_than_the_context(tmp_path: Path, engine: Engine, reference: HFLM) -> None:
    rows = [{"text": words(i, 3 + 7 * (i % 6))} for i in range(20)]
    assert max(len(row["text"].encode()) for row in rows) > 2 * engine.max_length
    folder = write_task(
        tmp_path / "texts",
        rows,
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        doc_to_choice=None,
        metric_list=[{"metric": m} for m in ("word_perplexity", "bits_per_byte")],
    )
    harness = load(folder)
    check(harness, engine, evaluate(reference, folder / "texts.yaml"), "bits_per_byte")
    assert harness.infos[0].metric == "bits_per_byte"
    assert not harness.infos[0].higher_is_better


def test_last_word(tmp_path: Path, engine: Engine, reference: HFLM) -> None:
    prompts = [words(i, 4) for i in range(20)]
    made = [engine.generate(prompt_of(engine, text))[0].text for text in prompts]  # half the items are right
    rows = [{"text": text, "end": made[i][:1] if i % 2 else "?"} for i, text in enumerate(prompts)]
    folder = write_task(
        tmp_path / "last",
        rows,
        output_type="loglikelihood",
        doc_to_text="{{text}}",
        doc_to_target="{{end}}",
        doc_to_choice=None,
        metric_list=[
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
    )
    harness = load(folder)
    assert harness.infos[0].metric == "acc"
    check(harness, engine, evaluate(reference, folder / "last.yaml"), "acc")


def prompt_of(engine: Engine, text: str) -> list[Any]:
    from evals.tokens import Prompt

    return [Prompt(engine.encoder.text(text), (), 4)]


def test_generated_answers(tmp_path: Path, engine: Engine, reference: HFLM) -> None:
    prompts = [words(i, 1 + i % 4) for i in range(20)]
    made = [engine.generate(prompt_of(engine, text))[0].text for text in prompts]
    rows = [{"text": text, "answer": made[i] if i % 3 else "no"} for i, text in enumerate(prompts)]
    rows.append({"text": words(5, 40), "answer": "longer than the context"})
    folder = write_task(
        tmp_path / "answers",
        rows,
        **WRITTEN,
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    harness = load(folder)
    theirs = evaluate(reference, folder / "answers.yaml")
    check(harness, engine, theirs, "exact_match")
    assert 0.3 < theirs["results"]["answers"]["exact_match,none"] < 0.9
    outcomes = scored(harness, engine)
    assert [o.truncated for o in outcomes].count(True) == 1
    assert {o.lengths for o in outcomes if o.broken_off} == {(4,)}
    assert [o.broken_off for o in outcomes].count(True) > 0


def test_stop_strings(engine: Engine, reference: HFLM) -> None:
    from lm_eval.api.instance import Instance

    from evals.tokens import Prompt

    texts = [words(i, 2) for i in range(12)]
    free = [answer.text for answer in engine.generate([Prompt(engine.encoder.text(text), (), 12) for text in texts])]
    stop = tuple(sorted({text[3:5] for text in free if len(text) > 5})[:3])
    options = {"until": list(stop), "max_gen_toks": 12, "do_sample": False}
    asked = [Instance("generate_until", {}, (text, options), 0) for text in texts]
    answers = engine.generate([Prompt(engine.encoder.text(text), stop, 12) for text in texts])
    ours = [answer.text for answer in answers]
    assert ours == reference.generate_until(asked, disable_tqdm=True)
    assert ours != free
    assert [answer.ended for answer in answers] == [answer.tokens < 12 for answer in answers]
    assert {answer.ended for answer in answers} == {True, False}


def test_a_group_is_one_task_of_all_its_items(tmp_path: Path, engine: Engine, reference: HFLM) -> None:
    folder = tmp_path / "both"
    write_task(folder, questions(20), task="first")
    write_task(folder, [{**row, "question": f"again {row['question']}"} for row in questions(12)], task="second")
    group = {
        "group": "both",
        "task": ["first", "second"],
        "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}],
    }
    (folder / "both.yaml").write_text(yaml.safe_dump(group))
    harness = load(folder, search=20)
    check(harness, engine, evaluate(reference, folder / "both.yaml"), "acc")
    assert [info.name for info in harness.infos] == ["both"]


def test_chat_template(tmp_path: Path, engine: Engine, reference: HFLM) -> None:
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    engine.tokenizer.chat_template = template
    try:
        folder = write_task(tmp_path / "chat", questions())
        harness = load(folder, chat_template=True)
        check(harness, engine, evaluate(reference, folder / "chat.yaml", apply_chat_template=True), "acc")
    finally:
        engine.tokenizer.chat_template = None


def test_a_system_instruction_without_a_template_stands_before_the_prompt(
    tmp_path: Path, engine: Engine, reference: HFLM
) -> None:
    folder = write_task(tmp_path / "told", questions())
    theirs = evaluate(reference, folder / "told.yaml", system_instruction="Answer well.")
    assert theirs["samples"]["told"][0]["arguments"][0][0].startswith("Answer well.")
    check(load(folder, system="Answer well."), engine, theirs, "acc")


def test_shots_of_another_split(tmp_path: Path, engine: Engine, reference: HFLM) -> None:
    folder = write_task(
        tmp_path / "split",
        [row for i, row in enumerate(questions()) if i % 7 != 6],
        doc_to_text="{{question}}",
        dataset_kwargs={"data_files": {"test": "split.jsonl", "train": "train.jsonl"}},
        training_split="train",
        fewshot_split="train",
        fewshot_config={"sampler": "first_n"},
    )
    shots = [{"question": words(70 + i, 2), "choices": list("abcd"), "gold": i} for i in range(4)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in shots))
    theirs = evaluate(reference, folder / "split.yaml", num_fewshot=2)
    assert words(71, 2) in theirs["samples"]["split"][0]["arguments"][0][0]
    check(load(folder, shots=2), engine, theirs, "acc")


def test_shots_drawn_for_each_item(tmp_path: Path, engine: Engine, reference: HFLM) -> None:
    """lm-eval seeds a task's draws and we each item's, so HFLM is given our requests instead of its own."""
    folder = write_task(tmp_path / "drawn", questions(30), doc_to_text="{{question}}", fewshot_delimiter="\n")
    harness = load(folder, search=12, holdout=10, shots=2)
    outcomes = harness.score(engine, SEARCH)
    asked = harness.requests(SEARCH)
    assert len({request.args[0] for request in asked}) == 12
    assert len({request.args[0].split("\n")[0] for request in asked}) > 3
    found = [score for outcome in outcomes for score in outcome.loglikelihoods]
    assert found == pytest.approx(
        [score for score, _ in reference.loglikelihood(asked, disable_tqdm=True)], abs=TOLERANCE
    )


def test_filters_before_the_metric(tmp_path: Path, engine: Engine, reference: HFLM) -> None:
    """An answer that a pattern picks from the text; one target is empty."""
    prompts = [words(i, 1 + i % 4) for i in range(16)]
    made = [engine.generate(prompt_of(engine, text))[0].text for text in prompts]
    rows = [{"text": text, "answer": (made[i].strip() or "x")[0] if i % 3 else ""} for i, text in enumerate(prompts)]
    pick = [{"function": "regex", "regex_pattern": r"(\S)"}, {"function": "take_first"}]
    folder = write_task(
        tmp_path / "picked",
        rows,
        **WRITTEN,
        filter_list=[
            {"name": "whole", "filter": [{"function": "take_first"}]},
            {"name": "picked", "filter": pick},
        ],
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    theirs = evaluate(reference, folder / "picked.yaml")
    assert theirs["results"]["picked"]["exact_match,picked"] > theirs["results"]["picked"]["exact_match,whole"]
    harness = load(folder, metric="exact_match,picked")
    ours = scored(harness, engine)
    assert sum(o.value for o in ours) / len(ours) == theirs["results"]["picked"]["exact_match,picked"]


def test_a_tasks_own_code_and_metric(tmp_path: Path, engine: Engine, reference: HFLM) -> None:
    folder = write_task(tmp_path / "own", questions())
    (folder / "own_code.py").write_text(
        "def text(doc):\n    return doc['question'].upper()\n\n\n"
        "def results(doc, answers):\n    best = max(range(4), key=lambda c: answers[c][0] / len(doc['choices'][c]))\n"
        "    return {'near': 1.0 if best == doc['gold'] else 0.5 if abs(best - doc['gold']) == 1 else 0.0}\n"
    )
    file = folder / "own.yaml"
    config = yaml.safe_load(file.read_text())
    config |= {"metric_list": [{"metric": "near", "aggregation": "mean", "higher_is_better": True}]}
    del config["doc_to_text"]
    code = "doc_to_text: !function own_code.text\nprocess_results: !function own_code.results\n"
    data = config["dataset_kwargs"]["data_files"]
    data["test"] = str(folder / data["test"])
    file.write_text(yaml.safe_dump(config) + code)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    theirs = lm_eval.simple_evaluate(
        model=reference, tasks=["own"], task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    assert 0 < theirs["results"]["own"]["near,none"] < 1
    check(load(folder, allow_task_code=True), engine, theirs, "near")


def test_chat_with_shots_as_turns(tmp_path: Path, engine: Engine, reference: HFLM) -> None:
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    engine.tokenizer.chat_template = template
    try:
        shots = [{"question": words(90 + i, 1), "choices": list("abcd"), "gold": i} for i in range(4)]
        folder = write_task(
            tmp_path / "turns",
            [row | {"question": row["question"][:8]} for row in questions()],
            doc_to_text="{{question}}",
            fewshot_config={"sampler": "first_n", "samples": shots},
        )
        theirs = evaluate(
            reference, folder / "turns.yaml", num_fewshot=2, apply_chat_template=True, fewshot_as_multiturn=True
        )
        assert theirs["samples"]["turns"][0]["arguments"][0][0].count("<user>") == 3
        check(load(folder, shots=2, chat_template=True), engine, theirs, "acc")
        theirs = evaluate(
            reference, folder / "turns.yaml", num_fewshot=2, apply_chat_template=True, fewshot_as_multiturn=False,
            system_instruction="Be brief.",
        )  # fmt: skip
        prompt = theirs["samples"]["turns"][0]["arguments"][0][0]
        assert (prompt.count("<user>"), prompt.count("<system>Be brief.")) == (1, 1)
        single = load(folder, shots=2, chat_template=True, multiturn=False, system="Be brief.")
        check(single, engine, theirs, "acc")
    finally:
        engine.tokenizer.chat_template = None
