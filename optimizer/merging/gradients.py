"""Gradients tensor by tensor, as each appears, and the gradient of a loss by the merge weights made of them.

A gradient of the parameters lives only until it is used: dL/dw = <dL/dtheta, direction of w>. So learning holds the
model, one tensor's gradient and the activations, and no second copy of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optimizer.errors import MergeError
from optimizer.merging.merge import MergeCache, Merger, Sources
from optimizer.merging.methods.blocks import float_blocks, row_blocks, row_width
from search_spaces import METHODS, Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Methods whose merge follows from their weights by a derivative: sums of deltas, pruned or not.
LEARNABLE = (
    "linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs",
    "breadcrumbs_ties",
)  # fmt: skip

Gradient = dict[tuple[str, str], float]  # by (expert, checkpoint tensor)


@contextmanager
def taking_gradients(
    model: PreTrainedModel, places: Mapping[str, Tensor], take: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Have backward passes hand over each checkpoint tensor's gradient as soon as it is there, and drop it then.

    Args:
        model: its parameters ask for no gradient before and after.
        places: the memory of the model that each checkpoint tensor lies in, by name (`tensor_places`).
        take: is given a tensor's name and its gradient, in the tensor's shape.
    """
    owners = _owners(places)

    def hand_over(parameter: Tensor) -> None:
        for name in owners[parameter.data.untyped_storage().data_ptr()]:
            take(name, _part(parameter, places[name]))
        parameter.grad = None

    with ExitStack() as stack:
        stack.callback(model.zero_grad, set_to_none=True)  # what an error left would be added to later
        stack.callback(model.requires_grad_, False)
        for parameter in model.parameters():
            if parameter.data.untyped_storage().data_ptr() in owners:
                parameter.requires_grad_(True)
                stack.callback(parameter.register_post_accumulate_grad_hook(hand_over).remove)
        stack.enter_context(_whole_embeddings(model))
        yield


@contextmanager
def weight_gradients(
    model: PreTrainedModel, places: Mapping[str, Tensor], sources: Sources, recipe: Recipe, cache: MergeCache
) -> Iterator[Gradient]:
    """Let backward passes through a model that holds a recipe's merge add up the gradient by its weights.

    Masks that the method draws or cuts are held as they are.

    Args:
        model, places: as in `taking_gradients`.
        recipe: of a method in LEARNABLE whose weights are not normalised.

    Yields:
        A gradient that grows with every backward pass, for every expert and floating tensor.

    Raises:
        MergeError: the method's weights have no derivative, or a gradient is not finite; the tensor is named.
    """
    if recipe.method not in LEARNABLE or (METHODS[recipe.method].parameter("normalize") and recipe.value("normalize")):
        raise MergeError(f"weights are learned for {', '.join(LEARNABLE)} without normalize; given {recipe.method}")
    if any(setting.parameter == "sum" and setting.value != 1 for setting in recipe.settings):
        raise MergeError("weights are learned where base and experts add up to 1; given linear with another sum")
    merger = Merger(sources, recipe, cache)
    found: Gradient = {(e, n): 0.0 for e, _ in recipe.experts for n in places if places[n].is_floating_point()}
    with taking_gradients(model, places, lambda name, gradient: _add_products(found, name, gradient, merger)):
        yield found


@contextmanager
def _whole_embeddings(model: PreTrainedModel) -> Iterator[None]:
    """Give the padding token's row a gradient like any other: torch leaves it out, and a text may hold it."""
    embeddings = [(m, m.padding_idx) for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    for module, _ in embeddings:
        module.padding_idx = None
    try:
        yield
    finally:
        for module, padding in embeddings:
            module.padding_idx = padding


def _owners(places: Mapping[str, Tensor]) -> dict[int, list[str]]:
    """Return the floating checkpoint tensors that lie in each piece of memory."""
    owners: dict[int, list[str]] = {}
    for name, place in places.items():
        if place.is_floating_point():
            owners.setdefault(place.untyped_storage().data_ptr(), []).append(name)
    return owners


def _part(parameter: Tensor, place: Tensor) -> Tensor:
    """Return the part of a parameter's gradient that belongs to a place in the parameter, contiguous."""
    assert parameter.grad is not None, "the hook runs when a gradient is there"
    gradient = parameter.grad.contiguous()
    offset = place.storage_offset() - parameter.data.storage_offset()
    return gradient.as_strided(place.size(), place.stride(), gradient.storage_offset() + offset).contiguous()


def _add_products(found: Gradient, name: str, gradient: Tensor, merger: Merger) -> None:
    tensors, walk = merger.directions(name, gradient.device)
    sums = [0.0] * len(tensors.experts)
    blocks = zip(float_blocks(tensors.base, tensors.others), row_blocks(gradient, row_width(gradient)), strict=True)
    for (start, base, experts), part in blocks:
        flat = part.reshape(-1)
        flat = flat if flat.dtype == torch.float64 else flat.float()
        for i, direction in enumerate(walk(base, experts, start)):
            sums[i] += float(torch.dot(flat, direction.reshape(-1).to(flat.dtype)))
    for (expert, _), total in zip(tensors.experts, sums, strict=True):
        if not math.isfinite(total):
            raise MergeError(f"a gradient must be finite: that of expert {expert}'s weight in {name} is {total}")
        found[expert, name] += total
