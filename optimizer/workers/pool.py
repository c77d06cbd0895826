"""Who evaluates recipes: this process (`SerialPool`), or Ray actors on this machine or a cluster (`RayPool`).

The search submits jobs and collects results; a pool never retries. A worker that dies or runs too long is replaced,
and its job comes back as `died`, for the search to give to another worker.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import math
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from optimizer.errors import WorkerError
from optimizer.workers.ray_address import require_cluster

if TYPE_CHECKING:
    from optimizer.workers.worker import Evaluation

PREFIX = "mergefront-"
STARTS = 2  # attempts to start Ray, and to start one worker
FIRST_WORKER_SECONDS = 600.0  # a cluster without room for a single worker would keep us waiting for ever
OBJECT_STORE_BYTES = 96 * 2**20  # recipes and outcomes only; Ray wants at least 75 MB
LONGEST_TEMP = 40  # Ray's socket names must fit the 107 bytes of an AF_UNIX path
TAIL_LINES = 12
AGENT_SECONDS = 600.0  # Ray's agents live on for about two minutes


class WorkerLike(Protocol):
    """What a pool needs of a worker."""

    def evaluate(self, recipe: str, suite: str) -> Evaluation: ...


MakeWorker = Callable[[], WorkerLike]


@dataclass(frozen=True, slots=True)
class Job:
    """One recipe (JSON) to score on one suite, for one trial."""

    trial: int
    recipe: str
    suite: str


@dataclass(frozen=True, slots=True)
class Result:
    """How a job ended: an evaluation, or an error.

    Args:
        died: the worker, not the recipe, may be to blame.
        sources_changed: a checkpoint's file is not the one that was opened: no recipe can be scored as before.
    """

    job: Job
    evaluation: Evaluation | None
    error: str = ""
    died: bool = False
    sources_changed: bool = False


class Pool(Protocol):
    """Workers that take jobs; used by one thread."""

    @property
    def size(self) -> int: ...

    def submit(self, job: Job) -> None: ...

    def wait(self, timeout: float) -> list[Result]:
        """Results that are there within `timeout` seconds; as soon as there is one."""

    def close(self, *, kill: bool = False) -> None: ...


class _Closing:
    """Lets a pool be used in a `with` statement."""

    def close(self, *, kill: bool = False) -> None:
        raise NotImplementedError

    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(kill=kind is not None)


class SerialPool(_Closing):
    """One worker in this process: no Ray, no time limit; `wait` does the work."""

    size = 1

    def __init__(self, make_worker: MakeWorker) -> None:
        self._worker = make_worker()
        self._jobs: deque[Job] = deque()

    def submit(self, job: Job) -> None:
        self._jobs.append(job)

    def wait(self, timeout: float) -> list[Result]:
        if not self._jobs:
            return []
        job = self._jobs.popleft()
        try:
            return [Result(job, self._worker.evaluate(job.recipe, job.suite))]
        except Exception as error:
            return [Failure.of(error).ends(job)]

    def close(self, *, kill: bool = False) -> None:
        self._jobs.clear()


def describe(error: BaseException) -> str:
    """An error in one line: our own messages stand for themselves, others need their kind."""
    from evals.errors import TaskError
    from optimizer.errors import MergefrontError

    text = " ".join(str(error).split())
    return text if isinstance(error, MergefrontError | TaskError) and text else f"{type(error).__name__}: {text}"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a job has no evaluation, in plain types: an exception of another process may not unpickle here."""

    error: str
    sources_changed: bool

    @classmethod
    def of(cls, error: Exception) -> Failure:
        from optimizer.errors import CheckpointError

        return cls(describe(error), isinstance(error, CheckpointError))  # all that a built worker has open is sources

    def ends(self, job: Job) -> Result:
        """The result of a job that failed so."""
        return Result(job, None, self.error, sources_changed=self.sources_changed)


class _Host:
    """The actor around a worker."""

    def __init__(self, make_worker: MakeWorker) -> None:
        self._error = ""
        try:
            self._worker = make_worker()
        except Exception as error:
            self._error = describe(error)

    def hello(self) -> tuple[int, str]:
        return os.getpid(), self._error

    def evaluate(self, recipe: str, suite: str) -> Evaluation | Failure:
        try:
            return self._worker.evaluate(recipe, suite)
        except Exception as error:
            return Failure.of(error)


@dataclass(slots=True)
class _Slot:
    """One actor: starting (a ref but no job), idle (neither), or busy (both)."""

    actor: Any
    ref: Any
    started: int = 1
    pid: int = 0
    job: Job | None = None
    deadline: float = math.inf  # on the monotonic clock


