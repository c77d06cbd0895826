"""The items that a merge lost or won against the base, with their texts where the task files are still there."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from evals.errors import TaskError
from evals.outcomes import Chat
from optimizer.errors import MergefrontError
from optimizer.runs.frames import rows_of
from optimizer.study.study_file import read_study
from optimizer.study.tasks import task_specs
from optimizer.views.tables import flipped_records
from optimizer.words import one_line

if TYPE_CHECKING:
    from evals.lm_texts import ItemText
    from optimizer.run import Run


def flipped_document(run: Run, trial: int) -> dict[str, Any]:
    """Return a trial's flipped items as JSON values, those lost first: flipped, and why texts are missing.

    An item is task, item, change, question, right, base and merge (what each answered), and choices; texts are empty,
    and without_texts says why, where they cannot be read.
    """
    rows = flipped_records(run, trial)
    assert run.references is not None, "a trial that is scored has a base"
    wanted: dict[str, list[str]] = {}
    for row in rows:
        wanted.setdefault(row["task"], []).append(row["item"])
    suite = run.suite_of(trial)
    texts, why = _texts(run, suite, wanted) if rows else ({}, "")
    outcomes = run.outcomes(suite)
    said = {
        name: rows_of(outcomes[outcomes["trial"] == number].set_index(["task", "item"])[["loglikelihoods", "answer"]])
        for name, number in (("base", run.references[0]), ("merge", trial))
    }
    for row in rows:
        key = (row["task"], row["item"])
        text = texts.get(key)
        row["choices"] = [] if text is None else [*text.choices]
        if text is not None:
            row |= {"question": text.question, "right": " | ".join(text.right)}
        row |= {name: _answer(text, found[key]) or row[name] for name, found in said.items()}
    # what an earlier report told stands where task files are gone
    is_whole = all(row["question"] or row["right"] for row in rows)
    return {"flipped": rows, "without_texts": "" if is_whole else why}


def flipped_with_texts(run: Run, trial: int) -> list[dict[str, Any]]:
    """Return a trial's flipped items as front.json keeps them: `flipped_records` with their texts."""
    return [
        {name: value for name, value in row.items() if name != "choices"}
        for row in flipped_document(run, trial)["flipped"]
    ]


def _answer(text: ItemText | None, outcome: dict[str, Any]) -> str:
    """Return what a model answered: what it wrote, or the choice it took; empty where neither is known."""
    if isinstance(outcome["answer"], str):
        return outcome["answer"]
    return text.answer(list(outcome["loglikelihoods"])) if text is not None else ""


def flipped_lines(run: Run, trial: int) -> list[str]:
    """Write a trial's flipped items for a terminal, a few lines each; names and texts are inert."""
    document = flipped_document(run, trial)
    lines = []
    for row in document["flipped"]:
        lines.append(f"{row['change']}  {one_line(row['task'])}  {row['item']}")
        lines += [f"    {one_line(row['question'])}"] if row["question"] else []
        answers = (f"{name} {one_line(row[name])}" for name in ("right", "base", "merge") if row[name])
        lines += [f"    {told}"] if (told := "; ".join(answers)) else []
    return [*lines, *filter(None, [document["without_texts"]])] or ["no answer flipped"]


def _texts(run: Run, suite: str, wanted: dict[str, list[str]]) -> tuple[dict[tuple[str, str], ItemText], str]:
    """Read the items' texts from the study's task files; nothing, and why, where these cannot be read."""
    try:
        study = read_study(run.path / "study.yaml")

        from evals.lm_tasks import load_tasks  # brings lm-eval, which no reader of a run needs otherwise
        from evals.lm_texts import item_texts

        specs = [replace(spec, judge=(), metric="") if spec.judge else spec for spec in task_specs(study)]
        # Whoever reads a run consents to nothing that its study file says: no code of a task runs here.
        harness = load_tasks(specs, seed=study.evals.seed, chat=Chat(), allow_task_code=False)
        texts = item_texts(harness, suite, wanted)
    except (MergefrontError, TaskError, ImportError) as error:
        return {}, f"texts cannot be read: {error}"
    missing = sum(map(len, wanted.values())) - len(texts)
    return texts, f"{missing} of the texts are not in the task files any more" if missing else ""
