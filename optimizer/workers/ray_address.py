"""Whether a Ray cluster answers at the address a person gave, before the search lets Ray wait for it for minutes.

First a plain socket, which settles most mistakes in a moment; then `ray_probe`, a process that joins the cluster as the
search will and can be killed.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from optimizer.errors import WorkerError

CONNECT_SECONDS = 4.0
ANSWER_SECONDS = 4.0
PROBE_SECONDS = 120.0  # with the import of Ray on a busy machine; the probe itself sets the limit of the joining
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"  # RFC 9113, 3.4: with empty SETTINGS
SETTINGS = 4  # the type of the first frame that an HTTP/2 server sends
RULE = "workers.ray_address (--ray-address) must be HOST:PORT of a running Ray cluster, or auto"


def address_problem(address: str) -> str:
    """Say what is wrong with an address as it is written; empty where it may lead to a cluster."""
    if address == "auto":
        return ""
    if "://" in address:
        return "a URL leads to Ray's client server; name the cluster itself, as `ray start --head` printed it"
    host, _, port = address.rpartition(":")
    if not host or any(c.isspace() or not c.isprintable() for c in host) or (":" in host) != host.startswith("["):
        return "write it like 10.0.0.5:6379"
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and 1 <= int(port) <= 65535):
        return "the port is a number from 1 to 65535"
    return ""


def require_cluster(address: str) -> list[float]:
    """Make sure, within seconds, that a search can join the cluster at an address.

    Returns:
        How many GPUs each of its machines has.

    Raises:
        WorkerError: it cannot, and why; the address is named.
    """
    trouble = address_problem(address)
    if not trouble and address != "auto":
        host, _, port = address.rpartition(":")
        trouble = _greeted(host.strip("[]"), int(port))
    gpus: list[float] = []
    if not trouble:
        trouble, gpus = _joined(address)
    if trouble:
        raise WorkerError(f"{RULE}; given {address!r}: {trouble}. Left out, the search starts a cluster of its own")
    return gpus


def other_cluster() -> str:
    """Name the Ray cluster that this machine offers to whoever asks for none, in words; empty where there is none."""
    current = Path(os.environ.get("RAY_TMPDIR") or "/tmp") / "ray" / "ray_current_cluster"
    with suppress(OSError, UnicodeError):
        if not (named := os.environ.get("RAY_ADDRESS", "")):
            named = current.read_text(encoding="utf-8")[:80].strip()
        return f"the Ray cluster at {named} is left alone; --ray-address {named} would join it" if named else ""
    return ""


def _greeted(host: str, port: int) -> str:
    """Say what is wrong with a port; empty where it answers a greeting as an HTTP/2 server, which Ray's head is."""
    try:
        connection = socket.create_connection((host, port), timeout=CONNECT_SECONDS)
    except TimeoutError:
        return f"no way leads there (no answer in {CONNECT_SECONDS:g} s); look at the network and the address"
    except (OSError, UnicodeError) as error:
        return f"it cannot be reached ({error}); is the cluster running?"
    if os.environ.get("RAY_USE_TLS", "0") != "0":  # then the greeting is a secret one: left to Ray
        connection.close()
        return ""
    with connection:
        try:
            answer = _answer(connection)
        except TimeoutError:
            return f"something listens there and says nothing in {ANSWER_SECONDS:g} s; it is not Ray, or it hangs"
        except OSError as error:
            return f"something listens there and breaks off ({error}); it is not Ray"
    if len(answer) < 4 or answer[3] != SETTINGS:
        return "something listens there and does not answer as Ray does; the port that Ray's head prints is mostly 6379"
    return ""


def _answer(connection: socket.socket) -> bytes:
    """Read the first bytes of what a server says to an HTTP/2 greeting; fewer than four where it hangs up."""
    connection.settimeout(ANSWER_SECONDS)
    connection.sendall(PREFACE)
    answer, end = b"", time.monotonic() + ANSWER_SECONDS
    while len(answer) < 4 and (more := connection.recv(64)):
        answer += more
        connection.settimeout(max(0.001, end - time.monotonic()))
    return answer


def _joined(address: str) -> tuple[str, list[float]]:
    """Say what kept a process from joining the cluster; empty where it joined, with the GPUs of each machine."""
    command = [sys.executable, "-P", str(Path(__file__).with_name("ray_probe.py")), address]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        return "Ray did not come to an end with it", []
    found: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):  # Ray may print lines of its own
            found |= json.loads(line)
    if "joined" in found:
        return "", found["gpus"]
    return _why_not(found, done), []


def _why_not(found: Mapping[str, Any], done: subprocess.CompletedProcess[str]) -> str:
    theirs = (found.get("ray"), found.get("python"))
    ours = (version("ray"), platform.python_version())
    if None not in theirs and theirs != ours:
        return (
            f"it runs Ray {theirs[0]} under Python {theirs[1]}, this search Ray {ours[0]} under Python {ours[1]}, and "
            f"both must be the same; `pip install ray=={ours[0]}` under Python {ours[1]} there, "
            f"or `pip install ray=={theirs[0]}` under Python {theirs[1]} here"
        )
    if done.returncode == -signal.SIGALRM and "error" not in found:
        return "it answers, but Ray could not join it in time; is this machine part of it, and is it healthy?"
    error = str(found.get("error") or done.stderr.strip().rpartition("\n")[2] or f"exit code {done.returncode}")
    return f"Ray says: {' '.join(error.split())[:600]}"