class RayPool(_Closing):
    """Workers as Ray actors, in a private cluster of this machine or in one the user names.

    A private cluster listens on all interfaces, so it has a token of its own, in a 0600 file in a 0700 folder that
    goes when the pool closes, or, after a crash, when the next pool starts.

    Args:
        make_worker: builds a worker; pickled to each actor, which must be able to import it.
        count: workers, each counted as one CPU by Ray.
        threads: of torch per worker; 0 shares this machine's cores among the workers.
        address: None for a private cluster (a running one is ignored), else HOST:PORT of one, or "auto".
        trial_seconds: a job that runs longer costs its worker's life; None is no limit.
        device: "cpu" keeps workers off GPUs; else the GPUs Ray knows of are shared among them.

    Raises:
        WorkerError: Ray cannot start, or no cluster can be joined at the address.
    """

    def __init__(
        self,
        make_worker: MakeWorker,
        count: int,
        *,
        threads: int = 0,
        address: str | None = None,
        trial_seconds: float | None = None,
        device: str = "auto",
    ) -> None:
        assert count >= 1, "a pool needs a worker"
        if threading.current_thread() is not threading.main_thread():
            raise WorkerError("Ray must be started from the main thread: its processes end with the starting thread")
        self._make_worker = make_worker
        self._trial_seconds = trial_seconds or math.inf
        self._queue: deque[Job] = deque()
        self._cluster = _Cluster(count, address, worker_environment(count, threads))
        self._cluster.start()
        self._ray = self._cluster.ray
        self._opened = time.monotonic()
        gpus = 0.0 if device == "cpu" else gpu_share(count, self._ray.cluster_resources().get("GPU", 0.0))
        self._host = self._ray.remote(_Host).options(
            num_cpus=1, num_gpus=gpus, max_restarts=0, max_task_retries=0, max_concurrency=1
        )
        self._slots = [self._new_slot() for _ in range(count)]

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
            raise WorkerError(f"no worker started in {FIRST_WORKER_SECONDS:.0f} s; {self._cluster.words()}")
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
                slot.ref = slot.actor.evaluate.remote(slot.job.recipe, slot.job.suite)
                slot.deadline = time.monotonic() + self._trial_seconds

    def _collect(self, slot: _Slot) -> Result | None:
        """Take what a slot's ref holds; None where it only said hello."""
        job, ref = slot.job, slot.ref
        slot.job, slot.ref, slot.deadline = None, None, math.inf
        try:
            answer = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            return self._bury(slot, job, error)
        if job is not None:
            return answer.ends(job) if isinstance(answer, Failure) else Result(job, answer)
        slot.pid, failure = answer
        slot.started = 1
        if failure:
            raise WorkerError(f"a worker cannot be built: {failure}")
        return None

    def _bury(self, slot: _Slot, job: Job | None, error: Exception) -> Result | None:
        """Replace a dead worker, and give its job back."""
        who = f"worker process {slot.pid} died" if slot.pid else "a worker died as it started"
        words = f"{who} ({type(error).__name__}){self._cluster.tail(slot.pid)}"
        if job is None and slot.started >= STARTS:
            raise WorkerError(f"{words}: {' '.join(str(error).split())[:300]}")
        self._replace(slot, started=1 if job else slot.started + 1)
        return Result(job, None, words, died=True) if job else None

    def _overrun(self, slot: _Slot) -> Result:
        job = slot.job
        assert job is not None, "only a busy slot has a deadline"
        self._ray.kill(slot.actor)
        self._replace(slot, started=1)
        return Result(job, None, f"trial ran longer than {self._trial_seconds:g} s; its worker was stopped", died=True)

    def _replace(self, slot: _Slot, *, started: int) -> None:
        self._slots[self._slots.index(slot)] = self._new_slot(started)

    def _new_slot(self, started: int = 1) -> _Slot:
        actor = self._host.remote(self._make_worker)
        return _Slot(actor, actor.hello.remote(), started)


