"""What libraries log and warn of holds names of others too: it reaches the terminal as text."""

from __future__ import annotations

import logging
import warnings
from typing import Any

from optimizer.words import printable


class _Record(logging.LogRecord):
    def getMessage(self) -> str:
        return printable(super().getMessage())


_format_warning = warnings.formatwarning


def _formatted(*details: Any, **more: Any) -> str:
    return printable(_format_warning(*details, **more))


def make_notices_printable() -> None:
    """Write control characters out from now on, in what any library logs or warns of in this process."""
    logging.setLogRecordFactory(_Record)
    warnings.formatwarning = _formatted
