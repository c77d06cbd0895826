"""Which way each expert's weight moves a merged tensor: the derivative of a blend, its masks held as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from optimizer.merging.methods.blocks import Blend, Deltas, Line
from optimizer.merging.methods.task_vectors import AgreeingSum, PrunedSum, agreeing, pruned_deltas

# (base block (rows, n), expert blocks, index of the first row) -> for each expert the derivative of the merged block
# by its weight, all float32; called in the order of the rows, the given blocks may be written to
DirectionWalk = Callable[[Tensor, Sequence[Tensor], int], list[Tensor]]


def directions(blend: Blend) -> DirectionWalk:
    """Begin a walk over the blocks of a tensor.

    Args:
        blend: of a method that adds up deltas. Where signs are elected it was made of the recipe's weights, elsewhere
            of weights 1, so that its factors are the derivatives.
    """
    match blend:
        case Line(weight):
            return lambda b, xs, _: [xs[0].sub_(b).mul_(weight)]
        case Deltas(factors):
            return lambda b, xs, _: [x.sub_(b).mul_(factor) for x, factor in zip(xs, factors, strict=True)]
        case PrunedSum():
            return _pruned(blend)
        case AgreeingSum():
            return _agreeing(blend)
    raise AssertionError(f"{type(blend).__name__} adds no deltas")


def _pruned(blend: PrunedSum) -> DirectionWalk:
    deltas_of = pruned_deltas(blend.prunes)

    def step(b: Tensor, xs: Sequence[Tensor], start: int) -> list[Tensor]:
        return [delta.mul_(factor) for delta, factor in zip(deltas_of(b, xs, start), blend.factors, strict=True)]

    return step


def _agreeing(blend: AgreeingSum) -> DirectionWalk:
    deltas_of = pruned_deltas(blend.prunes)

    def step(b: Tensor, xs: Sequence[Tensor], start: int) -> list[Tensor]:
        deltas = deltas_of(b, xs, start)
        agree = agreeing([delta * weight for delta, weight in zip(deltas, blend.weights, strict=True)])
        return [delta.mul_(mask).mul_(blend.scale) for delta, mask in zip(deltas, agree, strict=True)]

    return step
