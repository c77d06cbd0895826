"""Room on the disk: a full disk, a quota and a limit on file sizes are told in the same words."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

from optimizer.errors import UnavailableError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def require_room(folder: Path, needed: int) -> None:
    """Raise UnavailableError where a folder cannot take one more file of so many bytes; nothing is left in it."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, needed)
            elif shutil.disk_usage(folder).free < needed:  # macOS
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        if error.errno in NO_ROOM:
            raise no_room(folder, needed, error) from error


def no_room(place: Path, needed: int, error: OSError) -> UnavailableError:
    """Make the error for a file or folder that has no room for so many bytes."""
    return UnavailableError(
        f"no space: {place} needs {needed:,} bytes ({error.strerror}); nothing that is stored was changed. "
        "Free the disk, or raise the quota or the limit on file sizes, and do the same again"
    )
