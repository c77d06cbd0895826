"""What the files of a checkpoint hold, told by a digest of their content: a time only says when to look again.

Asked by `checkpoints` when it opens a folder and before each trial, and by `check --full`, which reads every byte.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from optimizer.checkpoints.headers import Header, read_header
from optimizer.errors import CheckpointError

BLOCK_BYTES = 4096  # read of each tensor, from its middle; a smaller one is read whole
SHA256 = 64  # hex digits; the name of a large file's blob in a hub cache


@dataclass(frozen=True, slots=True)
class Content:
    """One file as it was when it was looked at."""

    stamp: tuple[int, ...]  # device, inode, size in bytes, time of change in ns
    header: str  # digest of a safetensors file's header, "" for other files
    digest: str  # hex digits over the header and a block of each tensor; of another file over all of it

    @property
    def size(self) -> int:
        """The file's size in bytes."""
        return self.stamp[2]


def content_of(file: Path, header: Header | None = None) -> Content:
    """Look at a file: a safetensors file by its header and one block of each tensor, another one as a whole.

    Args:
        header: the file's, where it was read just now.

    Raises:
        CheckpointError: the file cannot be read, or is a safetensors file that is not whole.
    """
    stamp = stamp_of(file)  # before the content is read: a change from now on shows as another stamp
    try:
        if file.suffix != ".safetensors":
            return Content(stamp, "", hashlib.sha256(file.read_bytes()).hexdigest())
        header = header or read_header(file)
        return Content(stamp, header.digest, _sampled(file, header))
    except OSError as error:
        raise _lost(file, error) from error


def still_holds(file: Path, known: Content) -> Content:
    """Return the file's content as it is now, which is what was known: the file may have been touched or copied back.

    Raises:
        CheckpointError: it holds something else now, or cannot be read.
    """
    stamp = stamp_of(file)
    if stamp == known.stamp:
        return known
    changed, mend = f"{file} changed after it was opened", "restore it or start a new run"
    if stamp[2] != known.size:
        raise CheckpointError(f"{changed} (size {known.size} -> {stamp[2]}); {mend}")
    try:
        now = content_of(file)
    except CheckpointError as error:
        raise CheckpointError(f"{changed}; {mend} ({error})") from error
    if now.digest != known.digest:
        raise CheckpointError(f"{changed} (same size, other content); {mend}")
    return now


def stamp_of(file: Path) -> tuple[int, ...]:
    """Return device, inode, size in bytes and time of change in ns.

    Raises:
        CheckpointError: there is no such file.
    """
    try:
        status = os.stat(file)
    except OSError as error:
        raise _lost(file, error) from error
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def full_digest(file: Path) -> str:
    """Compute the sha256 of every byte of a file, as `sha256sum` gives it.

    Raises:
        CheckpointError: it cannot be read, or it lies in a hub cache under the sha256 of other content.
    """
    try:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        blob = file.resolve().name
    except OSError as error:
        raise _lost(file, error) from error
    if file.is_symlink() and len(blob) == SHA256 and blob != digest:
        raise CheckpointError(f"{file} is damaged: the hub gave it sha256 {blob}, it has {digest}; download it again")
    return digest


def _sampled(file: Path, header: Header) -> str:
    found = hashlib.sha256(header.digest.encode())
    with file.open("rb") as stream:
        for entry in sorted(header.entries.values(), key=lambda entry: entry.start):
            size = min(entry.bytes, BLOCK_BYTES)
            found.update(os.pread(stream.fileno(), size, entry.start + (entry.bytes - size) // 2))
    return found.hexdigest()


def _lost(file: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{file} can no longer be read ({error.strerror}); restore it")
