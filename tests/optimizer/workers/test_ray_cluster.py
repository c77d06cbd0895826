"""The life of a Ray connection: starts, ends, and what is left, with a Ray that only counts."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from optimizer.errors import WorkerError
from optimizer.workers import ray_cluster
from optimizer.workers.ray_cluster import PREFIX, RayCluster, locked, remove_leftovers
from optimizer.workers.ray_pool import RayPool
from tests.optimizer.fakes import FakeWorker


def test_leftovers_of_dead_pools_are_removed_and_living_ones_stay(tmp_path: Path) -> None:
    for name in ("dead", "living", "young", "old"):
        (tmp_path / f"{PREFIX}{name}").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / f"{PREFIX}dead" / "lock").touch()
    os.utime(tmp_path / f"{PREFIX}old", (0, 0))  # made again by an agent of Ray's
    with locked(tmp_path / f"{PREFIX}living" / "lock"):
        remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{PREFIX}living", f"{PREFIX}young", "other"]


def test_ray_is_not_started_from_a_thread_that_may_end() -> None:
    caught: list[BaseException] = []

    def start() -> None:
        try:
            RayPool(FakeWorker, 1)
        except WorkerError as error:
            caught.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert "main thread" in str(caught[0])


@pytest.fixture
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Ray that always starts, but for the errors in its list; it counts how often it was started and left."""

    def init(**_: object) -> None:
        ray.starts += 1
        if ray.errors:
            raise ray.errors.pop(0)

    def shutdown() -> None:
        ray.ends += 1

    exceptions = SimpleNamespace()
    ray = SimpleNamespace(
        starts=0, ends=0, errors=[], init=init, shutdown=shutdown, is_initialized=lambda: False, exceptions=exceptions
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.exceptions", exceptions)
    monkeypatch.setattr(ray_cluster, "read_token_anew", lambda: None)
    return ray


def test_ray_is_started_twice_where_a_port_was_taken_and_not_a_third_time(fake_ray: SimpleNamespace) -> None:
    taken = OSError("[Errno 98] Address already in use")
    fake_ray.errors = [taken]
    cluster = RayCluster(1, None, {})
    cluster.start()
    assert (fake_ray.starts, fake_ray.ends) == (2, 1)
    cluster.stop()
    fake_ray.errors = [taken, taken, taken]
    with pytest.raises(WorkerError, match=r"Address already in use. Set workers.count to 0 to search without Ray"):
        RayCluster(1, None, {}).start()
    assert fake_ray.starts == 4
    assert fake_ray.ends >= 4


def test_without_ray_a_search_without_it_is_proposed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(WorkerError, match=r"Ray could not start: ModuleNotFoundError.* Set workers.count to 0"):
        RayPool(FakeWorker, 1)


def test_a_ray_session_of_the_process_is_left_alone(fake_ray: SimpleNamespace) -> None:
    fake_ray.is_initialized = lambda: True
    with pytest.raises(WorkerError, match=r"in a Ray session already; end it with ray.shutdown\(\)"):
        RayPool(FakeWorker, 1)
    assert (fake_ray.starts, fake_ray.ends) == (0, 0)


def test_starts_leave_no_folder_and_no_setting(fake_ray: SimpleNamespace, tmp_path: Path) -> None:
    environment = dict(os.environ)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_cluster, "temporary_parent", lambda: tmp_path)
        for _ in range(20):
            cluster = RayCluster(1, None, {})
            cluster.start()
            cluster.stop()
    assert list(tmp_path.iterdir()) == []
    assert dict(os.environ) == environment
    assert fake_ray.ends == 20


def test_a_signal_that_is_ignored_stays_ignored_by_ray_too(fake_ray: SimpleNamespace) -> None:
    fake_ray.init = lambda **_: signal.signal(signal.SIGTERM, signal.SIG_DFL)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        cluster = RayCluster(1, None, {})
        cluster.start()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        cluster.stop()
    finally:
        signal.signal(signal.SIGTERM, before)
