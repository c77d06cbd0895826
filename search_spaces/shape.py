"""The shape of a search space: how a weight may vary with depth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from search_spaces.errors import SpaceError

Kind = Literal["uniform", "slope", "curve", "blocks", "layers"]
LEAST = {"curve": 2, "blocks": 1}  # the shapes that take a number, and the least it may be
WORDS = tuple(kind for kind in get_args(Kind) if kind not in LEAST)


@dataclass(frozen=True, slots=True)
class Shape:
    """How weights run along the layers.

    uniform: one weight; slope: a straight line, two weights; curve: n knots joined by lines; blocks: n runs of layers
    with a weight each; layers: a weight for every layer. `n` is 0 except for curve and blocks.
    """

    kind: Kind
    n: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise SpaceError(
                "the shape is not known", given=repr(self.kind), mend=f"one of {', '.join(get_args(Kind))}"
            )
        least = LEAST.get(self.kind, 0)
        if isinstance(self.n, bool) or not isinstance(self.n, int) or self.n < least or (not least and self.n):
            rule = f"{self.kind} takes a whole number, at least {least}" if least else f"{self.kind} takes no number"
            raise SpaceError(
                rule, given=self.n, where="shape", mend="write uniform, slope, layers, curve: 4, blocks: 4"
            )

    @classmethod
    def read(cls, plain: str | Mapping[str, int]) -> Shape:
        """Read a shape as a study file writes it: `uniform`, `slope`, `layers`, `{curve: 4}` or `{blocks: 4}`."""
        if isinstance(plain, str):
            return cls(plain)  # type: ignore[arg-type]  # checked in __post_init__
        if not isinstance(plain, Mapping) or len(plain) != 1:
            raise SpaceError("a shape is a word or one word with a number", given=plain, mend="write curve: 4")
        ((kind, n),) = plain.items()
        return cls(kind, n)  # type: ignore[arg-type]
