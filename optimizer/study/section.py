"""What the sections of a study file are made of: a strict mapping, and numbers for which a word may stand."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, PlainValidator, WithJsonSchema

MOST_ITEMS = 1_000_000_000  # beyond any machine, within its integers
MOST_GPUS = 64


class Section(BaseModel):
    """A mapping of the study file: strict, frozen, without keys of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, populate_by_name=True)


def count_or(
    word: str, *, least: int = 1, most: int = MOST_ITEMS, share: bool = False
) -> tuple[PlainValidator, WithJsonSchema]:
    """Read a whole number, or one word instead, or (where that means something) a share."""
    between = ", a share such as 0.3" if share else ""

    def read(value: object) -> object:
        if (
            value == word
            or (type(value) is int and least <= value <= most)
            or (share and type(value) is float and 0 < value < 1)
        ):
            return value
        if type(value) is int and value > most:
            raise ValueError(f"must be {most:,} at most")
        raise ValueError(f"must be a whole number, {least} or more{between}, or the word {word}")

    schema: list[dict[str, Any]] = [{"type": "integer", "minimum": least, "maximum": most}, {"const": word}]
    if share:
        schema.insert(1, {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1})
    return PlainValidator(read), WithJsonSchema({"anyOf": schema})


def _read_gpus(value: object) -> object:
    """Read how many GPUs a worker has: whole ones, or one nth of one, within a hundredth of it."""
    if value == "auto":
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
        if value == (whole := round(value)) and 1 <= whole <= MOST_GPUS:
            return whole
        if value < 1 and 0.99 <= value * (n := round(1 / value)) <= 1 and n <= MOST_GPUS:
            return value
    raise ValueError(
        "must be a whole number, a part of a GPU for n workers on each (0.5, 0.33, 0.25), or the word auto"
    )


Gpus = Annotated[
    int | float | Literal["auto"],
    PlainValidator(_read_gpus),
    WithJsonSchema({"anyOf": [{"type": "number", "exclusiveMinimum": 0, "maximum": MOST_GPUS}, {"const": "auto"}]}),
]
Holdout = Annotated[int | float | Literal["rest"], *count_or("rest", share=True)]
Certify = Annotated[int | float | Literal["spare"], *count_or("spare", least=0, share=True)]
