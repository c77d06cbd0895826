"""What is asked of a model: tasks as they were loaded, their items, and lm-eval's requests with their tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from evals.lm_split import Item
from evals.outcomes import TaskInfo
from evals.tokens import Pair, Prompt, Text


@dataclass(frozen=True, slots=True)
class LoadedTask:
    """A task, or a group of tasks that count as one, with its items split."""

    info: TaskInfo
    members: tuple[ConfigurableTask, ...]
    filter: str
    shots: tuple[int, ...]  # of each member
    shots_from: str  # study, task or "": nobody asks for any
    items: Mapping[str, tuple[Item, ...]]  # by suite, and those kept for certificates
    notes: tuple[str, ...] = ()  # what a person might not expect
    judge: tuple[str, ...] = ()  # a program that gives answers their numbers
    classes: int = 0  # choices of an item at most, where the score needs them

    def repeats(self, member: int) -> int:
        """Count the answers that are drawn for each request of a member."""
        task = self.members[member]
        return int(task.config.repeats) if task.OUTPUT_TYPE == "generate_until" else 1

    @property
    def aggregate(self) -> Callable[[list[Any]], float]:
        """The function with which lm-eval makes the score of all items."""
        found: Callable[[list[Any]], float] = self.members[0].aggregation()[self.info.metric]
        return found


@dataclass(frozen=True, slots=True)
class Request:
    """One of lm-eval's instances with its tokens; the type of `encoded` says what is asked.

    Args:
        instance: lm-eval's own, which takes the answer.
        encoded: a pair or a text to be scored, or a prompt to be answered.
        length: tokens that are predicted; of an answer not known before it is written.
    """

    instance: Instance
    encoded: Pair | Text | Prompt
    length: int


@dataclass(frozen=True, slots=True)
class AskedItem:
    """An item of a task and the requests that lm-eval makes of it.

    Args:
        right: which choices are right.
    """

    task: LoadedTask
    item: Item
    requests: tuple[Request, ...]
    right: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Answered:
    """A request's answer as lm-eval takes it, the number of tokens, whether the limit of tokens broke it off, and the
    text, where one was written."""

    response: object
    length: int
    broken_off: bool = False
    text: str | None = None
