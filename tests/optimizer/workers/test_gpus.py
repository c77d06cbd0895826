"""How many GPUs a worker has: what is asked for, refused, told by `check`, and given by Ray."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from optimizer.checkpoints import devices
from optimizer.errors import StudyFileError, WorkerError
from optimizer.run_study import worker_spec
from optimizer.study.study_file import dump_study, read_study
from optimizer.workers import gpus as module
from optimizer.workers.gpus import gpu_share, require_among, require_gpus, share_of
from tests.conftest import ROOT
from tests.optimizer.small_study import write_study
from tests.optimizer.test_cli import call


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("study"))


@pytest.mark.parametrize(
    ("count", "gpus", "share"), [(2, 0, 0.0), (1, 1, 1.0), (2, 1, 0.5), (3, 2, 0.5), (2, 4, 1.0), (5, 2, 1 / 3)]
)
def test_every_worker_finds_its_share_of_a_gpu(count: int, gpus: float, share: float) -> None:
    assert gpu_share(count, gpus) == share
    if share:
        assert count <= int(gpus) * int(1 / share + 1e-9)


@pytest.mark.parametrize(("typed", "share", "devices_of_one"), [
    ("1", 1, 1), ("2", 2, 2), ("2.0", 2, 2), ("8", 8, 8), ("0.5", 0.5, 1), ("0.33", 1 / 3, 1), ("0.3333", 1 / 3, 1),
    ("0.25", 0.25, 1), ("0.125", 0.125, 1),
])  # fmt: skip
def test_whole_gpus_and_nths_of_one_can_be_asked_for(
    typed: str, share: float, devices_of_one: int, study: Path
) -> None:
    read = read_study(study, [f"workers.gpus={typed}"])
    assert read.workers.gpus != "auto"
    assert share_of(read.workers.gpus) == share
    assert worker_spec(read).gpus == devices_of_one
    assert f"gpus: {typed.removesuffix('.0')}\n" in dump_study(read)


@pytest.mark.parametrize("typed", ["0.3", "1.5", "0", "-1", "-0.5", "0.34", "65", "true", "two", ".inf", ".nan", "[2]"])
def test_other_numbers_are_refused_by_key_value_and_mend(typed: str, study: Path) -> None:
    with pytest.raises(StudyFileError, match=r"workers\.gpus: must be a whole number, a part of a GPU .*given"):
        read_study(study, [f"workers.gpus={typed}"])


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_gpus_are_not_asked_of_another_device(device: str, study: Path) -> None:
    with pytest.raises(StudyFileError, match=rf"workers\.gpus: workers\.device is {device}.*given 2; leave it out"):
        read_study(study, [f"workers.device={device}", "workers.gpus=2"])


def test_a_machine_must_have_the_gpus_for_all_of_its_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    for gpus, count, have in ((2, 2, [4]), (2, 0, [2]), (0.5, 4, [2]), (0.33, 6, [2]), (1, 0, [1])):
        require_among(gpus, count, have, joins=False)
    with pytest.raises(WorkerError, match=r"one machine; given 2, and this machine has 1; lower workers\.gpus"):
        require_among(2, 1, [1.0], joins=False)
    with pytest.raises(WorkerError, match=r"one machine; given 0\.5, and this machine has 0"):
        require_among(0.5, 1, [], joins=False)
    with pytest.raises(
        WorkerError, match=r"given 2 for each of 3 workers, which is 6 GPUs, .* has 4; lower workers\.c"
    ):
        require_among(2, 3, [4.0], joins=False)
    with pytest.raises(WorkerError, match=r"given 0\.5 for each of 3 workers, which is 2 GPUs, .*workers\.count to 2"):
        require_among(0.5, 3, [1.0], joins=False)
    require_among(2, 9, [1.0, 2.0], joins=True)  # machines may join
    with pytest.raises(WorkerError, match=r"given 4, and the largest machine of the cluster has 2"):
        require_among(4, 1, [2.0, 2.0, 2.0], joins=True)
    monkeypatch.setattr(module, "require_cluster", lambda address: [1.0, 8.0])
    require_gpus(8, 2, "head:6379")
    with pytest.raises(WorkerError, match=r"given 16, and the largest machine of the cluster has 8"):
        require_gpus(16, 2, "head:6379")


def test_check_says_what_is_missing(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "gpus_seen", lambda: 1)
    monkeypatch.setattr(devices, "least_memory", lambda: 0)
    refused = call("check", study, "--set", "workers.gpus=2")
    assert refused.exit_code == 2
    said = " ".join(refused.stdout.split())
    assert "workers.gpus: must be at most the GPUs of one machine; given 2, and this machine has 1" in said
    monkeypatch.setattr(devices, "gpus_seen", lambda: 8)
    deep = call("check", study, "--set", "workers.gpus=4")
    assert "2 layers, which cannot be spread over 4 GPUs; lower workers.gpus" in " ".join(deep.stdout.split())
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    apple = call("check", study, "--set", "workers.device=mps")
    assert apple.exit_code == 2
    assert "workers.device: mps is the GPU of an Apple computer" in " ".join(apple.stdout.split())


def test_check_tells_how_a_candidate_lies_on_gpus(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "gpus_seen", lambda: 2)
    monkeypatch.setattr(devices, "least_memory", lambda: 0)
    spread = call("check", study, "--set", "workers.gpus=2", "--set", "search.learned=1")
    assert spread.exit_code == 0, spread.output
    said = " ".join(spread.stdout.split())
    assert "a candidate is spread over 2: 35 kB, 19 kB on each in turn" in said
    assert "more on one of them while a worker learns" in said
    assert "a GPU here has" not in said
    shared = call("check", study, "--set", "workers.gpus=0.5", "--set", "workers.count=2")
    assert "2 workers share one: 54 kB of models for each" in " ".join(shared.stdout.split())
    for memory, verdict in ((80_000_000_000, "80.0 GB 158 kB"), (4_000_000_000, "4.0 GB, TOO LITTLE")):
        monkeypatch.setattr(devices, "least_memory", lambda memory=memory: memory)
        told = call("check", study, "--set", "workers.gpus=2", "--set", "search.learned=1").stdout
        assert f"on each in turn; a GPU here has {verdict}" in " ".join(told.split())
    assert "GPUs" not in call("check", study).stdout


HOST = """\
import sys
import ray
ray.init(address="local", num_cpus=3, num_gpus=2, include_dashboard=False, object_store_memory=100 * 2**20)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""

