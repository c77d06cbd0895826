"""Addresses that lead to no cluster: said within seconds, by name, without Ray. With a cluster: `test_pool`."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from optimizer.errors import WorkerError
from optimizer.workers import ray_address as module
from optimizer.workers.ray_address import address_problem, other_cluster, require_cluster
from optimizer.workers.ray_pool import RayPool
from tests.optimizer.fakes import FakeWorker

SETTINGS_FRAME = b"\0\0\0\x04\0\0\0\0\0"


@contextmanager
def server(says: bytes | None) -> Iterator[str]:
    """The address of a port that says something and hangs up, or accepts and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                held.append(connection)
                if says is not None:
                    with suppress(OSError):  # who asks may hang up first
                        connection.recv(1024)
                        connection.sendall(says)
                        connection.shutdown(socket.SHUT_RDWR)

        held: list[socket.socket] = []
        threading.Thread(target=serve, daemon=True).start()
        try:
            yield f"127.0.0.1:{listening.getsockname()[1]}"
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            for connection in held:
                connection.close()


@contextmanager
def full_backlog() -> Iterator[str]:
    """The address of a port whose queue is full: packets to it are dropped, as on a way that leads nowhere."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(listening.getsockname())
        try:
            yield f"127.0.0.1:{listening.getsockname()[1]}"
        finally:
            for one in waiting:
                one.close()


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONNECT_SECONDS", 0.3)
    monkeypatch.setattr(module, "ANSWER_SECONDS", 0.3)


def refusal(address: str) -> str:
    with pytest.raises(WorkerError) as caught:
        require_cluster(address)
    assert repr(address) in str(caught.value)
    return str(caught.value)


def test_a_closed_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody else gets it
        assert "it cannot be reached ([Errno 111]" in refusal(f"127.0.0.1:{taken.getsockname()[1]}")


def test_a_port_that_says_nothing_is_named() -> None:
    with server(None) as address:
        assert "says nothing in 0.3 s" in refusal(address)


def test_an_address_no_way_leads_to_is_named() -> None:
    with full_backlog() as address:
        assert "no way leads there (no answer in 0.3 s)" in refusal(address)


@pytest.mark.parametrize("says", [b"", b"SSH-2.0-OpenSSH_9.2\r\n", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_a_port_of_another_program_is_named(says: bytes) -> None:
    with server(says) as address:
        assert "does not answer as Ray does" in refusal(address)


def test_a_host_that_does_not_exist_is_named() -> None:
    assert "it cannot be reached" in refusal("no-such-host.invalid:6379")


@pytest.mark.parametrize(
    "address",
    [
        *("", "cluster", "local", "10.0.0.5", "10.0.0.5:", ":6379", "10.0.0.5:0", "10.0.0.5:65536", "10.0.0.5:٣"),
        *("a b:1", "::1:6379", "ray://10.0.0.5:10001", "http://10.0.0.5:8265", "10.0.0.5:6379/x", "x\x1b[2J:1"),
    ],
)
def test_what_is_no_address_is_refused_before_anything_is_tried(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("tried"))
    assert address_problem(address)
    assert "must be HOST:PORT of a running Ray cluster" in refusal(address)


@pytest.mark.parametrize("address", ["auto", "10.0.0.5:6379", "head.cluster.local:6379", "[::1]:6379"])
def test_addresses_are_let_through(address: str) -> None:
    assert address_problem(address) == ""


def test_a_pool_asks_for_the_cluster_before_ray_does() -> None:
    with server(None) as address, pytest.raises(WorkerError, match=address):
        RayPool(FakeWorker, 1, address=address)


def answered(monkeypatch: pytest.MonkeyPatch, *lines: object, code: int = 0, errors: str = "") -> str:
    """The refusal where the probe printed these lines."""
    monkeypatch.setattr(module, "_greeted", lambda host, port: "")
    text = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], code, text, errors))
    return refusal("10.0.0.5:6379")


def test_a_cluster_of_other_versions_is_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = {"ray": "2.61.0", "python": "3.12.1"}
    for rest in ({"error": "RuntimeError: Version mismatch"}, "Ray dies of it"):
        words = answered(monkeypatch, theirs, rest, code=1)
        assert "it runs Ray 2.61.0 under Python 3.12.1, this search Ray " in words
        assert "`pip install ray==2.61.0` under Python 3.12.1 here" in words


def test_a_cluster_that_cannot_be_joined_in_time_or_that_kills_ray_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "could not join it in time" in answered(monkeypatch, code=-14)
    assert "Ray says: Check failed" in answered(monkeypatch, code=-6, errors="lines\nCheck failed\n")
    assert "Ray says: ValueError: no token" in answered(monkeypatch, {"error": "ValueError:\n no token"})


def test_ray_itself_is_given_seconds_only() -> None:
    """Ray waits for minutes if it is let, and no Python code runs meanwhile."""
    script = "import optimizer.workers.ray_probe as p; p.JOIN_SECONDS = 1; p.probe('127.0.0.1:1')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert done.returncode == -14, done.stdout + done.stderr


def test_the_cluster_a_machine_names_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert other_cluster() == ""
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("10.0.0.5:6379\n")
    assert (
        other_cluster() == "the Ray cluster at 10.0.0.5:6379 is left alone; --ray-address 10.0.0.5:6379 would join it"
    )
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.6:6379")
    assert "10.0.0.6:6379" in other_cluster()
