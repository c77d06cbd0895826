"""A cluster whose machines do not have the driver's disk, played by Ray nodes whose mounts hide the study."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from optimizer.run import Run, open_run
from tests.optimizer.small_study import write_study

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not shutil.which("unshare") or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0,
        reason="only one who may mount can hide a folder from a process",
    ),
]
ROOT = Path(__file__).parents[3]
RAY = Path(sys.executable).with_name("ray")
SECONDS = 600
SEARCH = "import sys\nfrom optimizer.cli import app\nsys.argv[0] = 'mergefront'\napp()"


class Machines:
    """Ray nodes on this machine, each with cores and a disk of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._nodes, self.address = folder, list[subprocess.Popen[bytes]](), ""

    def start(self, cores: int, *hidden: Path) -> subprocess.Popen[bytes]:
        """Start a node, the first as the head, and wait until it is part of the cluster."""
        where = [f"--address={self.address}"]
        if not self.address:
            port = free_port()
            self.address = f"127.0.0.1:{port}"
            where = ["--head", f"--port={port}", f"--temp-dir={self._folder}", "--include-dashboard=false"]
        command = [str(RAY), "start", "--block", f"--num-cpus={cores}", "--object-store-memory=80000000", *where]
        command += ["--disable-usage-stats", "--node-ip-address=127.0.0.1"]
        mounts = [f"mount -t tmpfs none {shlex.quote(str(folder))} && " for folder in hidden]
        script = "".join(mounts) + f"exec {shlex.join(command)}"
        log = self._folder / f"node-{len(self._nodes)}.log"
        with log.open("w") as output:
            words = ["unshare", "-m", "sh", "-c", script]
            node = subprocess.Popen(words, stdout=output, stderr=output, start_new_session=True, cwd=self._folder)
        self._nodes.append(node)
        wait_until(lambda: "Ray runtime started" in log.read_text() or node.poll() is not None)
        assert node.poll() is None, log.read_text()
        return node

    def stop(self) -> None:
        for node in self._nodes:
            end(node)


@pytest.fixture
def machines() -> Iterator[Machines]:
    folder = Path(tempfile.mkdtemp(prefix="mf", dir="/tmp"))
    machines = Machines(folder)
    yield machines
    machines.stop()
    shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def end(node: subprocess.Popen[bytes]) -> None:
    """Take a machine away: all of its processes at once."""
    with suppress(ProcessLookupError):
        os.killpg(node.pid, signal.SIGKILL)
    node.wait()


def search(study: Path, *overrides: str, words: Sequence[str] = ()) -> subprocess.Popen[str]:
    words = ["search", str(study), *words, *(word for override in overrides for word in ("--set", override))]
    return subprocess.Popen(
        [sys.executable, "-c", SEARCH, *words],
        cwd="/",
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_machines_without_the_drivers_disk_come_and_go(machines: Machines, tmp_path: Path) -> None:
    study = write_study(tmp_path / "study", trials=14)
    prepared = ("anchors.derived=[regmean]", "search.learned={count: 1, steps: 2}")
    runs, staged = tmp_path / "runs", tmp_path / "staged"
    runs.mkdir()
    staged.mkdir()
    undisturbed = search(study, *prepared, f"runs={tmp_path / 'apart'}")
    assert undisturbed.communicate(timeout=SECONDS)[0]
    machines.start(0)  # the driver's, where nothing is scored
    first = machines.start(1, study.parent, runs)
    joined = (f"workers.ray_address={machines.address}", f"workers.staging={staged}", "workers.count=2")
    process = search(study, *prepared, *joined, f"runs={runs}")
    outcomes = runs / "small" / "outcomes"
    wait_until(lambda: len([*outcomes.glob("*-search.parquet")]) >= 4, process)
    assert [*staged.glob("*/")]
    end(first)
    machines.start(1, study.parent, runs, staged)
    said, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, said
    run, apart = open_run(runs / "small"), open_run(tmp_path / "apart" / "small")
    assert run.trials()["state"].tolist() == ["complete"] * 14
    ours, theirs = scores_of(run), scores_of(apart)
    shared = ours.keys() & theirs.keys()
    assert {recipe: ours[recipe] for recipe in shared} == {recipe: theirs[recipe] for recipe in shared}
    kinds = {kind for kind, *_ in theirs.values() if kind != "search"}  # a sampler is told in another order
    assert {kind for kind, *_ in (ours[recipe] for recipe in shared)} >= kinds


def test_a_machine_reads_a_url_by_itself_and_is_named_where_it_cannot(
    machines: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, store, staged = (tmp_path / name for name in ("cache", "store", "staged"))
    staged.mkdir()
    study = write_study(tmp_path / "study")
    for name in ("base", "expert"):
        shutil.move(study.parent / name, store / name)
    urls = [f"models.base=file://{store}/base", f"models.experts.clinical=file://{store}/expert"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))  # of the driver; its machine scores nothing
    alone = search(study, *urls, f"runs={tmp_path / 'apart'}", words=["--download"])
    assert f"fetching file://{store}/base: 5 files" in alone.communicate(timeout=SECONDS)[0]
    machines.start(0)
    hidden = (study.parent, cache)
    first = machines.start(1, *hidden, store)
    joined = (f"workers.ray_address={machines.address}", f"workers.staging={staged}", "workers.count=1")
    blind = search(study, *urls, *joined, f"runs={tmp_path / 'runs'}")
    said, _ = blind.communicate(timeout=SECONDS)
    assert blind.returncode == 1
    assert f"a worker cannot be built: {os.uname().nodename}: file://{store}/base/config.json broke off" in said
    assert not [*staged.glob("*/")]  # nothing half-made
    end(first)
    machines.start(1, *hidden)
    seeing = search(study, *urls, *joined, f"runs={tmp_path / 'runs'}")
    said, _ = seeing.communicate(timeout=SECONDS)
    assert seeing.returncode == 0, said
    assert len([*staged.rglob("urls/*/model.safetensors")]) == 2
    assert scores_of(open_run(tmp_path / "runs/small")) == scores_of(open_run(tmp_path / "apart/small"))


def scores_of(run: Run) -> dict[str, tuple[str, float, float]]:
    """Kind and objectives of every trial, by its recipe."""
    points = run.points()
    rows = zip(points.index, points["kind"], points["domain"], points["forgetting"], strict=True)
    return {run.recipe(trial).digest: (kind, gain, loss) for trial, kind, gain, loss in rows}


def wait_until(true: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    end = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < end, "it takes too long"
        assert process is None or process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
