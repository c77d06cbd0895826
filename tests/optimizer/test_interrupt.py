"""Signals that whoever started the process had ignored."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys

import pytest

SIGNALLED = """\
import os, signal
from optimizer.interrupt import interruptible
with interruptible() as interrupt:
    os.kill(os.getpid(), signal.{name})
    print("asked to stop" if interrupt.since else "goes on")
    os.kill(os.getpid(), signal.{other})
    print("asked to stop" if interrupt.since else "goes on")
"""


@pytest.mark.parametrize(
    ("ignored", "other", "shell"),
    [
        (signal.SIGHUP, signal.SIGTERM, "nohup {}"),
        (signal.SIGINT, signal.SIGTERM, "{} & wait"),  # what a shell without job control does for a background job
        (signal.SIGTERM, signal.SIGINT, "trap '' TERM; {}"),
    ],
)
def test_a_signal_that_is_ignored_stays_ignored(ignored: signal.Signals, other: signal.Signals, shell: str) -> None:
    code = SIGNALLED.format(name=ignored.name, other=other.name)
    command = shell.format(shlex.join([sys.executable, "-c", code]))
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["goes on", "asked to stop"], done.stderr
