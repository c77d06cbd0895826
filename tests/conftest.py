"""What all tests share: no network, and one tiny demo, run once for the tests that look at a real run."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def pytest_configure() -> None:
    """Let tests be stopped as from a terminal: a job in the background is born with SIGINT and SIGQUIT ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def signals_stay_heard() -> Iterator[None]:
    """Fail a test that leaves a signal ignored: the processes of later tests would be born with it."""
    before = _ignored()
    yield
    assert _ignored() == before


def _ignored() -> list[signal.Signals]:
    return [number for number in signal.valid_signals() if signal.getsignal(number) is signal.SIG_IGN]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that have slow tests: with one process a core, none is left alone with them in the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def demo_command(out: Path) -> list[str]:
    """The command that runs the tiny demo into `out`."""
    return [sys.executable, "-c", "from optimizer.cli import main; main()", "demo", "--tiny", "--out", str(out)]


def demo_environment(home: Path) -> dict[str, str]:
    """An environment with an empty home, in which the project's packages are found from any folder."""
    return os.environ | {"HOME": str(home), "HF_HOME": str(home / "hf"), "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="session")
def tiny_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an undisturbed `mergefront demo --tiny`; its terminal output lies beside it in `demo.txt`.

    It is made once, whichever of the test processes asks first; the others wait for it.
    """
    shared = tmp_path_factory.getbasetemp()
    folder = (shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared) / "tiny"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "demo.txt").exists():
            command, environment = demo_command(folder / "demo"), demo_environment(folder)
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, done.stdout + done.stderr
            (folder / "demo.txt").write_text(done.stdout)
    return folder / "demo"


@pytest.fixture
def demo_inputs(tiny_demo: Path, tmp_path: Path) -> Path:
    """A copy of the tiny demo's models and tasks, so that another run of it need not train."""
    return Path(shutil.copytree(tiny_demo.with_name("demo-inputs"), tmp_path / "demo-inputs"))
