"""Workers as Ray actors: one Ray cluster for the whole file, with workers that obey orders.

Each test finds two sound workers, whatever the test before left, so that any test may run alone and in any order.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from optimizer.errors import WorkerError
from optimizer.workers.pool import Result, ScoreJob
from optimizer.workers.ray_address import require_cluster
from optimizer.workers.ray_pool import RayPool, Slot, worker_environment
from tests.conftest import ROOT
from tests.optimizer.fakes import Bench, FakeWorker, ObedientWorker, Obey, processes_of
from tests.optimizer.workers.test_pool import collect, recipes

pytestmark = pytest.mark.slow  # a cluster is started

RAY_SECONDS = 120.0


def both_started(pool: RayPool) -> tuple[int, ...]:
    """The process ids of both workers, once the last dead one is replaced."""
    end = time.monotonic() + RAY_SECONDS
    while len(pool.pids) < 2 and time.monotonic() < end:
        pool.wait(1.0)
    return pool.pids


def test_cores_are_shared_among_workers_and_never_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert worker_environment(3, 0)["OMP_NUM_THREADS"] == "2"
    assert worker_environment(16, 0)["OMP_NUM_THREADS"] == "1"
    assert worker_environment(16, 4)["OMP_NUM_THREADS"] == "4"


def test_torch_has_huge_pages_unless_the_user_says_no(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    assert worker_environment(1, 0)["THP_MEM_ALLOC_ENABLE"] == "1"
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    assert worker_environment(1, 0)["THP_MEM_ALLOC_ENABLE"] == "0"


@pytest.fixture(scope="module")
def orders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("orders")


@pytest.fixture(scope="module")
def cluster(orders: Path) -> Iterator[list[RayPool]]:
    """The pool that is open, if one is, in surroundings that Ray by itself does not start in, or not by itself.

    The current folder shadows a package of ours, a stranger's cluster is named, Ray's token has no home, the temporary
    folder's name is long, shared memory is as small as Docker makes it, and Ray was imported without a token.
    """
    trap, long = orders / "trap", orders / ("t" * 60)
    (trap / "evals").mkdir(parents=True)
    (trap / "evals" / "__init__.py").write_text("raise RuntimeError('shadowed')")
    long.mkdir()
    with pytest.MonkeyPatch.context() as patch, socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        patch.setenv("RAY_ADDRESS", f"127.0.0.1:{stranger.getsockname()[1]}")
        patch.setenv("HOME", "/proc/nonexistent")
        patch.setattr(tempfile, "tempdir", str(long))
        patch.setattr("ray._private.utils.get_shared_memory_bytes", lambda: 64 * 2**20)
        patch.chdir(trap)
        pools: list[RayPool] = []
        yield pools
        for pool in pools:
            pool.close()


@pytest.fixture
def pool(cluster: list[RayPool], orders: Path) -> Iterator[RayPool]:
    """Two workers that have started, and no orders for them."""
    for name in ("kill", "hang", "fail", "change", "refuse", "kill-done"):
        (orders / name).unlink(missing_ok=True)
    if not cluster:
        cluster.append(RayPool(functools.partial(ObedientWorker, folder=orders), 2))
    (pool,) = cluster
    both_started(pool)
    yield pool
    if pool.size == 0:
        cluster.clear()


def renew(pool: RayPool) -> None:
    """Put new workers in the place of all."""
    for slot in list(pool._slots):
        pool._ray.kill(slot.actor)
        pool._replace(slot, started=1)


def busy_slot(pool: RayPool) -> Slot:
    (busy,) = (slot for slot in pool._slots if slot.job is not None)
    return busy


def test_the_cluster_is_private(pool: RayPool) -> None:
    for number, recipe in enumerate(recipes()):
        pool.submit(ScoreJob(number, recipe.to_json(), "holdout"))
    results = collect(pool, len(recipes()))
    assert all(result.answer is not None and not result.error for result in results)
    assert results[0].answer == FakeWorker().evaluate(results[0].job.recipe, "holdout")
    folder = pool._cluster._folder
    assert folder is not None
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "token").stat().st_mode) == 0o600
    assert os.environ["RAY_AUTH_MODE"] == "token"


def test_workers_run_in_a_folder_of_their_own_offline_with_their_share_of_threads(pool: RayPool, orders: Path) -> None:
    for pid in pool.pids:
        worker = json.loads((orders / f"about-{pid}.json").read_text())
        assert str(orders / "trap") not in (*worker["path"], worker["folder"])
        assert worker["environment"]["HF_HUB_OFFLINE"] == "1"
        assert worker["environment"]["OMP_NUM_THREADS"] == str(max(1, (os.cpu_count() or 1) // 2))


def values_of(bench: Bench) -> dict[int, list[float]]:
    study = optuna.load_study(study_name="toy", storage=bench.run.storage())
    return {trial.number: trial.values for trial in study.trials}


def test_a_killed_workers_trial_is_done_by_another(pool: RayPool, orders: Path, tmp_path: Path) -> None:
    Obey(orders).order("kill", "once")
    bench = Bench(tmp_path / "toy")
    bench.search(trials=12, pool=pool)
    assert (orders / "kill-done").exists()
    study = optuna.load_study(study_name="toy", storage=bench.run.storage())
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 12
    undisturbed = Bench(tmp_path / "undisturbed" / "toy")
    undisturbed.search(trials=12)
    assert values_of(bench) == values_of(undisturbed)
    (retry,) = (event for event in bench.events if event.kind == "retry")
    assert "attempt 1 of 2: worker process" in retry.text
    assert "of an order" in retry.text  # the end of the worker's log


def test_a_worker_killed_from_outside_gives_its_job_back(pool: RayPool, orders: Path) -> None:
    recipe = recipes()[0]
    Obey(orders).order("hang", recipe.digest)
    pool.submit(ScoreJob(5, recipe.to_json(), "search"))
    assert pool.wait(0.5) == []
    pid = busy_slot(pool).pid
    os.kill(pid, signal.SIGKILL)
    (result,) = collect(pool, 1)
    assert (result.died, result.answer, result.job.trial) == (True, None, 5)
    assert f"worker process {pid} died" in result.error


def test_a_poisoned_recipe_fails_and_the_search_goes_on(pool: RayPool, orders: Path, tmp_path: Path) -> None:
    bench = Bench(tmp_path / "toy")
    poison = next(a for a in bench.space.anchors() if a.name == "uniform a=0.50")
    Obey(orders).order("kill", bench.space.recipe(poison.params).digest)
    bench.search(trials=10, pool=pool)
    trials = optuna.load_study(study_name="toy", storage=bench.run.storage()).trials
    (failed,) = (trial for trial in trials if trial.user_attrs.get("kind") == "uniform a=0.50")
    assert failed.state == TrialState.FAIL
    assert failed.user_attrs["reason"].startswith("worker_died: worker process")
    assert len(trials) == 10
    assert sum(trial.state == TrialState.COMPLETE for trial in trials) >= 8  # the slope may be the same recipe


def test_a_trial_that_runs_too_long_costs_its_worker(
    pool: RayPool, orders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipes()[2]
    Obey(orders).order("hang", recipe.digest)
    monkeypatch.setattr(pool, "_trial_seconds", 1.0)
    pool.submit(ScoreJob(9, recipe.to_json(), "search"))
    (result,) = collect(pool, 1)
    assert result.died
    assert result.error == "trial ran longer than 1 s; its worker was stopped"


def test_a_result_that_comes_as_its_time_is_over_counts_once(pool: RayPool) -> None:
    pool.submit(ScoreJob(3, recipes()[0].to_json(), "search"))
    slot = busy_slot(pool)
    pool._ray.wait([slot.ref], timeout=RAY_SECONDS)
    slot.deadline = time.monotonic() - 1.0
    (result,) = pool.wait(RAY_SECONDS)
    assert (result.job.trial, result.died, result.error) == (3, False, "")
    assert result.answer is not None
    assert pool.wait(0.0) == []


def test_errors_in_a_worker_come_back_as_words(pool: RayPool, orders: Path) -> None:
    recipe = recipes()[3]
    Obey(orders).order("fail", recipe.digest)
    pool.submit(ScoreJob(9, recipe.to_json(), "search"))
    pool.submit(ScoreJob(10, "no recipe", "search"))
    changed = recipes()[4]
    Obey(orders).order("change", changed.digest)
    pool.submit(ScoreJob(11, changed.to_json(), "search"))
    by_trial = {result.job.trial: result for result in collect(pool, 3)}
    assert by_trial[9] == Result(by_trial[9].job, None, "nonfinite: tensor model.norm.weight")
    assert by_trial[10].error
    assert not by_trial[10].died
    assert by_trial[11] == Result(by_trial[11].job, None, "model.safetensors changed", sources_changed=True)


def test_a_wait_ends_with_the_first_result(pool: RayPool, orders: Path) -> None:
    slow, quick = recipes()[:2]
    Obey(orders).order("hang", slow.digest)
    pool.submit(ScoreJob(0, slow.to_json(), "search"))
    pool.submit(ScoreJob(1, quick.to_json(), "search"))
    start = time.monotonic()
    (result,) = pool.wait(RAY_SECONDS)
    assert (result.job.trial, result.error) == (1, "")
    assert time.monotonic() - start < RAY_SECONDS / 2  # and not at the wait's own end
    os.kill(busy_slot(pool).pid, signal.SIGKILL)
    collect(pool, 1)


def test_a_worker_that_cannot_be_built_says_why(pool: RayPool, orders: Path) -> None:
    (orders / "refuse").touch()
    renew(pool)
    pool.submit(ScoreJob(0, recipes()[0].to_json(), "search"))
    with pytest.raises(WorkerError, match="a worker cannot be built: no such model"):
        collect(pool, 1)
    (orders / "refuse").unlink()
    pool._queue.clear()
    renew(pool)


def test_a_cluster_that_runs_is_joined(pool: RayPool, tmp_path: Path) -> None:
    address = pool._ray.get_runtime_context().gcs_address
    for slot in pool._slots:
        pool._ray.kill(slot.actor)  # makes room for the guest's
    command, environment = [sys.executable, "-c", GUEST, address], os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=RAY_SECONDS)
    renew(pool)
    assert done.stdout == "scored\n", done.stderr


GUEST = """\
import sys
from optimizer.workers.pool import ScoreJob
from optimizer.workers.ray_pool import RayPool
from tests.optimizer.fakes import FakeWorker
from tests.optimizer.workers.test_pool import collect, recipes
with RayPool(FakeWorker, 1, address=sys.argv[1]) as pool:
    pool.submit(ScoreJob(0, recipes()[0].to_json(), "search"))
    assert collect(pool, 1)[0].answer
    print("scored")
