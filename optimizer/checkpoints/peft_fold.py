"""Adapters that are more than two factors (DoRA, modules_to_save, biases, IA3, ...), folded into their base by peft.

Done once: the folded tensors lie in the user's cache, where every worker of the machine maps them as it maps an expert.
The only door to peft, which is an extra and imported when such an adapter is opened.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from optimizer.checkpoints.checkpoint import Checkpoint
from optimizer.checkpoints.headers import read_json
from optimizer.checkpoints.lora import CONFIG_FILE, MAX_RANK, WEIGHTS_FILE, read_weights
from optimizer.checkpoints.resident import resident_model, tensor_places
from optimizer.checkpoints.tensor_file import WEIGHTS_FILE as FOLDED_FILE
from optimizer.checkpoints.tensor_file import write_tensors
from optimizer.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SIZES = ("r", "init_r", "target_r", "num_virtual_tokens", "num_vectors", "n_frequency")  # of tensors peft makes
FORBIDDEN = ("megatron_config", "layer_replication", "loftq_config")  # import a module, change the depth, the base


def fold_by_peft(folder: Path, base: Checkpoint, *, key: str) -> Path:
    """Return the file of a base's tensors with an adapter folded in, made where the cache lacks it.

    The base is held in memory in float32, peft merges in float32, and each tensor is rounded once to the base's dtype.

    Args:
        folder: the adapter's.
        base: what it stands on.
        key: of the adapter on that base and of their files' times; it names the file, with the version of peft.

    Returns:
        A safetensors file in $XDG_CACHE_HOME/mergefront/adapters (~/.cache without that variable).

    Raises:
        CheckpointError: peft is not installed, cannot fold the adapter, or leaves a part of it aside.
    """
    try:
        peft = version("peft")
    except PackageNotFoundError as error:
        mend = "pip install 'mergefront[adapters]'"
        raise CheckpointError(f"the adapter in {folder} is not plain LoRA, and peft folds it: {mend}") from error
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mergefront" / "adapters"
    out = cache / f"{key}-peft-{peft}"
    if not out.is_dir():
        tensors = _folded(folder, base)
        cache.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=cache))
        try:
            kinds = {name: base.kind(name) for name in base.names}
            write_tensors(temporary / FOLDED_FILE, kinds, lambda name: tensors[name].to(base.dtype(name)))
            temporary.rename(out)
        except OSError as error:
            if not out.is_dir():  # else another process was faster
                raise CheckpointError(f"the folded adapter cannot be written to {out} ({error.strerror})") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return out / FOLDED_FILE


def _folded(folder: Path, base: Checkpoint) -> dict[str, torch.Tensor]:
    """Give all of the base's tensors, those that peft changed in float32."""
    import peft

    config = read_json(folder / CONFIG_FILE, unique=True)
    _require_known(folder, config)
    weights = read_weights(folder)
    model = resident_model(base, dtype="float32", device="cpu")
    parts = _parts_of_fused(model, base)
    try:
        with torch.random.fork_rng(devices=[]):  # peft draws numbers that the file's then replace
            adapted: Any = peft.PeftModel(model, peft.PeftConfig.from_pretrained(str(folder)))
            loading: Any = peft.set_peft_model_state_dict(adapted, weights)
    except Exception as error:  # peft has many ways to object to a config
        _refuse(folder, f"peft says: {type(error).__name__}: {error!s:.300}")
    if not hasattr(adapted.base_model, "merge_and_unload"):
        _refuse(folder, f"peft_type {config['peft_type']!r} adds to a model's input and cannot be merged")
    own = (adapted.base_model.prefix, "modules_to_save")
    missing = sorted(key for key in loading.missing_keys if any(word in key for word in own))
    for keys, fault in ((missing, "lacks"), (sorted(loading.unexpected_keys), "has, with no place for it,")):
        if keys:
            _refuse(folder, f"{WEIGHTS_FILE} {fault} {keys[0]!r} (one of {len(keys)} such)")
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except Exception as error:  # values that are not finite, and others
        _refuse(folder, f"peft says: {type(error).__name__}: {error!s:.300}")
    parameters = {name: parameter.detach() for name, parameter in merged.named_parameters()}
    return _by_name(folder, base, parameters, merged.base_model_prefix, parts)


@dataclass(frozen=True, slots=True)
class _Part:
    """Where a tensor lies in a parameter that transformers makes of several, such as the experts of a mixture."""

    parameter: str
    offset: int  # numbers from the parameter's first
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def of(self, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        whole = parameters[self.parameter].contiguous()
        return whole.as_strided(self.size, self.stride, whole.storage_offset() + self.offset)


def _parts_of_fused(model: PreTrainedModel, base: Checkpoint) -> dict[str, _Part]:
    """Find the tensors that are parts of a model's parameters; none where that cannot be told."""
    try:
        places = tensor_places(model, base)
    except CheckpointError:
        return {}
    owners = {p.untyped_storage().data_ptr(): (name, p.detach()) for name, p in model.named_parameters()}
    found = {}
    for name, place in places.items():
        owner, whole = owners.get(place.untyped_storage().data_ptr(), ("", place))
        if owner and place.numel() < whole.numel():
            offset = int(place.storage_offset()) - int(whole.storage_offset())
            found[name] = _Part(owner, offset, tuple(place.shape), place.stride())
    return found


def _by_name(
    folder: Path,
    base: Checkpoint,
    parameters: Mapping[str, torch.Tensor],
    prefix: str,
    parts: Mapping[str, _Part],
) -> dict[str, torch.Tensor]:
    left, tensors = dict(parameters), {}
    for name in base.names:
        spellings = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
        known = next((spelling for spelling in spellings if spelling in left), None)
        part = parts.get(name)
        if part is not None and part.parameter in parameters:
            tensors[name] = part.of(parameters)
            left.pop(part.parameter, None)
        else:  # no parameter: a mask in an old file
            tensors[name] = base.tensor(name) if known is None else left.pop(known)
        if tensors[name].shape != base.shape(name):
            _refuse(folder, f"{name} becomes {tuple(tensors[name].shape)}, and is {base.shape(name)} in the base")
    if left:
        _refuse(folder, f"it gives {min(left)!r} a tensor of its own, which the base does not have (a tied head?)")
    return tensors


def _require_known(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse what peft would only warn of, and what must not be asked of it."""
    import peft

    kind = config.get("peft_type")
    kinds: Any = peft.PEFT_TYPE_TO_CONFIG_MAPPING
    if not isinstance(kind, str) or kind not in kinds:
        _refuse(folder, f"peft {peft.__version__} knows no peft_type {kind!r:.80}")
    known = kinds[kind].__dataclass_fields__
    for key in SIZES:
        if type(config.get(key)) in (int, float) and config[key] > MAX_RANK:
            _refuse(folder, f"{key} may be {MAX_RANK:,} at most; given {config[key]!r:.80}")
    for key in sorted(config):
        if config[key] and (key in FORBIDDEN or key not in known):
            fault = "is not supported" if key in FORBIDDEN else f"is unknown to peft {peft.__version__}"
            _refuse(folder, f"{key}={json.dumps(config[key]):.80} {fault}")


def _refuse(folder: Path, fault: str) -> NoReturn:
    raise CheckpointError(f"the adapter in {folder} cannot be folded: {fault}")
