"""Workers as Ray actors, in a private cluster of this machine or in one the user names."""

from __future__ import annotations

import math
import os
import platform
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from optimizer.errors import WorkerError
from optimizer.workers.gpus import gpu_share, require_among, share_of
from optimizer.workers.memory import HUGE_PAGES
from optimizer.workers.pool import Closing, Failure, Job, MakeWorker, Result, WorkerLike, describe
from optimizer.workers.ray_cluster import STARTS, RayCluster, ask

FIRST_WORKER_SECONDS = 600.0  # a cluster without room for a single worker would keep us waiting for ever


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that scores depend on."""
    return {name: version(name) for name in ("lm-eval", "torch", "transformers")}


class _Host:
    """The actor around a worker."""

    def __init__(self, make_worker: MakeWorker, versions: Mapping[str, str]) -> None:
        self._error = ""
        try:
            require_versions(versions)
            self._worker = make_worker()
        except Exception as error:
            self._error = describe(error)

    def report_ready(self) -> tuple[int, str]:
        return os.getpid(), self._error

    def work(self, job: Job) -> Any:
        try:
            return job.work(self._worker)
        except Exception as error:
            return Failure.of(error)


@dataclass(slots=True)
class Slot:
    """One actor: starting (a ref but no job), idle (neither), or busy (both)."""

    actor: Any
    ref: Any
    started: int = 1
    pid: int = 0
    job: Job | None = None
    deadline: float = math.inf  # on the monotonic clock


class RayPool(Closing):
    """Workers as Ray actors, in a private cluster of this machine or in one the user names.

    A private cluster listens on all interfaces, so it has a token of its own, in a 0600 file in a 0700 folder that
    goes when the pool closes, or, after a crash, when the next pool starts.

    Args:
        make_worker: builds a worker; pickled to each actor, which must be able to import it.
        count: workers, each counted as one CPU by Ray.
        threads: of torch per worker; 0 shares this machine's cores among the workers.
        address: None for a private cluster (a running one is ignored), else HOST:PORT of one, or "auto".
        trial_seconds: a job that runs longer costs its worker's life (one that prepares an anchor may take its length
            times that); None is no limit.
        device: "cpu" and "mps" keep workers off the GPUs that Ray knows of.
        gpus: of each worker; None: those that Ray knows of are shared among them.
        server: what machines of the cluster may ask the driver's for: its class and arguments. `make_worker` is then
            given the way to ask, a function of a method's name and arguments.

    Raises:
        WorkerError: Ray cannot start, or no cluster can be joined at the address.
    """

    def __init__(
        self,
        make_worker: Callable[..., WorkerLike],
        count: int,
        *,
        threads: int = 0,
        address: str | None = None,
        trial_seconds: float | None = None,
        device: str = "auto",
        gpus: float | None = None,
        server: tuple[Callable[..., Any], *tuple[Any, ...]] | None = None,
    ) -> None:
        assert count >= 1, "a pool needs a worker"
        if threading.current_thread() is not threading.main_thread():
            raise WorkerError("Ray must be started from the main thread: its processes end with the starting thread")
        self._make_worker: MakeWorker = make_worker
        self._trial_seconds = trial_seconds or math.inf
        self._queue: deque[Job] = deque()
        self._cluster = RayCluster(count, address, worker_environment(count, threads))
        self._cluster.start()
        self._ray = self._cluster.ray
        self._opened = time.monotonic()
        if server is not None:
            self._make_worker = partial(make_worker, partial(ask, self._cluster.serve(*server)))
        if device in ("cpu", "mps"):
            each = 0.0
        elif gpus is None:
            each = gpu_share(count, self._ray.cluster_resources().get("GPU", 0.0))
        else:
            each = share_of(gpus)
            self._require_gpus(gpus, count, joins=address is not None)
        self._host = self._ray.remote(_Host).options(
            num_cpus=1, num_gpus=each, max_restarts=0, max_task_retries=0, max_concurrency=1
        )
        self._slots = [self._new_slot() for _ in range(count)]

    def _require_gpus(self, gpus: float, count: int, *, joins: bool) -> None:
        try:
            require_among(gpus, count, self._cluster.gpus(), joins=joins)
        except WorkerError as error:
            self._cluster.stop()
            raise WorkerError(f"workers.gpus: {error}") from error

    @property
    def size(self) -> int:
        return len(self._slots)

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the workers that have started."""
        return tuple(slot.pid for slot in self._slots if slot.pid)

    def submit(self, job: Job) -> None:
        self._queue.append(job)
        self._dispatch()

    def wait(self, timeout: float) -> list[Result]:
        """Collect what is done within `timeout` seconds.

        Raises:
            WorkerError: a worker cannot be built, and why.
        """
        refs = {slot.ref: slot for slot in self._slots if slot.ref is not None}
        if not refs:
            return []
        nearest = min(slot.deadline for slot in self._slots) - time.monotonic()
        done, _ = self._ray.wait(list(refs), num_returns=1, timeout=max(0.0, min(timeout, nearest)))
        results = [result for ref in done if (result := self._collect(refs[ref])) is not None]
        results += [self._overrun(slot) for slot in self._slots if time.monotonic() > slot.deadline]
        if not any(slot.pid for slot in self._slots) and time.monotonic() - self._opened > FIRST_WORKER_SECONDS:
            raise WorkerError(
                f"no worker started in {FIRST_WORKER_SECONDS:.0f} s; {self._cluster.describe_resources()}"
            )
        self._dispatch()
        return results

    def close(self, *, kill: bool = False) -> None:
        self._queue.clear()
        self._slots.clear()
        self._cluster.stop()

    def _dispatch(self) -> None:
        for slot in self._slots:
            if self._queue and slot.ref is None:
                slot.job = self._queue.popleft()
                slot.ref = slot.actor.work.remote(slot.job)
                slot.deadline = time.monotonic() + self._trial_seconds * slot.job.length

    def _collect(self, slot: Slot) -> Result | None:
        """Take what a slot's ref holds; None where its worker has only started."""
        job, ref = slot.job, slot.ref
        slot.job, slot.ref, slot.deadline = None, None, math.inf
        try:
            answer = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            return self._replace_dead(slot, job, error)
        if job is not None:
            return answer.ends(job) if isinstance(answer, Failure) else Result(job, answer)
        slot.pid, failure = answer
        slot.started = 1
        if failure:
            raise WorkerError(f"a worker cannot be built: {failure}")
        return None

    def _replace_dead(self, slot: Slot, job: Job | None, error: Exception) -> Result | None:
        """Replace a dead worker, and give its job back."""
        who = f"worker process {slot.pid} died" if slot.pid else "a worker died as it started"
        words = f"{who} ({type(error).__name__}){self._cluster.tail(slot.pid)}"
        if job is None and slot.started >= STARTS:
            raise WorkerError(f"{words}: {' '.join(str(error).split())[:300]}")
        self._replace(slot, started=1 if job else slot.started + 1)
        return Result(job, None, words, died=True) if job else None

    def _overrun(self, slot: Slot) -> Result:
        job = slot.job
        assert job is not None, "only a busy slot has a deadline"
        self._ray.kill(slot.actor)
        self._replace(slot, started=1)
        seconds = self._trial_seconds * job.length
        return Result(job, None, f"trial ran longer than {seconds:g} s; its worker was stopped", died=True)

    def _replace(self, slot: Slot, *, started: int) -> None:
        self._slots[self._slots.index(slot)] = self._new_slot(started)

    def _new_slot(self, started: int = 1) -> Slot:
        actor = self._host.remote(self._make_worker, library_versions())
        return Slot(actor, actor.report_ready.remote(), started)


def require_versions(wanted: Mapping[str, str]) -> None:
    """Raise WorkerError where this machine has other versions than the driver's, which would give other scores."""
    here = library_versions()
    if here != wanted:
        changes = ", ".join(
            f"{name} {here[name]} (not {wanted[name]})" for name in wanted if here[name] != wanted[name]
        )
        raise WorkerError(
            f"every machine of the cluster needs the versions of the driver's; {platform.node()} has {changes}; "
            f"run `pip install {' '.join(f'{name}=={number}' for name, number in wanted.items())}` there"
        )


def worker_environment(count: int, threads: int) -> dict[str, str]:
    """Make a worker's environment: offline, its share of the cores, this project importable from a source checkout."""
    share = threads or max(1, (os.cpu_count() or 1) // count)
    environment = {
        "OMP_NUM_THREADS": str(share),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        HUGE_PAGES[0]: os.environ.get(*HUGE_PAGES),
    }
    root = Path(__file__).resolve().parents[2]
    if root.name not in ("site-packages", "dist-packages"):
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    return environment
