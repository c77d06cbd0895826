"""One model on disk: the value of an opened checkpoint, its names, shapes and dtypes, and the reading of its tensors.

`opening` makes it; `merge` reads its tensors; `compare` says why two checkpoints cannot be merged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from optimizer.checkpoints.contents import Content, full_digest, still_holds
from optimizer.checkpoints.headers import Entry
from optimizer.checkpoints.lora import WEIGHTS_FILE as ADAPTER_WEIGHTS_FILE
from optimizer.checkpoints.lora import LowRank
from optimizer.errors import CheckpointError

HEADS = ("lm_head.weight", "embed_out.weight")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight")
TOKEN_ROWS = (*EMBEDDINGS, *HEADS, "lm_head.bias")  # a row for each token
DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Gather:
    """Rows in the base's order: those of a stored tensor by index, the base's own where the index is -1."""

    stored: Entry
    index: torch.Tensor  # (rows,)
    own: Entry

    def read(self) -> torch.Tensor:
        """Read and gather them, in the stored dtype and in memory of their own."""
        rows = _read(self.stored).index_select(0, self.index.clamp(min=0))
        kept = self.index < 0
        rows[kept] = _read(self.own)[kept].to(rows.dtype)
        return rows


@dataclass(frozen=True)
class Checkpoint:
    """One model on disk.

    The embeddings and the head of an expert with other tokens than its base show the base's rows, matched by token:
    a merge keeps the base's vocabulary and tokenizer. Where the ids coincide that is a part of the mapped tensor.

    Attributes:
        source: what the user gave: a folder or a hub id.
        folder: where it lies; for an adapter, the adapter's folder.
        config: config.json; for an adapter, the base's.
        is_adapter: it is an adapter on the base.
        is_matched: its tokens or rows are other than the base's it was opened on, and were matched to them.
        left_out: how many of its rows belong to no row of that base.
    """

    source: str
    folder: Path
    config: Mapping[str, Any]
    fingerprint: str  # 16 hex digits over names, sizes and content of its files; of each tensor a block is read
    dated: str  # the same as earlier versions stored it: with the files' times, without the tensors' content
    entries: Mapping[str, Entry] = field(repr=False)
    contents: dict[Path, Content] = field(repr=False)  # as last looked at, the base's too
    deltas: Mapping[str, LowRank] = field(repr=False)
    is_mapped: bool = field(default=True, repr=False)
    is_adapter: bool = False
    is_matched: bool = False
    left_out: int = 0
    gathers: Mapping[str, Gather] = field(default_factory=dict, repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted; a head tied to the embeddings is not among them."""
        return tuple(sorted(self.entries))

    @property
    def own_bytes(self) -> int:
        """Size in bytes of what it maps beside its base: of an adapter not yet folded, only its own file."""
        return (self.folder / ADAPTER_WEIGHTS_FILE).stat().st_size if self.deltas else self.bytes

    @property
    def bytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(entry.bytes for entry in self.entries.values())

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self.entries[name].dtype]

    def size(self, name: str) -> int:
        """Return the size of one tensor in bytes."""
        return self.entries[name].bytes

    def file(self, name: str) -> Path:
        """Return the file that holds a tensor (of an adapter: the base's)."""
        return self.entries[name].file

    def kind(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Return the safetensors dtype code and the shape of one tensor."""
        return self.entries[name].dtype, self.entries[name].shape

    def read_anew(self) -> Checkpoint:
        """Return the same checkpoint, its tensors read from the file each time: they take memory only while in use."""
        return replace(self, is_mapped=False)

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor in its stored dtype: mapped, so not to be written to; of a plain adapter, folded anew."""
        tensor = self._mapped[name] if self.is_mapped else self._read(name)
        return self.deltas[name].folded_into(tensor) if name in self.deltas else tensor

    def is_known_as(self, fingerprint: object) -> bool:
        """Tell whether a stored fingerprint is of these very files, also one of an earlier run that has their times."""
        return fingerprint in (self.fingerprint, self.dated)

    def full_digests(self) -> dict[Path, str]:
        """Compute the sha256 of each of its files, of an adapter also of its base's, every byte read."""
        return {file: full_digest(file) for file in sorted(self.contents)}

    def require_unchanged(self) -> None:
        """Raise if a file holds something else than when it was opened; one touched or copied back is as good."""
        for file, known in self.contents.items():
            self.contents[file] = still_holds(file, known)

    @cached_property
    def _mapped(self) -> dict[str, torch.Tensor]:
        # asked for once: safetensors keeps 64 bytes of every get_tensor for good
        maps = {file: _map(file) for file in {entry.file for entry in self.entries.values()}}
        mapped = {n: maps[e.file].get_tensor(n) for n, e in self.entries.items() if n not in self.gathers}
        shown = {name: tensor[: self.shape(name)[0]] if tensor.dim() else tensor for name, tensor in mapped.items()}
        return shown | {name: gather.read() for name, gather in self.gathers.items()}

    def _read(self, name: str) -> torch.Tensor:
        return self.gathers[name].read() if name in self.gathers else _read(self.entries[name])


def _map(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be mapped ({error}); download or copy it again") from error


def _read(entry: Entry) -> torch.Tensor:
    """Read one tensor into memory of its own."""
    if entry.bytes == 0:
        return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    try:
        numbers = np.fromfile(entry.file, dtype=np.uint8, count=entry.bytes, offset=entry.start)
    except OSError as error:
        raise CheckpointError(f"{entry.file} can no longer be read ({error.strerror}); restore it") from error
    if numbers.size < entry.bytes:
        raise CheckpointError(f"{entry.file} was cut short after it was opened; restore it")
    return torch.from_numpy(numbers).view(DTYPES[entry.dtype]).reshape(entry.shape)


def require_finite(checkpoint: Checkpoint) -> None:
    """Read every tensor once and raise CheckpointError naming the first that holds NaN or infinity."""
    for name in checkpoint.names:
        tensor = checkpoint.tensor(name)
        bad = count_nonfinite(tensor)
        if bad:
            where = f"{checkpoint.file(name)}, tensor {name}"
            raise CheckpointError(
                f"weights must be finite: {where} has {bad} of {tensor.numel()} values NaN or infinite"
            )


def count_nonfinite(tensor: torch.Tensor) -> int:
    """Count NaN and infinite values; one fast sum settles the usual case of none."""
    if not tensor.is_floating_point() or sum_is_finite(tensor):
        return 0
    return int(tensor.numel() - torch.isfinite(tensor).sum())


def sum_is_finite(tensor: torch.Tensor) -> bool:
    """Return true only where every value is finite; false also where a sum overflowed."""
    # float16 holds no more than 65504; the sum of bfloat16 is added up in float32 and has its range
    return math.isfinite(float(tensor.sum(dtype=torch.float32 if tensor.dtype == torch.float16 else None)))
