"""Signals that are ignored, and signals that a person in a hurry sends."""

from __future__ import annotations

import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from tests.optimizer.fakes import Bench

SIGNALLED = """\
import os, signal
from optimizer.search.interrupt import interruptible
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


CLEANING = """\
import os, signal
from contextlib import suppress
from optimizer.search.interrupt import interrupted_once, interruptible

def stop():
    os.kill(os.getpid(), signal.SIGINT)

with suppress(KeyboardInterrupt), interrupted_once():
    try:
        with interruptible():
            stop()
            stop()
    finally:
        stop()
        print("cleaned up", flush=True)
"""


def test_what_cleans_up_after_a_second_signal_is_not_interrupted() -> None:
    done = subprocess.run([sys.executable, "-c", CLEANING], capture_output=True, text=True, timeout=60)
    assert done.stdout == "cleaned up\n", done.stderr


HURRIED = """\
import sys, time
from pathlib import Path
import optimizer.run_study as module
from optimizer.cli import main
from tests.optimizer.fakes import Bench, is_anchor

def wait(recipe):
    if not is_anchor(recipe):
        print("ready", flush=True)
        time.sleep(600)

module.run_study = lambda study, *_: Bench(Path(study)).search(trials=12, before=wait)
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("times", [2, 4])
def test_a_person_who_insists_gets_out_at_once_without_a_traceback(tmp_path: Path, times: int) -> None:
    command = [sys.executable, "-c", HURRIED, "search", str(tmp_path / "toy")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    _, errors = process.communicate(timeout=60)  # the trial in hand sleeps for longer
    assert process.returncode == 130
    assert "Traceback" not in errors
    with closing(sqlite3.connect(tmp_path / "toy" / "study.db")) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    bench = Bench(tmp_path / "toy")
    bench.search(trials=12)
    assert bench.events[-1].text.startswith("12 trials finished")
