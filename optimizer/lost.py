"""The items that a merge lost or won against the base, with their texts where the task files are still there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from evals.errors import TaskError
from optimizer.errors import MergefrontError
from optimizer.runs.frames import rows_of
from optimizer.study.study_file import read_study
from optimizer.study.tasks import task_specs
from optimizer.words import one_line

if TYPE_CHECKING:
    from evals.lm_texts import ItemText
    from optimizer.run import Run


def flipped_documents(run: Run, trial: int) -> tuple[list[dict[str, Any]], str]:
    """List the flipped items of a trial: task, item, change, question, choices, right, base and merge (what each took).

    Returns:
        The items, those lost first; and why texts are missing, empty where none is.
    """
    suite, frame = run.suite_of(trial), run.flipped_items(trial)
    assert run.references is not None, "a trial that is scored has a base"
    texts, why = _texts(
        run, suite, {task: [*frame.loc[frame["task"] == task, "item"]] for task in frame["task"].unique()}
    )
    outcomes = run.outcomes(suite)
    said = {
        name: outcomes[outcomes["trial"] == number].set_index(["task", "item"])["loglikelihoods"]
        for name, number in (("base", run.references[0]), ("merge", trial))
    }
    rows = []
    for row in sorted(rows_of(frame).values(), key=lambda row: (row["change"], row["task"])):
        key = (row["task"], row["item"])
        text = texts.get(key)
        told = {} if text is None else {name: text.answer(list(found[key])) for name, found in said.items()}
        about = {} if text is None else {"question": text.question, "choices": text.choices, "right": text.right}
        rows.append({**row, **about, **told})
    return rows, why


def flipped_document(run: Run, trial: int) -> dict[str, Any]:
    """Return a trial's flipped items as JSON values, and why texts are missing."""
    flipped, why = flipped_documents(run, trial)
    return {"flipped": flipped, "without_texts": why}


def flipped_lines(run: Run, trial: int) -> list[str]:
    """Write a trial's flipped items for a terminal, a few lines each; names and texts are inert."""
    documents, why = flipped_documents(run, trial)
    lines = []
    for row in documents:
        lines.append(f"{row['change']}  {one_line(row['task'])}  {row['item']}")
        if "question" in row:
            lines.append(f"    {one_line(row['question'])}")
            right = one_line(" | ".join(row["right"]))
            answers = (f"; {name} {one_line(row[name])}" for name in ("base", "merge") if row[name])
            lines.append(f"    right {right}{''.join(answers)}")
    return [*lines, *([why] if why else [])] or ["no answer flipped"]


def _texts(run: Run, suite: str, wanted: dict[str, list[str]]) -> tuple[dict[tuple[str, str], ItemText], str]:
    """Read the items' texts from the study's task files; nothing, and why, where these cannot be read."""
    from evals.lm_tasks import load_tasks  # brings lm-eval, which no reader of a run needs otherwise
    from evals.lm_texts import item_texts

    try:
        study = read_study(run.path / "study.yaml")
        # Whoever reads a run consents to nothing that its study file says: no code of a task runs here.
        harness = load_tasks(task_specs(study), seed=study.evals.seed, chat_template=False, allow_task_code=False)
    except (MergefrontError, TaskError) as error:
        return {}, f"texts cannot be read: {error}"
    texts = item_texts(harness, suite, wanted)
    missing = sum(map(len, wanted.values())) - len(texts)
    return texts, f"{missing} of the texts are not in the task files any more" if missing else ""
