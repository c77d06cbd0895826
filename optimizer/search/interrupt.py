"""A person's wish to stop: the first signal asks, the second insists."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

GRACE_SECONDS = 300.0  # how long a first Ctrl-C waits for running trials


@dataclass(slots=True)
class Interrupt:
    """Whether a person asked to stop, and since when (monotonic seconds)."""

    since: float | None = None

    @property
    def overdue(self) -> bool:
        return self.since is not None and time.monotonic() - self.since > GRACE_SECONDS


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Turn a first SIGINT, SIGTERM or SIGHUP into a wish to stop, and a second into KeyboardInterrupt.

    The way out of that KeyboardInterrupt is not interrupted again, to the process's end where it ends by it.
    A signal that is ignored stays so: that is how `nohup` and a shell's background jobs outlive their terminal.
    """
    interrupt = Interrupt()

    def handle(number: int, frame: FrameType | None) -> None:
        if interrupt.since is not None:
            for heard in heeded:
                signal.signal(heard, signal.SIG_IGN)
            raise KeyboardInterrupt
        interrupt.since = time.monotonic()
        with suppress(OSError):  # the terminal may be gone; print() may be what the signal came in the middle of
            os.write(2, b"\nstopping after the running trials (Ctrl-C again to drop them)\n")

    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    heeded = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in heeded}
    try:
        yield interrupt
    finally:
        insisted = any(signal.getsignal(number) is signal.SIG_IGN for number in heeded)
        for number, handler in before.items():
            if not (insisted and before.get(signal.SIGINT) is _interrupt_once):
                signal.signal(number, handler)


@contextmanager
def interrupted_once() -> Iterator[None]:
    """Keep a first KeyboardInterrupt's way out from being interrupted again, in a process that ends with this block."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _interrupt_once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _interrupt_once(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt
