"""What crosses between tasks, workers, the run folder and the objectives: plain frozen values, one row per item.

A task's score is a ratio of sums over its items, or another function of such sums, so that any score can be recomputed
or resampled from the rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

TaskKind = Literal["task", "text", "kl_to_base"]  # one of lm-eval's, or of a plain text file
KINDS: tuple[TaskKind, ...] = get_args(TaskKind)
TASK, TEXT, KL_TO_BASE = KINDS  # the last one is also the name of its metric
SEARCH = "search"
HOLDOUT = "holdout"
SUITES = (SEARCH, HOLDOUT)
CERTIFY = "certify"  # items of no suite: nothing is scored on them before a certificate asks for it
SENTINEL = "sentinel"  # the role of a task that the search never sees
REST = -1  # as a number of holdout items: all that the search leaves
SPARE = -2  # as a number of certify items: a fifth of all, of those that neither a suite nor a worked example may use
SPARE_SHARE = 0.2
ACCURACIES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match")  # metrics that are shares
OUTCOME_COLUMNS = (
    *("task", "suite", "item", "value", "weight", "loglikelihoods", "truncated", "lengths", "broken_off"),
    *("right", "inclusion", "answer", "statistic", "parts", "cluster"),
)


@dataclass(frozen=True, slots=True)
class Chat:
    """How prompts are wrapped.

    Args:
        template: in the tokenizer's chat template.
        system: what stands before each prompt, as the system's turn where there is a template.
        multiturn: worked examples are turns of the conversation; else they stand in one turn with the question.
    """

    template: bool = False
    system: str = ""
    multiturn: bool = True


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """What a study asks of one task.

    Args:
        name: an lm-eval task or group name, or the path of a task's YAML file or of the folder that holds it. A group
            is one task of all its items. Of a text: the path of its file.
        role: "domain" (what the expert learned), "general" (what it may forget) or "sentinel" (in no objective and
            never searched on: it tells ability that was kept from a form that was learned).
        expert: domain tasks only: the expert measured here; "" is every expert.
        search_items: items the search scores; 0 for a sentinel.
        bank_items: items, those among them, that anchors are scored on; other candidates are scored on `search_items`
            of them. Fewer where the task has fewer; 0: no bank, and every candidate is scored on the same items.
        holdout_items: items that judge the front, disjoint from the search items: a number, a share of the task's
            items (a float between 0 and 1), or `REST`, all that remain.
        certify_items: items kept for certificates, of what the suites leave: a number, a share of the task's items, or
            `SPARE`; as many as there are where there are fewer. A number or a share also keeps them from the shots.
        group_by: the column of what items share, as a passage: they are resampled and certified together, and none of
            them is in another suite. "": a column that is known to hold such a thing, where items share it.
        shots: worked examples before each item; None: as many as the task itself asks for (its `num_fewshot`).
        metric: one of the task's metrics, with a filter after a comma where it has several; "" is the first usable one.
        kind: what the name is of. A text is cut into items and scored in bits per byte, or by how far a candidate's
            predictions lie from the base's (KL).
        judge: a program and its arguments that give each written answer a number, in place of the task's metrics.
        weight: what it counts among the tasks of its objective, above 0.
    """

    name: str
    role: str
    expert: str = ""
    search_items: int = field(kw_only=True)
    holdout_items: int | float = field(kw_only=True)
    certify_items: int | float = field(default=0, kw_only=True)
    shots: int | None = None
    metric: str = ""
    bank_items: int = 0
    group_by: str = ""
    kind: TaskKind = TASK
    judge: tuple[str, ...] = ()
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """What was found when the task was read: everything the objectives need to know about it.

    Args:
        chance: the score of guessing, in the metric's unit; 0 where there is none.
        search_items, holdout_items: items in each suite.
        drawn_items: of the search's, that a candidate other than an anchor is scored on; 0: all of them.
        statistic: what the score is, where it is no ratio of sums over items: see `evals.statistics`.
        weight: what it counts among the tasks of its objective, above 0.
    """

    name: str
    role: str
    expert: str
    output_type: str
    metric: str
    higher_is_better: bool
    chance: float
    search_items: int
    holdout_items: int
    drawn_items: int = 0
    statistic: str = ""
    weight: float = 1.0

    @property
    def is_to_base(self) -> bool:
        """Whether the distance to the base is measured, not an answer."""
        return self.metric == KL_TO_BASE


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one candidate did on one item.

    Args:
        item: 16 hex digits of the item's content hash.
        value, weight: the task's score is sum(value) / sum(weight). Accuracy: 0 or 1, and 1; bits per byte: bits, and
            bytes; KL to the base: the bits in which the candidate writes what the base expects, on average, and tokens.
            The base needs its entropy, any other as much more as its divergence is.
        loglikelihoods: of each choice in order, in nats; empty for generated text; KL to the base: the mean over what
            the base expects.
        truncated: the item was longer than the model's context and was cut, as lm-eval cuts it.
        lengths: tokens of each choice in order, of the text, or of the answer that was written.
        broken_off: the answer was still being written when it reached the task's limit of tokens.
        right: which choices are right, by their place; empty where there are no choices.
        inclusion: probability with which the item was drawn from its task's bank; 1 where all were scored.
        answer: what the model wrote, up to the first stop string; None where nothing is written.
        statistic, parts: of a score that is no such ratio: its name, and what the item adds to it (`evals.statistics`).
        cluster: 16 hex digits of the passage or document that the item shares with others; "" where it shares none.
    """

    task: str
    suite: str
    item: str
    value: float
    weight: float
    loglikelihoods: tuple[float, ...]
    truncated: bool
    lengths: tuple[int, ...] = ()
    broken_off: bool = False
    right: tuple[int, ...] = ()
    inclusion: float = 1.0
    answer: str | None = None
    statistic: str = ""
    parts: tuple[float, ...] = ()
    cluster: str = ""
