"""Where a checkpoint's tensors live in a resident model: transformers renames some, and fuses the experts of a mixture.

Found once, when a worker starts, so that every merge can write each tensor where it belongs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from optimizer.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optimizer.checkpoints import Checkpoint


def tensor_places(model: PreTrainedModel, base: Checkpoint) -> dict[str, Tensor]:
    """Give the memory of a model that each tensor of its checkpoint was loaded into.

    A tensor is looked for by its name, with or without the model's own prefix, and where transformers calls it
    otherwise by its numbers: as a parameter, or as the part of a fused one that its expert's number says. What the
    model takes no notice of (such as the masks in old GPT-2 files) gets memory of its own.

    Args:
        model: was loaded from the checkpoint, which had all it asks for.

    Raises:
        CheckpointError: a tensor could be in two places, or a parameter holds what no tensor fills.
    """
    parameters = {name: parameter.data for name, parameter in model.named_parameters()}
    prefix = f"{model.base_model_prefix}."
    places: dict[str, Tensor] = {}
    for name in base.names:
        known = next((n for n in (name, prefix + name, name.removeprefix(prefix)) if n in parameters), None)
        if known is not None:
            places[name] = parameters.pop(known)
    holds = sum(parameter.numel() for parameter in parameters.values())
    for name in sorted(set(base.names) - set(places)):
        tensor = base.tensor(name)
        found = [part for part in _parts(name, parameters) if _holds(part, tensor)]
        if len(found) > 1:
            raise CheckpointError(f"{base.folder}: {name} could be {len(found)} parts of the model: they are alike")
        holds -= sum(part.numel() for part in found)
        places[name] = found[0] if found else tensor.clone()
    if holds:
        raise CheckpointError(
            f"{base.folder}: transformers makes {', '.join(sorted(parameters)[:3])} of its tensors in a way not known "
            "here, so it cannot be searched; `mergefront merge` works on the files alone"
        )
    return places


def _parts(name: str, parameters: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """Give what a tensor may be: a parameter, or what a fused one holds at the number of an expert, halved or not."""
    layer, inner = _numbers(name)[:1], _numbers(name)[1:]
    for other, parameter in parameters.items():
        if _numbers(other)[:1] != layer:
            continue
        yield parameter
        if inner and parameter.dim() == 3 and inner[-1] < len(parameter):
            whole = parameter[inner[-1]]
            yield from (whole, *whole.tensor_split(2))


def _numbers(name: str) -> list[int]:
    """Give the whole numbers among a name's parts: the layer, then an expert."""
    return [int(part) for part in name.split(".") if part.isdecimal()]


def _holds(part: Tensor, tensor: Tensor) -> bool:
    return part.shape == tensor.shape and bool((part == tensor.to(part.device, part.dtype)).all())
