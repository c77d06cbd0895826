"""The merge: sources and a recipe to tensors, in a resident model or in a new folder.

Every merge writes every tensor from the sources, so a model keeps nothing of an earlier one. Arithmetic is float32 on
the device of the model, and is rounded once to the base's dtype: the bytes are the same for every worker of a kind.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from evals import memory
from optimizer.checkpoints.checkpoint import DTYPES, Checkpoint, count_nonfinite, sum_is_finite
from optimizer.checkpoints.compare import require_compatible
from optimizer.checkpoints.new_folder import new_folder
from optimizer.checkpoints.opening import open_checkpoint
from optimizer.checkpoints.tensor_file import write_sharded
from optimizer.errors import MergeError
from optimizer.merging.methods import (
    METHODS,
    Blend,
    FactCache,
    Line,
    Tensors,
    Values,
    blend_in_one_pass,
    float_blocks,
    row_blocks,
    row_width,
)
from optimizer.merging.methods.directions import DirectionWalk, directions
from optimizer.merging.methods.task_vectors import AgreeingSum
from search_spaces import METHODS as SPECS
from search_spaces import Recipe, SpaceError
from search_spaces.groups import PASSED
from search_spaces.kinds import place_of

DEVICE_ROOM = 4 << 30  # bytes left free on a device for activations and scratch
HOST_ROOM = 16 << 30  # bytes of the machine's memory left free by pinned copies
MERGED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class Sources:
    """The opened base and the opened experts by name; `open` has made sure that they fit each other."""

    base: Checkpoint
    experts: Mapping[str, Checkpoint]

    @classmethod
    def open(cls, base: str | Path, experts: Mapping[str, str]) -> Sources:
        """Open the base and the experts (name to source).

        Raises:
            CheckpointError: one cannot be read, or does not fit the base.
        """
        opened = open_checkpoint(base)
        sources = cls(opened, {name: open_checkpoint(source, base=opened) for name, source in experts.items()})
        for expert in sources.experts.values():
            require_compatible(opened, expert)
        return sources

    def extended(self, experts: Sequence[tuple[str, str]]) -> Sources:
        """Open further experts, (name, folder), beside those that are open; what is no folder is left out.

        Raises:
            CheckpointError: one cannot be read, or does not fit the base.
            MergeError: one has the name of another that is open.
        """
        found = {name: source for name, source in experts if Path(source).is_dir()}
        for name, source in found.items():
            if name in self.experts and not self.experts[name].folder.samefile(source):
                raise MergeError(
                    f"two experts are called {name!r}: {self.experts[name].folder} is open, the recipe names {source}"
                )
        missing = {name: source for name, source in found.items() if name not in self.experts}
        added = {name: open_checkpoint(source, base=self.base) for name, source in missing.items()}
        for expert in added.values():
            require_compatible(self.base, expert)
        return replace(self, experts={**self.experts, **added}) if added else self

    def read_anew(self) -> Sources:
        """Return the same sources, each tensor read from its file when it is asked for."""
        return Sources(self.base.read_anew(), {name: expert.read_anew() for name, expert in self.experts.items()})


@dataclass(frozen=True, slots=True)
class MergeCache:
    """What one worker's merges of the same sources share, so that only the first of them makes it.

    Attributes:
        facts: what does not depend on a recipe.
        copies: of base ("") and experts for a device other than the CPU, by (checkpoint, tensor): on the device where
            they fit, else in pinned memory, from which they come several times as fast as from mapped files.
    """

    facts: FactCache = field(default_factory=FactCache)
    copies: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def tensor(self, sources: Sources, expert: str, name: str, device: torch.device) -> Tensor:
        """Give a tensor of an expert, or of the base (""), on a device."""
        source = sources.experts[expert] if expert else sources.base
        if device.type == "cpu":
            return source.tensor(name)
        if (expert, name) not in self.copies:
            tensor, size = source.tensor(name), source.size(name)
            if fits(size, free_bytes(device)):
                self.copies[expert, name] = tensor.to(device)
            elif device.type == "cuda" and memory.free_bytes(torch.device("cpu")) - size >= HOST_ROOM:
                self.copies[expert, name] = tensor.pin_memory()
            else:
                return tensor.to(device)
        return self.copies[expert, name].to(device, non_blocking=True)


def fits(needed: int, free: int) -> bool:
    """Tell whether a device has room to keep so many bytes and run a model beside them."""
    return free - needed >= DEVICE_ROOM


def free_bytes(device: torch.device) -> int:
    """Free memory of a device."""
    if device.type == "mps":
        return memory.free_bytes(device)
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def require_fitting(sources: Sources, recipe: Recipe) -> None:
    """Make sure that the sources have the experts and the places that a recipe names.

    Raises:
        MergeError: they lack one.
    """
    missing = sorted({name for name, _ in recipe.experts} - set(sources.experts))
    if missing:
        source = Path(dict(recipe.experts)[missing[0]])
        gone = f"; there is no folder {source}: restore it, or have `mergefront derive` make a derived expert anew"
        given = f"recipe {recipe.digest} needs expert {missing[0]!r}; given: {sorted(sources.experts)}"
        raise MergeError(given + (gone if source.is_absolute() and not source.is_dir() else ""))
    try:
        recipe.require_places(sources.base.names)
    except SpaceError as error:
        raise MergeError(f"recipe {recipe.digest} does not fit {sources.base.folder}: {error}") from error


def merged_tensor(name: str, sources: Sources, recipe: Recipe) -> Tensor:
    """Return one merged tensor in the dtype that the recipe asks for, else in the base's.

    Raises:
        MergeError: the recipe and the sources do not fit, or the tensor has NaN or infinite values.
    """
    return Merger(sources, recipe).tensor(name)


def merge_into(
    parameters: Mapping[str, Tensor], sources: Sources, recipe: Recipe, cache: MergeCache | None = None
) -> None:
    """Overwrite every parameter of a resident model with the merge, made on the parameters' device.

    Args:
        parameters: by checkpoint name, in the base's dtypes and shapes, on any device; a name the base lacks is
            allowed where it shares its memory with another (a tied head).
        sources: the opened checkpoints.
        recipe: what to merge.
        cache: what earlier merges of the same sources left to be used again; without it all is made anew.

    Raises:
        MergeError: names, shapes or dtypes do not fit, or a merged tensor has NaN or infinite values. The parameters
            are then partly written; the next merge writes them all.
    """
    assert not recipe.dtype, "a resident model keeps the base's dtypes"
    merger = Merger(sources, recipe, cache)
    _require_same_tensors(parameters, sources.base)
    with torch.no_grad():
        for name in sources.base.names:
            merger.write_into(parameters[name], name)


def merge_to_folder(sources: Sources, recipe: Recipe, out: Path, *, shard_bytes: int = 5_000_000_000) -> None:
    """Write the merge as safetensors to a new folder, one tensor in memory at a time.

    The folder appears under its name only when it is whole.

    Raises:
        MergeError: the folder exists or cannot be written, or the merge fails.
    """
    with new_folder(out) as folder:
        write_shards(sources, recipe, folder, shard_bytes=shard_bytes)


def write_shards(sources: Sources, recipe: Recipe, folder: Path, *, shard_bytes: int) -> None:
    """Write the merge into an existing folder: model.safetensors, or shards with an index where it is larger.

    Sources are read tensor by tensor, not mapped: mapped pages stay, and would count, until memory is short.
    """
    base, anew = sources.base, sources.read_anew()
    kinds = {name: (code_of(stored_as(recipe.dtype, base.dtype(name))), base.shape(name)) for name in base.names}
    write_sharded(folder, kinds, lambda name: merged_tensor(name, anew, recipe), shard_bytes=shard_bytes)


def stored_as(asked: str, own: torch.dtype) -> torch.dtype:
    """Return the dtype a tensor is stored in: the one asked for, if any, where the tensor is a floating one."""
    dtype: torch.dtype = getattr(torch, asked) if asked and own.is_floating_point else own
    return dtype


def code_of(dtype: torch.dtype) -> str:
    """Return the safetensors dtype code of a dtype."""
    return next(code for code, known in DTYPES.items() if known == dtype)


class Merger:
    """A recipe applied to its sources, tensor by tensor."""

    def __init__(self, sources: Sources, recipe: Recipe, cache: MergeCache | None = None) -> None:
        require_fitting(sources, recipe)
        self._sources = sources
        self._recipe, self._seed = recipe, recipe.mask_seed
        self._own_numbers = recipe.tensors
        self._cache = MergeCache() if cache is None else cache
        self._numbers: dict[str, tuple[tuple[str, ...], Values | None]] = {}

    def tensor(self, name: str) -> Tensor:
        base = self._sources.base
        out = torch.empty(base.shape(name), dtype=stored_as(self._recipe.dtype, base.dtype(name)))
        self.write_into(out, name)
        return out

    def write_into(self, out: Tensor, name: str) -> None:
        """Write the merged tensor; blocks go straight into `out` where it is contiguous."""
        if not out.is_contiguous():
            whole = torch.empty_like(out, memory_format=torch.contiguous_format)
            self.write_into(whole, name)
            out.copy_(whole)
            return
        sources, device = self._sources, out.device
        base = self._cache.tensor(sources, "", name, device)
        experts, values = self._numbers_at(name) if base.is_floating_point() else ((), None)
        if values is None:
            out.copy_(base)
            proven = out.dtype == base.dtype and self._cache.facts.get_or_compute(
                (name, "finite"), lambda: sum_is_finite(base)
            )
            self._require_finite(name, out, proven)
            return
        if base.dtype not in MERGED_DTYPES:
            raise MergeError(f"tensors to merge are bfloat16, float16 or float32; {name} is {base.dtype}")
        if self._random:
            values = replace(values, seeds=tuple(_seed(self._seed, name, expert) for expert in experts))
        tensors = self._tensors(name, experts, device)
        blend = METHODS[self._recipe.method](tensors, values)
        self._require_finite(name, out, _apply(blend, tensors, out))

    def directions(self, name: str, device: torch.device) -> tuple[Tensors, DirectionWalk]:
        """Return base and all experts of a tensor, and which way each expert's weight moves it."""
        experts = tuple(sorted(expert for expert, _ in self._recipe.experts))
        values = self._values_of(name if name in self._own_numbers else self._place_of(name), experts)
        if self._random:
            values = replace(values, seeds=tuple(_seed(self._seed, name, expert) for expert in experts))
        tensors, method = self._tensors(name, experts, device), METHODS[self._recipe.method]
        blend = method(tensors, values)
        if not isinstance(blend, AgreeingSum):  # linear in the weights
            blend = method(tensors, replace(values, weights=(1.0,) * len(experts)))
        return tensors, directions(blend)

    def _tensors(self, name: str, experts: Sequence[str], device: torch.device) -> Tensors:
        pairs = [(expert, self._cache.tensor(self._sources, expert, name, device)) for expert in experts]
        return Tensors(name, self._cache.tensor(self._sources, "", name, device), pairs, self._cache.facts)

    def _require_finite(self, name: str, out: Tensor, proven: bool) -> None:
        if not proven and (bad := count_nonfinite(out)):
            raise MergeError(
                f"a merge must be finite: recipe {self._recipe.digest} gives {bad} NaN or infinite values in {name}"
            )

    def _place_of(self, name: str) -> str:
        return place_of(name, self._recipe.kinds)

    @property
    def _random(self) -> bool:
        return SPECS[self._recipe.method].random

    def _numbers_at(self, name: str) -> tuple[tuple[str, ...], Values | None]:
        place = name if name in self._own_numbers else self._place_of(name)
        if place == PASSED:
            return (), None
        if place not in self._numbers:
            self._numbers[place] = self._numbers_of(place)
        return self._numbers[place]

    def _numbers_of(self, group: str) -> tuple[tuple[str, ...], Values | None]:
        """Return the experts that change a group and their numbers without seeds; none where the base stays."""

        spec = SPECS[self._recipe.method]

        def value(parameter: str, expert: str = "") -> float:
            return self._recipe.value(parameter, expert=expert, group=group) if spec.parameter(parameter) else 1.0

        names = sorted(name for name, _ in self._recipe.experts)  # sums have one order, whatever the recipe's
        active = tuple(name for name in names if value("weight", name) != 0)
        if ((names and not active) or value("t") == 0 or value("lambda") == 0) and value("sum") == 1:
            return (), None
        largest = max((abs(value("weight", name) * value("lambda")) for name in active), default=0.0)
        if largest > torch.finfo(torch.float32).max:
            raise MergeError(
                f"a merge must be finite: recipe {self._recipe.digest} has weight {largest:.3g} in {group}"
            )
        return active, self._values_of(group, active)

    def _values_of(self, group: str, experts: Sequence[str]) -> Values:
        """Return the numbers of some experts at a group, without seeds."""
        spec = SPECS[self._recipe.method]

        def value(parameter: str, expert: str = "") -> float:
            return self._recipe.value(parameter, expert=expert, group=group) if spec.parameter(parameter) else 1.0

        own = [p.name for p in spec.parameters if p.scope == "expert" and p.name != "weight"]
        shared = [p.name for p in spec.parameters if p.scope != "expert"]
        return Values(
            weights=tuple(value("weight", name) for name in experts),
            own={parameter: tuple(value(parameter, name) for name in experts) for parameter in own},
            shared={parameter: value(parameter) for parameter in shared},
        )


