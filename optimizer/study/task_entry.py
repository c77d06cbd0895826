"""An entry of a study's lists of tasks: what is scored, on how many items, and how."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from evals.outcomes import KINDS, TaskKind
from optimizer.study.section import MOST_ITEMS, Certify, Holdout, Section

MOST_SHOTS = 64
MOST_WEIGHT = 1e6


class TaskEntry(Section):
    """One task; a plain name stands for `{task: name}`. One of `KINDS` says what is scored."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": [kind]} for kind in KINDS]})

    task: str | None = Field(
        default=None,
        min_length=1,
        description="An lm-eval task name, or the path of a task folder or YAML file.",
    )
    text: str | None = Field(
        default=None,
        min_length=1,
        description="Instead of a task: a plain text file, cut into items and scored in bits per byte.",
    )
    kl_to_base: str | None = Field(
        default=None,
        min_length=1,
        description="Instead of a task, to measure forgetting without labels: a plain text file, over which a merge's "
        "predictions are compared with the base's. General and sentinel tasks only.",
    )
    expert: str = Field(default="", description="Domain tasks: the expert measured here. Default: every expert.")
    items: int | None = Field(
        default=None, ge=1, le=MOST_ITEMS, description="Items the search scores. Default: evals.items."
    )
    bank: int | None = Field(
        default=None,
        ge=0,
        le=MOST_ITEMS,
        description="Items that anchors are scored on, others on `items` of them; 0: no bank. Default: evals.bank.",
    )
    holdout_items: Holdout | None = Field(
        default=None,
        description="Items that judge the front: a number, a share of all (0.3) or rest. Default: evals.holdout_items.",
    )
    certify_items: Certify | None = Field(
        default=None, description="Items kept for certificates. Default: evals.certify_items."
    )
    shots: int | None = Field(
        default=None,
        ge=0,
        le=MOST_SHOTS,
        description="Worked examples before each item. Default: the task's own num_fewshot.",
    )
    metric: str = Field(default="", description="One of the task's metrics. Default: its first.")
    weight: float = Field(
        default=1.0, gt=0, le=MOST_WEIGHT, description="What it counts among the tasks of its objective."
    )
    group_by: str = Field(
        default="",
        description="Column of what items share, such as a passage: they are resampled and certified together, and all "
        "in one suite. Default: a column such as passage, where items share it.",
    )
    judge: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(),
        strict=False,  # a list of JSON has become one of Python here, before an entry's own reading
        description="A program and its arguments in place of the metrics: it reads written answers as JSON lines and "
        "writes a number for each, more is better. Needs evals.allow_task_code.",
    )

    @property
    def given(self) -> dict[TaskKind, str]:
        """What is named to be scored, by kind; a sound entry names one."""
        return {kind: value for kind in KINDS if (value := getattr(self, kind)) is not None}

    @property
    def kind(self) -> TaskKind:
        """The kind of what is scored."""
        return next(iter(self.given))

    @property
    def source(self) -> str:
        """The task's name, or the path of what is scored."""
        return self.given[self.kind]

    @model_serializer(mode="wrap")
    def _as_typed(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if key not in KINDS or value is not None}


def _read_task(value: object) -> object:
    return {"task": value} if isinstance(value, str) else value


Tasks = tuple[Annotated[TaskEntry, BeforeValidator(_read_task, json_schema_input_type=str | TaskEntry)], ...]
