"""Merge methods: pure functions from a base tensor, expert tensors and numbers to a blend of their blocks.

Called by `merge` for one tensor at a time. The numbers each method takes are declared in `search_spaces.METHODS`.
"""

from collections.abc import Callable

from optimizer.merging.methods.blocks import (
    BLOCK,
    Blend,
    Deltas,
    Line,
    Mixture,
    Tensors,
    Values,
    blend_in_one_pass,
    float_blocks,
    row_blocks,
    row_width,
)
from optimizer.merging.methods.facts import FactCache
from optimizer.merging.methods.fusion import arcee_fusion, nearswap, passthrough, ram, ramplus_tl, sce
from optimizer.merging.methods.spherical import karcher, model_stock, multislerp, nuslerp, slerp
from optimizer.merging.methods.task_vectors import (
    breadcrumbs,
    breadcrumbs_ties,
    dare_linear,
    dare_ties,
    della,
    della_linear,
    linear,
    task_arithmetic,
    ties,
)

__all__ = [
    "BLOCK",
    "METHODS",
    "Blend",
    "Deltas",
    "FactCache",
    "Line",
    "Mixture",
    "Tensors",
    "Values",
    "blend_in_one_pass",
    "float_blocks",
    "row_blocks",
    "row_width",
]

METHODS: dict[str, Callable[[Tensors, Values], Blend]] = {
    method.__name__: method
    for method in (
        linear,
        slerp,
        nuslerp,
        multislerp,
        karcher,
        task_arithmetic,
        ties,
        dare_linear,
        dare_ties,
        della,
        della_linear,
        breadcrumbs,
        breadcrumbs_ties,
        sce,
        ram,
        ramplus_tl,
        model_stock,
        nearswap,
        arcee_fusion,
        passthrough,
    )
}
