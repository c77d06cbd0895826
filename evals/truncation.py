"""What a limit cut short, said in words from the stored outcomes: the model's context, and a task's limit of tokens."""

from __future__ import annotations

import pandas as pd


def cut_short(outcomes: pd.DataFrame) -> list[str]:
    """Write a sentence for each task with items that were too long or answers that were broken off.

    Args:
        outcomes: columns task, item, truncated, broken_off and lengths (see `Outcome`), of any trials and suites;
            the last two are null where they were not recorded.
    """
    found = []
    for task, rows in outcomes.groupby("task", sort=False):
        items = rows["item"].nunique()
        if number := rows.loc[rows["truncated"].astype(bool), "item"].nunique():  # the same for every trial
            found.append(
                f"task {task}: {number} of {items} items {_were(number)} longer than the model's context and cut at "
                "the front, as lm-eval cuts them; use fewer shots, or leave such items out"
            )
        answers = rows[rows["broken_off"].notna()]
        broken = answers[answers["broken_off"].astype(bool)]
        if number := len(broken):
            limits = " or ".join(str(limit) for limit in sorted({max(lengths) for lengths in broken["lengths"]}))
            found.append(
                f"task {task}: {number} of {len(answers)} answers (all trials) {_were(number)} broken off at the limit "
                f"of {limits} tokens; raise max_gen_toks in the task's generation_kwargs"
            )
    return found


def _were(number: int) -> str:
    return "was" if number == 1 else "were"
