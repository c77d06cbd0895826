"""What a study file says of derived experts: those that it names, and the anchors that every study scores."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_serializer

from optimizer.study.section import Section
from optimizer.workers.orders import Form


class CalibrationTexts(Section):
    """Two plain text files that a derived expert is made over, one for each side."""

    domain: str = Field(min_length=1, description="What the expert reads.")
    general: str = Field(min_length=1, description="What the base reads.")


def _read_calibration(value: object) -> object:
    return {"domain": value, "general": value} if isinstance(value, str) else value


Calibration = Annotated[
    CalibrationTexts, BeforeValidator(_read_calibration, json_schema_input_type=str | CalibrationTexts)
]


class DerivedEntry(Section):
    """An expert that is made before the search, of the base and another expert."""

    from_: str = Field(alias="from", min_length=1, description="Name of the expert it is derived from.")
    form: Form = Field(default="regmean", description="The closed form.")
    lambda_: float = Field(
        default=0.4, alias="lambda", gt=0, lt=1, description="How far it goes from the base (0) to the expert (1)."
    )
    calibration: Calibration | None = Field(
        default=None,
        description="A plain text file, or one for each side, to read in place of the search items.",
    )


def _read_derived(value: object) -> object:
    return () if value == "none" else tuple(value) if isinstance(value, list) else value


class AnchorsSection(Section):
    """Points that every study scores before it searches."""

    derived: Annotated[
        tuple[Form, ...],
        BeforeValidator(_read_derived, json_schema_input_type=Literal["none"] | tuple[Form, ...]),
    ] = Field(
        default=("kfac",),
        description="Closed forms by which experts are derived from base and expert, each at three shares; or none.",
    )

    @field_serializer("derived")
    def _as_typed(self, derived: tuple[str, ...]) -> tuple[str, ...] | str:
        return derived or "none"
