"""Where a worker's model lies: on the CPU, on one device, or spread over several GPUs.

The first GPU holds all that is no layer (embeddings, last norm, head), since tokens enter and predictions are made
there; the layers follow in order, so that hidden states go from GPU to GPU once a pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from evals.layerwise import layers_of
from optimizer.checkpoints.checkpoint import Checkpoint
from optimizer.errors import CheckpointError, WorkerError
from search_spaces.groups import split_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def devices_of(device: str, gpus: int) -> list[torch.device]:
    """Return the devices that a worker's model lies on: the first of those that the process sees.

    Args:
        device: "auto" (cuda where there is one), "cpu", "cuda" or "mps".
        gpus: how many were asked for; 0 where none were: one, if there is one.

    Raises:
        WorkerError: they are not there.
    """
    if device == "mps":
        require_mps()
        return [torch.device("mps")]
    seen = 0 if device == "cpu" else gpus_seen()
    if seen < gpus:
        raise WorkerError(f"workers.gpus must be at most the GPUs that a worker sees; given {gpus}, torch sees {seen}")
    if device == "cuda" and not seen:
        raise WorkerError("workers.device is cuda, and torch sees no CUDA device; say auto or cpu")
    if gpus > 1:
        return [torch.device("cuda", i) for i in range(gpus)]
    return [torch.device("cuda" if seen else "cpu")]


def gpus_seen() -> int:
    """Return how many GPUs torch can use in this process."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def least_memory() -> int:
    """Return the bytes of the smallest GPU that torch sees; 0 where it sees none."""
    return min((torch.cuda.mem_get_info(i)[1] for i in range(gpus_seen())), default=0)


def require_mps() -> None:
    """Raise WorkerError where torch finds no GPU of Apple's."""
    if not torch.backends.mps.is_available():
        raise WorkerError(
            f"mps is the GPU of an Apple computer; given mps, and torch {torch.__version__} finds none here; say auto, "
            "cpu or cuda"
        )


@dataclass(frozen=True, slots=True)
class Spread:
    """A model over several devices.

    Args:
        layers: which device each layer lies on, in order.
        bytes: of the checkpoint's tensors on each device.
    """

    layers: tuple[int, ...]
    bytes: tuple[int, ...]

    @classmethod
    def of(cls, base: Checkpoint, devices: int) -> Spread:
        """Partition the layers so that each device holds about as many bytes.

        Raises:
            CheckpointError: a device would hold nothing.
        """
        sizes: dict[int | None, int] = {None: 0}
        for name in base.names:
            layer = split_name(name)[1]
            sizes[layer] = sizes.get(layer, 0) + base.size(name)
        outside = sizes.pop(None)
        numbers = sorted(layer for layer in sizes if layer is not None)
        places = _contiguous([sizes[layer] for layer in numbers], outside, devices)
        held = [outside, *[0] * (devices - 1)]
        for layer, place in zip(numbers, places, strict=True):
            held[place] += sizes[layer]
        if numbers != list(range(len(numbers))) or 0 in held:
            raise CheckpointError(
                f"{base.folder} has {len(numbers)} layers, which cannot be spread over {devices} GPUs; "
                "lower workers.gpus"
            )
        return cls(tuple(places), tuple(held))

    def device(self, name: str) -> int:
        """Return the device of a checkpoint's tensor."""
        layer = split_name(name)[1]
        return 0 if layer is None else self.layers[layer]


def _contiguous(sizes: Sequence[int], outside: int, devices: int) -> list[int]:
    """Give each layer its device, by where its middle lies among the bytes of all layers."""
    total = sum(sizes)
    on_first = max(0.0, (total + outside) / devices - outside)
    each = (total - on_first) / (devices - 1)
    places, before = [], 0.0
    for size in sizes:
        middle = before + size / 2 - on_first
        places.append(0 if middle < 0 else min(devices - 1, 1 + int(middle / each)))
        before += size
    return places


def spread_over(model: PreTrainedModel, devices: Sequence[torch.device], spread: Spread) -> None:
    """Put a model's layers on their devices, and have hidden states follow them (accelerate's hooks).

    Raises:
        CheckpointError: it has no such list of layers, or numbers beside its modules.
    """
    from accelerate import dispatch_model

    names = {id(module): name for name, module in model.named_modules()}
    try:
        layers = [names[id(layer)] for layer in layers_of(model)]
        above = {".".join(layers[0].split(".")[:depth]) for depth in range(layers[0].count(".") + 1)}
        places = {name: devices[place] for name, place in zip(layers, spread.layers, strict=True)}
        for name in above:
            module = model.get_submodule(name)
            module._apply(lambda tensor: tensor.to(devices[0]), recurse=False)  # numbers of its own
            beside = (f"{name}.{child}" if name else child for child, _ in module.named_children())
            places |= {child: devices[0] for child in beside if child not in above and child not in places}
        skipped = getattr(model, "_skip_keys_device_placement", None)
        dispatch_model(model, places, main_device=devices[0], skip_keys=skipped)
    except ValueError as error:
        raise CheckpointError(
            f"{type(model).__name__} cannot be spread over {len(devices)} GPUs: {error}; leave workers.gpus out"
        ) from error