def worker_environment(count: int, threads: int) -> dict[str, str]:
    """Environment of a worker: offline, its share of the cores, and this project importable from a source checkout."""
    share = threads or max(1, (os.cpu_count() or 1) // count)
    environment = {
        "OMP_NUM_THREADS": str(share),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    root = Path(__file__).resolve().parents[2]
    if root.name not in ("site-packages", "dist-packages"):
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    return environment


def gpu_share(count: int, gpus: float) -> float:
    """The part of a GPU each worker takes so that all fit: whole ones, or 1/n where n workers share one."""
    return 1.0 / math.ceil(count / gpus) if gpus >= 1 else 0.0


class _Cluster:
    """The life of one Ray connection: its environment, its folder, its start and its end."""

    def __init__(self, count: int, address: str | None, worker_env: Mapping[str, str]) -> None:
        self._count, self._address, self._worker_env = count, address, worker_env
        self.ray: Any = None  # the library, once it is imported and no session but ours is in it
        self._folder: Path | None = None
        self._lock: IO[str] | None = None
        self._restore: dict[str, str | None] = {}
        self._on_sigterm = signal.getsignal(signal.SIGTERM)  # Ray puts its own in place

    def start(self) -> None:
        if self._address is not None:
            require_cluster(self._address)
        parent = temporary_parent()
        remove_leftovers(parent)
        self._folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        self._lock = _locked(self._folder / "lock")
        self._set_environment()
        for attempt in range(STARTS):  # a port chosen by Ray may be taken by another program just then
            try:
                self._init()
                break
            except Exception as error:
                final = self.ray is None or self._address is not None or attempt + 1 == STARTS
                with contextlib.suppress(Exception):
                    self._leave()
                if final:
                    self.stop()
                    raise WorkerError(
                        f"Ray could not start: {describe(error)}. Set workers.count to 0 to search without Ray"
                    ) from error
        if self._on_sigterm is signal.SIG_IGN:  # a signal that is ignored stays so
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def stop(self) -> None:
        """End the cluster and remove its folder; stopping twice does nothing."""
        if self._folder is None:
            return
        self._leave()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = None
        if self._lock is not None:
            self._lock.close()
        for name, value in self._restore.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        if self.ray is not None:
            _read_token_anew()

    def _leave(self) -> None:
        if self.ray is not None:
            self.ray.shutdown()
            signal.signal(signal.SIGTERM, self._on_sigterm)

    def tail(self, pid: int) -> str:
        """The last lines a worker of a private cluster wrote, on lines of their own; empty where there are none."""
        if self._folder is None or not pid:
            return ""
        lines: list[str] = []
        for path in sorted(self._folder.glob(f"r/session_latest/logs/worker-*-{pid}.*")):
            lines += [line for line in path.read_text(errors="replace").splitlines() if not line.startswith(":")]
        return "".join(f"\n    {line}" for line in lines[-TAIL_LINES:])

    def words(self) -> str:
        return f"Ray offers {self.ray.cluster_resources()}, of which {self.ray.available_resources()} is free"

    def _set_environment(self) -> None:
        assert self._folder is not None
        wanted = {
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        }
        if self._address is None:
            token = self._folder / "token"
            token.touch(0o600)
            token.write_text(secrets.token_hex(32))
            wanted |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        for name, value in wanted.items():
            self._restore[name] = os.environ.get(name)
            os.environ[name] = value

    def _init(self) -> None:
        assert self._folder is not None
        import ray
        import ray.exceptions

        if ray.is_initialized() and self.ray is None:
            raise WorkerError("this process is in a Ray session already; end it with ray.shutdown() first")
        self.ray = ray
        _read_token_anew()
        here = self._folder / "work"  # without it Ray puts the driver's current folder first on a worker's sys.path
        here.mkdir(exist_ok=True)
        (here / "README").write_text("The working directory of mergefront's workers.\n")
        private: dict[str, Any] = {
            "num_cpus": self._count,
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
            "_temp_dir": str(self._folder / "r"),
        }
        self.ray.init(
            address="local" if self._address is None else self._address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": dict(self._worker_env), "working_dir": str(here)},
            **(private if self._address is None else {}),
        )


def _read_token_anew() -> None:
    """Have Ray look at the environment again: it keeps the mode and the token that it found when it was imported."""
    with contextlib.suppress(ImportError, AttributeError):  # Ray's inside, which has no promise
        raylet = import_module("ray._raylet")
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()


def temporary_parent() -> Path:
    """The system's temporary folder, or /tmp where that path is too long for Ray's sockets."""
    parent = tempfile.gettempdir()
    return Path(parent if len(parent) <= LONGEST_TEMP or sys.platform == "win32" else "/tmp")


def remove_leftovers(parent: Path) -> None:
    """Remove the folders of pools whose process is gone: nobody holds their lock any more.

    A folder without a lock is just being made, or was made again by an agent of Ray's that outlived its pool.
    """
    for folder in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, in use, or removed by another pool just now
            about, lock = folder.stat(), folder / "lock"
            if about.st_uid != os.getuid() or (not lock.exists() and time.time() - about.st_mtime < AGENT_SECONDS):
                continue
            with _locked(lock):
                shutil.rmtree(folder, ignore_errors=True)


def _locked(path: Path) -> IO[str]:
    """Open a file and hold it against others; OSError where another process holds it."""
    file = path.open("a", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file