GUEST = """\
import os
import sys
from optimizer.errors import WorkerError
from optimizer.workers.gpus import require_gpus
from optimizer.workers.ray_pool import RayPool
from tests.optimizer.fakes import FakeWorker
from tests.optimizer.workers.test_gpus import Devices
from tests.optimizer.workers.test_pool import collect
for gpus, count in ((2, 1), (0.5, 2)):
    require_gpus(gpus, count, sys.argv[1])
    with RayPool(FakeWorker, count, address=sys.argv[1], gpus=gpus) as pool:
        for number in range(count):
            pool.submit(Devices(number))
        print(sorted(result.answer for result in collect(pool, count)))
for ask in (lambda: require_gpus(4, 1, sys.argv[1]), lambda: RayPool(FakeWorker, 1, address=sys.argv[1], gpus=4)):
    try:
        ask()
    except WorkerError as error:
        print(error)
"""


class Devices:
    """A job that says which GPUs Ray gave its worker; it stays until there are as many as asked for."""

    length = 1.0

    def __init__(self, trial: int) -> None:
        self.trial = trial

    def work(self, worker: object) -> str:
        return os.environ.get("CUDA_VISIBLE_DEVICES", "none")


@pytest.mark.slow
def test_ray_gives_a_worker_the_gpus_it_asks_for(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    environment |= {"HOME": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", HOST], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path,
        env=environment,
    ) as host:  # fmt: skip
        try:
            assert host.stdout is not None
            address = next(line for line in host.stdout if line[:1].isdecimal()).strip()
            command = [sys.executable, "-c", GUEST, address]
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
        finally:
            host.communicate("")
    whole, parts, *refusals = done.stdout.splitlines()
    assert whole in ("['0,1']", "['1,0']"), done.stderr
    assert parts in ("['0', '0']", "['0', '1']", "['1', '1']")
    assert refusals == [
        "must be at most the GPUs of one machine; given 4, and the largest machine of the cluster has 2; lower "
        "workers.gpus",
        "workers.gpus: must be at most the GPUs of one machine; given 4, and the largest machine of the cluster has 2; "
        "lower workers.gpus",
    ]
