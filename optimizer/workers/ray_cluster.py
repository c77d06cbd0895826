"""The life of one Ray connection: the cluster's start and end, its folder, and the environment that Ray reads.

The only door to Ray, beside the process of `ray_probe`.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from optimizer.errors import WorkerError
from optimizer.workers.pool import describe
from optimizer.workers.ray_address import require_cluster

PREFIX = "mergefront-"
STARTS = 2  # attempts to start Ray, and to start one worker
OBJECT_STORE_BYTES = 96 * 2**20  # recipes and outcomes only; Ray wants at least 75 MB
LONGEST_TEMP = 40  # Ray's socket names must fit the 107 bytes of an AF_UNIX path
TAIL_LINES = 12
SERVED_AT_ONCE = 8  # calls of an actor that serves
AGENT_SECONDS = 600.0  # Ray's agents live on for about two minutes


class RayCluster:
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
        self._lock = locked(self._folder / "lock")
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
            read_token_anew()

    def _leave(self) -> None:
        if self.ray is not None:
            self.ray.shutdown()
            signal.signal(signal.SIGTERM, self._on_sigterm)

    def serve(self, make: Callable[..., Any], *arguments: Any) -> Any:
        """Start an actor on the driver's machine that takes none of its cores, and return its handle."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(self.ray.get_runtime_context().get_node_id(), soft=False)
        options = {"num_cpus": 0, "max_concurrency": SERVED_AT_ONCE, "scheduling_strategy": here}
        return self.ray.remote(make).options(**options).remote(*arguments)

    def tail(self, pid: int) -> str:
        """Read the last lines a worker of a private cluster wrote, on lines of their own; empty where none are."""
        if self._folder is None or not pid:
            return ""
        lines: list[str] = []
        for path in sorted(self._folder.glob(f"r/session_latest/logs/worker-*-{pid}.*")):
            lines += [line for line in path.read_text(errors="replace").splitlines() if not line.startswith(":")]
        return "".join(f"\n    {line}" for line in lines[-TAIL_LINES:])

    def gpus(self) -> list[float]:
        """Return how many GPUs each machine has."""
        return [node["Resources"].get("GPU", 0.0) for node in self.ray.nodes() if node["Alive"]]

    def describe_resources(self) -> str:
        """Say what the cluster has and what of it is free, in words."""
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
        read_token_anew()
        here = self._folder / "work"  # without it Ray puts the driver's current folder first on a worker's sys.path
        here.mkdir(exist_ok=True)
        (here / "README").write_text("The working directory of mergefront's workers.\n")
        travels = {} if self._address is None else {"py_modules": [str(package) for package in own_packages()]}
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
            runtime_env={"env_vars": dict(self._worker_env), "working_dir": str(here), **travels},
            **(private if self._address is None else {}),
        )


def own_packages() -> list[Path]:
    """Find this project's import packages: another machine of a cluster may lack them."""
    root = Path(__file__).resolve().parents[2]
    return [root / name for name in ("optimizer", "search_spaces", "evals")]


def ask(actor: Any, method: str, *arguments: Any) -> Any:
    """Call an actor's method and wait for the answer."""
    import ray

    return ray.get(getattr(actor, method).remote(*arguments))


def read_token_anew() -> None:
    """Have Ray look at the environment again: it keeps the mode and the token that it found when it was imported."""
    with contextlib.suppress(ImportError, AttributeError):  # Ray's inside, which has no promise
        raylet = import_module("ray._raylet")
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()


def temporary_parent() -> Path:
    """Find the system's temporary folder, or /tmp where that path is too long for Ray's sockets."""
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
            with locked(lock):
                shutil.rmtree(folder, ignore_errors=True)


def locked(path: Path) -> IO[str]:
    """Open a file and hold it against others; OSError where another process holds it."""
    file = path.open("a", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file
