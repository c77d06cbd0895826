"""One file written whole or not at all: under a temporary name, onto the disk, then renamed."""

from __future__ import annotations

import os
from pathlib import Path

from optimizer.errors import RunError
from optimizer.room import NO_ROOM, no_room


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, onto the disk, then rename it: readers see the old or the new, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise unwritten(path, len(content), error) from error
    sync_folder(path.parent)


def unwritten(path: Path, size: int, error: OSError) -> RunError:
    """Make the error for a file that could not be written, with the bytes it needs where there is no room."""
    if error.errno in NO_ROOM:
        return no_room(path, size, error)
    return RunError(f"cannot write {path} ({size:,} bytes): {error.strerror}")


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