"""


def test_a_cluster_of_other_versions_is_refused_with_both(pool: RayPool) -> None:
    from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

    address, key = pool._ray.get_runtime_context().gcs_address, b"CLUSTER_METADATA"
    true = _internal_kv_get(key, namespace=b"cluster")
    about = json.loads(true) | {"ray_version": "2.61.0", "python_version": "3.12.1"}
    _internal_kv_put(key, json.dumps(about).encode(), overwrite=True, namespace=b"cluster")
    try:
        with pytest.raises(WorkerError, match=r"Ray 2\.61\.0 under Python 3\.12\.1.*`pip install ray==2\.61\.0`"):
            require_cluster(address)
    finally:
        _internal_kv_put(key, true, overwrite=True, namespace=b"cluster")


def test_nothing_is_left_after_close(pool: RayPool) -> None:
    """Closes the pool; the test after it, if there is one, starts another."""
    folder = pool._cluster._folder
    assert folder is not None
    assert processes_of(folder)
    pool.close(kill=True)
    pool.close()
    end = time.monotonic() + 60
    while processes_of(folder) and time.monotonic() < end:
        time.sleep(0.2)
    assert processes_of(folder) == []
    assert not folder.exists()
    assert not [path for path in Path("/dev/shm").iterdir() if folder.name in path.name]
    assert "RAY_AUTH_TOKEN_PATH" not in os.environ
