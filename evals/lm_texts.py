"""The texts of items, read from the tasks again: a run folder holds only their hashes and what models did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evals.lm_asked import LoadedTask
from evals.lm_examples import SIZES
from evals.lm_harness import Harness
from evals.lm_split import Item, right_choices


@dataclass(frozen=True, slots=True)
class ItemText:
    """What an item asks.

    Args:
        question: as the task writes it, without worked examples.
        choices: to choose from; empty where there are none.
        right: the right answers.
        metric: of the task; it decides which choice a model took.
    """

    question: str
    choices: tuple[str, ...]
    right: tuple[str, ...]
    metric: str

    def answer(self, loglikelihoods: Sequence[float]) -> str:
        """Return the choice that a model took; empty where it is not known.

        Args:
            loglikelihoods: of the choices, in nats.
        """
        if not self.choices or len(loglikelihoods) < len(self.choices):
            return ""
        size = SIZES.get(self.metric)
        scores = [
            loglikelihood / (size(choice) if size else 1.0)
            for loglikelihood, choice in zip(loglikelihoods, self.choices, strict=False)
        ]
        return self.choices[scores.index(max(scores))]


def item_texts(harness: Harness, suite: str, wanted: Mapping[str, Sequence[str]]) -> dict[tuple[str, str], ItemText]:
    """Read the texts of some items of a suite, by task and hash; those that are not there are left out."""
    return {
        (task.info.name, item.hash): _text(task, item)
        for task in harness.tasks
        for item in task.items[suite]
        if item.hash in set(wanted.get(task.info.name, ()))
    }


def _text(task: LoadedTask, item: Item) -> ItemText:
    member, doc = task.members[item.member], item.doc
    question, target = member.doc_to_text(doc), member.doc_to_target(doc)
    if member.OUTPUT_TYPE != "multiple_choice":
        given = target if isinstance(target, list) else [target]
        return ItemText(str(question), (), tuple(map(str, given)), task.info.metric)
    choices = tuple(map(str, member.doc_to_choice(doc)))
    asked = target if member.multiple_input else question
    return ItemText(str(asked), choices, tuple(choices[i] for i in right_choices(member, doc)), task.info.metric)