def _apply(blend: Blend, tensors: Tensors, out: Tensor) -> bool:
    """Write the blend into `out`; return whether it is proven finite."""
    base, experts = tensors.base, tensors.others
    if isinstance(blend, Line) and blend.weight in (0.0, 1.0):
        end = experts[0] if blend.weight else base
        out.copy_(end)
        return end.dtype == out.dtype and tensors.get_or_compute(
            f"finite at {blend.weight}", lambda: sum_is_finite(end)
        )
    if blend_in_one_pass(blend, tensors, out):
        return True
    if isinstance(blend, Line) and out.device.type != "cpu" and all(x.dtype == out.dtype for x in (base, *experts)):
        torch.lerp(base, experts[0], blend.weight, out=out)  # one kernel, float32 inside
        return False
    finite, step = True, blend.walk()
    for (row, b, xs), place in zip(float_blocks(base, experts), row_blocks(out, row_width(out)), strict=True):
        finite &= sum_is_finite(place.copy_(step(b, xs, row)))
    return finite


def _seed(seed: str, tensor: str, expert: str) -> int:
    """Draw 63 bits that follow from the recipe's seed, the tensor and the expert."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{tensor}\0{expert}".encode()).digest()[:8], "big") >> 1


def _require_same_tensors(parameters: Mapping[str, Tensor], base: Checkpoint) -> None:
    missing = sorted(set(base.names) - set(parameters))
    if missing:
        raise MergeError(
            f"every tensor of the base must be written; the model lacks {len(missing)}, first {missing[0]}"
        )
    written = {parameters[name].data_ptr() for name in base.names}
    for name, parameter in parameters.items():
        if name not in base.names:
            if parameter.data_ptr() not in written:
                raise MergeError(f"every parameter must be written; {name} is in the model but not in {base.folder}")
        elif (tuple(parameter.shape), parameter.dtype) != (base.shape(name), base.dtype(name)):
            given = f"{tuple(parameter.shape)} {parameter.dtype}, {base.shape(name)} {base.dtype(name)}"
            raise MergeError(f"a parameter has its tensor's shape and dtype; {name} in model and base: {given}")
