"""Points at which a driver can be made to die, for tests of recovery."""

from __future__ import annotations

import os
import signal
from collections import Counter

_PASSES: Counter[str] = Counter()


def fault(point: str) -> None:
    """Die here, as `kill -9` would, at the n-th pass: MERGEFRONT_FAULT=point:n."""
    wanted, _, nth = os.environ.get("MERGEFRONT_FAULT", "").partition(":")
    if wanted == point:
        _PASSES[point] += 1
        if _PASSES[point] == int(nth):
            os.kill(os.getpid(), signal.SIGKILL)
