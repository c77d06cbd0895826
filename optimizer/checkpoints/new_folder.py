"""A new folder that appears under its name only when it is whole, and leaves nothing behind when it does not.

What is being written lies in a hidden folder beside it, locked by its writer. A writer that was killed could not remove
its own: the next one in the same place removes those that no process holds.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from evals.documents import checked_path
from optimizer.errors import MergeError

SUFFIX = ".mergefront"
UNFINISHED = re.compile(r"\..*\.[a-z0-9_]{8}\.mergefront")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Give a temporary folder that takes the name `out` when the block ends well, and is removed when it does not.

    Raises:
        MergeError: the folder exists, no folder can have such a name, or it cannot be written.
    """
    out = checked_path(out, where="the new folder", error=MergeError)
    if os.path.lexists(out):
        raise MergeError(f"a model is written to a new folder, and {out} exists; name another one or remove it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(out.parent)
        temporary, lock = _held(out)
    except OSError as error:
        raise MergeError(f"{out} cannot be written ({error.strerror})") from error
    try:
        yield temporary
        temporary.chmod(0o755)
        _sync(temporary)
        os.rename(temporary, out)
    except (OSError, SafetensorError) as error:
        raise MergeError(f"{out} could not be written ({error}); nothing was left behind") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


def remove_abandoned(parent: Path) -> None:
    """Remove the unfinished folders in a folder whose writers are gone."""
    names: list[str] = []
    with suppress(OSError):  # a folder that may be written to and not be read
        names = [name for name in os.listdir(parent) if UNFINISHED.fullmatch(name)]
    for folder in (parent / name for name in names):
        with suppress(OSError):  # a file or a link; gone in the meantime; held; on a file system without locks
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _held(out: Path) -> tuple[Path, int]:
    """Make a temporary folder and lock it, until the descriptor is closed or this process ends, however it ends."""
    while True:
        # a name of 255 bytes has no room for more
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name[:40]}.", suffix=SUFFIX, dir=out.parent))
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # another run took it for abandoned, since it had no lock yet
            continue
        with suppress(OSError):  # a file system without locks: then nobody removes what is not theirs either
            fcntl.flock(lock, fcntl.LOCK_SH)
        if folder.exists():
            return folder, lock
        os.close(lock)


def _sync(folder: Path) -> None:
    """Have the files on disk before the folder gets its name: after a power cut there is a whole model or none."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
