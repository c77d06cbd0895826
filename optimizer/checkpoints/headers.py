"""Headers of safetensors files and JSON files, read without trusting them.

The first thing done with a file of weights: what it holds and whether it is whole, without mapping or loading it.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import math
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from evals.documents import LARGEST, parse_json
from evals.documents import read_json as read_document
from optimizer.errors import CheckpointError

MAX_HEADER_BYTES = LARGEST
MAX_TENSORS = 200_000
MAX_NAME = 500  # characters of a tensor's name
MAX_DIMENSIONS = 32
LFS_POINTER = b"version https://git-lfs"
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file: where it starts, its safetensors dtype code, shape and size in bytes."""

    file: Path
    start: int  # bytes from the file's beginning
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """The tensors of one file, and 16 hex digits of the hash of its header."""

    entries: Mapping[str, Entry]
    digest: str


def read_header(file: Path) -> Header:
    """Read and check the header of one safetensors file.

    Raises:
        CheckpointError: the file is cut short, a git-lfs pointer, or its header contradicts itself.
    """
    text, payload = _header_text(file)
    table = _table(file, text)
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse(file, f"its __metadata__ must hold texts by name; given {_shown(metadata)}")
    if len(table) > MAX_TENSORS:
        _refuse(file, f"it names {len(table)} tensors, the limit is {MAX_TENSORS}")
    spans = {name: _span(file, name, fields) for name, fields in table.items()}
    _require_covered(file, spans, payload)
    entries = {
        name: Entry(file, 8 + len(text) + start, table[name]["dtype"], tuple(table[name]["shape"]), end - start)
        for name, (start, end) in spans.items()
    }
    return Header(entries, hashlib.sha256(text).hexdigest()[:16])


def read_json(file: Path, *, limit: int = LARGEST, unique: bool = False) -> dict[str, Any]:
    """Read a regular file that holds a JSON object, of `limit` bytes at most.

    Args:
        unique: refuse a key that stands twice in one object.

    Raises:
        CheckpointError: it cannot be read, is larger, or holds something else.
    """
    content = read_document(file, limit=limit, unique=unique, error=CheckpointError)
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a JSON object, it holds a {type(content).__name__}")
    return content


def _table(file: Path, text: bytes) -> dict[str, Any]:
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError as error:
        _refuse(file, f"its header is not JSON ({error})")
    if not decoded.startswith("{"):
        _refuse(file, "its header is not a JSON object")
    table: dict[str, Any] = parse_json(
        decoded, f"{file} is not a whole safetensors file: its header", unique=True, error=CheckpointError
    )
    return table


def _header_text(file: Path) -> tuple[bytes, int]:
    """Return the header's bytes and the number of bytes after it."""
    try:
        size, mode = file.stat().st_size, file.stat().st_mode
        if not stat.S_ISREG(mode):
            _refuse(file, "it must be a regular file")
        with file.open("rb") as stream:
            head = stream.read(len(LFS_POINTER))
            if head == LFS_POINTER:
                _refuse(file, "it is a git-lfs pointer, not the file itself; run `git lfs pull` in its folder")
            length = int.from_bytes(head[:8], "little")
            if size < 8 or (length <= MAX_HEADER_BYTES and 8 + length > size):
                _cut_short(file, 8 + length if size >= 8 else 8, size)
            if length > MAX_HEADER_BYTES:
                _refuse(file, f"its header claims {length} bytes, the limit is {MAX_HEADER_BYTES}; it is damaged")
            stream.seek(8)
            return stream.read(length), size - 8 - length
    except OSError as error:
        _refuse(file, f"it cannot be read ({error.strerror})")


def _span(file: Path, name: str, fields: Any) -> tuple[int, int]:
    """Return a tensor's first and last offset after checking that they fit its dtype and shape."""
    if not 0 < len(name) <= MAX_NAME:
        _refuse(file, f"a tensor's name may have {MAX_NAME} characters; given {_shown(name)}")
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        _refuse(file, f"tensor {name!r} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        known = ", ".join(ITEM_BYTES)
        _refuse(file, f"tensor {name!r} is of dtype {_shown(dtype)}; known are {known} (no quantised ones)")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or any(type(n) is not int or not 0 <= n < 1 << 63 for n in numbers):
            given = f"shape {_shown(shape)} and offsets {_shown(offsets)}"
            _refuse(file, f"tensor {name!r} has {given}; both must be whole numbers of 63 bits")
    if len(shape) > MAX_DIMENSIONS:
        _refuse(file, f"tensor {name!r} has {len(shape):,} dimensions, the limit is {MAX_DIMENSIONS}")
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * ITEM_BYTES[dtype]:
        _refuse(file, f"tensor {name!r}: offsets {_shown(offsets)} do not hold shape {shape} of {dtype}")
    return offsets[0], offsets[1]


def _require_covered(file: Path, spans: Mapping[str, tuple[int, int]], payload: int) -> None:
    """Require that the tensors lie end to end and fill the file."""
    position = 0
    for name, (start, end) in sorted(spans.items(), key=lambda item: item[1]):
        if start != position:
            fault = "overlaps the tensor before it" if start < position else "leaves a hole before it"
            _refuse(file, f"tensor {name!r} {fault} (starts at {start}, expected {position})")
        position = end
    if position > payload:
        _cut_short(file, position, payload)
    if position < payload:
        _refuse(file, f"{payload - position} bytes follow its last tensor")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}..."


def _cut_short(file: Path, promised: int, found: int) -> NoReturn:
    _refuse(file, f"it is cut short: its header promises {promised} bytes, it has {found}; download or copy it again")


def _refuse(file: Path, fault: str) -> NoReturn:
    raise CheckpointError(f"{file} is not a whole safetensors file: {fault}")
