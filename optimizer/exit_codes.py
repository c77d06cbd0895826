"""The exit codes of the command line, and which error ends with which."""

from __future__ import annotations

import errno

FAILED, WRONG, NOT_NOW, DAMAGED, INTERRUPTED = 1, 2, 3, 4, 130
# What the system refuses and a person can mend, wherever it happens; another OSError is a fault of ours, and shows it.
MENDABLE: dict[int | None, int] = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP), WRONG),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), NOT_NOW),
}


def exit_code(error: Exception) -> int | None:
    """Return the exit code of an error made for a person; None for any other."""
    from evals.documents import DocumentError
    from evals.errors import TaskError
    from optimizer.errors import (
        CheckpointError,
        DamagedError,
        MergefrontError,
        RunError,
        StudyFileError,
        UnavailableError,
    )
    from search_spaces.errors import SpaceError

    if isinstance(error, UnavailableError | DamagedError):
        return NOT_NOW if isinstance(error, UnavailableError) else DAMAGED
    if isinstance(error, StudyFileError | CheckpointError | RunError | TaskError | SpaceError | DocumentError):
        return WRONG
    return FAILED if isinstance(error, MergefrontError) else None
