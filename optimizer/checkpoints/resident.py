"""A model in memory, made from a checkpoint's tensors, and where each of them lives in it.

transformers renames some tensors, and fuses the experts of a mixture. Their places are found once, when a worker
starts, so that every merge can write each tensor where it belongs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optimizer.checkpoints.checkpoint import Checkpoint
from optimizer.checkpoints.configs import CONFIG_FILE, model_config, refused
from optimizer.checkpoints.devices import Spread, devices_of, spread_over
from optimizer.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def resident_model(base: Checkpoint, *, dtype: str, device: str, gpus: int = 0) -> PreTrainedModel:
    """Load the base's model on private copies of its tensors: writing into the mapped file's pages would cost memory.

    Args:
        dtype: "auto", "bf16" or "float32".
        device: "auto", "cpu", "cuda" or "mps".
        gpus: as in `devices_of`; over more than one the layers are spread.

    Raises:
        CheckpointError: the base is no causal language model, or its config asks for other tensors.
        WorkerError: there is no such device.
    """
    target = {"auto": None, "bf16": torch.bfloat16, "float32": torch.float32}[dtype]
    devices = devices_of(device, gpus)
    require_loadable(base)
    spread = Spread.of(base, len(devices)) if len(devices) > 1 else None
    tensors = {}
    for name in base.names:
        tensor, place = base.tensor(name), devices[spread.device(name) if spread else 0]
        tensors[name] = tensor.to(place, target if tensor.is_floating_point() else None, copy=True)
    model: Any = _loaded(base, tensors)
    model.requires_grad_(False)
    add_image_outputs(model)
    if spread:
        spread_over(model, devices, spread)
    else:
        model.to(devices[0])
    resident: PreTrainedModel = model.eval()
    return resident


def add_image_outputs(model: PreTrainedModel) -> None:
    """Add an empty field `image_outputs` to what the text model of a Llama 4 with a tower for images returns.

    The forward pass of transformers 5.24 reads that field, which its text model lacks: any text is an AttributeError.
    """

    def add_field(module: object, given: object, output: Any) -> None:
        if not isinstance(output, tuple) and not hasattr(output, "image_outputs"):
            output.image_outputs = None

    if model.config.model_type == "llama4":
        model.get_submodule("language_model").register_forward_hook(add_field)


def require_loadable(base: Checkpoint) -> None:
    """Make the base's model of tensors without numbers, as a check that takes no memory.

    Raises:
        CheckpointError: as `resident_model`.
    """
    from transformers import AutoConfig
    from transformers.utils import logging

    def attempt(settings: dict[str, Any]) -> None:
        config = AutoConfig.for_model(**settings)
        with torch.device("meta"):
            _architecture(config, base)(config)

    loud = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with refused(base.folder / CONFIG_FILE, base.config, attempt):
            _loaded(base, {n: torch.empty(base.shape(n), dtype=base.dtype(n), device="meta") for n in base.names})
    finally:
        logging.set_verbosity(loud)


def _loaded(base: Checkpoint, tensors: dict[str, Tensor]) -> PreTrainedModel:
    """Load the model that the base's config describes, on these tensors; none is left over and none is missing."""
    config = model_config(base.folder)
    floating = next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), None)
    if floating is None:
        raise CheckpointError(f"{base.folder} holds no floating-point tensor")
    where = {"device_map": "meta"} if next(iter(tensors.values())).is_meta else {}
    with _no_bar():
        model, loading = _architecture(config, base).from_pretrained(
            None, config=config, state_dict=tensors, dtype=floating, output_loading_info=True,
            ignore_mismatched_sizes=True, **where,
        )  # fmt: skip
    odd = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in loading[kind]]
    if odd:  # transformers would go on with random numbers
        raise CheckpointError(f"config and tensors of {base.folder} do not fit: {', '.join(map(str, odd[:5]))}")
    loaded: PreTrainedModel = model
    return loaded


@contextmanager
def _no_bar() -> Iterator[None]:
    """Keep transformers from drawing a progress bar."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _architecture(config: PreTrainedConfig, base: Checkpoint) -> Any:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    known = [MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING]
    if config.get_text_config() is not config:  # of towers too, which its causal model would leave out
        known.reverse()
    for mapping in known:
        if type(config) in mapping:
            return mapping[type(config)]  # the Auto class insists on a folder
    raise CheckpointError(f"a base must be a causal language model; {base.folder} is a {config.model_type}")


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
    stored = model.state_dict().keys()  # a buffer may be a part of the model: a router's bias, a layer's scale
    parameters |= {name: buffer for name, buffer in model.named_buffers() if name in stored}
    prefix = f"{model.base_model_prefix}."
    places: dict[str, Tensor] = {}
    for name in base.names:
        known = next((n for n in (name, prefix + name, name.removeprefix(prefix)) if n in parameters), None)
        if known is not None:
            places[name] = parameters.pop(known)
    holds = sum(parameter.numel() for parameter in parameters.values())
    for name in sorted(set(base.names) - set(places)):
        tensor = base.tensor(name)
        held = [(_in_common(name, other), part) for other, part in _parts(name, parameters) if _holds(part, tensor)]
        most = max((common for common, _ in held), default=0)
        found = [part for common, part in held if common == most]
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


def merge_target(parameters: dict[str, Tensor], base: Checkpoint) -> dict[str, Tensor]:
    """Return the tensors a merge writes: the model's own, or in the base's dtype where it is scored in another.

    A merge is rounded to the base's dtype, whatever it is scored in, since that is what an export will hold.
    """
    if all(parameters[name].dtype == base.dtype(name) for name in base.names if name in parameters):
        return parameters
    return {name: torch.empty(base.shape(name), dtype=base.dtype(name)) for name in base.names}


def _in_common(one: str, other: str) -> int:
    """Count the parts in which two names end alike."""
    pairs = zip(reversed(one.split(".")), reversed(other.split(".")), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _parts(name: str, parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Give what a tensor may be, by name: a parameter, or the whole or half of a fused one at an expert's number."""
    layer, inner = _numbers(name)[:1], _numbers(name)[1:]
    for other, parameter in parameters.items():
        if _numbers(other)[:1] != layer:
            continue
        yield other, parameter
        if inner and parameter.dim() == 3 and inner[-1] < len(parameter):
            whole = parameter[inner[-1]]
            yield from ((other, part) for part in (whole, *whole.tensor_split(2)))


def _numbers(name: str) -> list[int]:
    """Give the whole numbers among a name's parts: the layer, then an expert."""
    return [int(part) for part in name.split(".") if part.isdecimal()]


def _holds(part: Tensor, tensor: Tensor) -> bool:
    return part.shape == tensor.shape and bool((part == tensor.to(part.device, part.dtype)).all())
