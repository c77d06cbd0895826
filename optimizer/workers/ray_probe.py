"""Joins a Ray cluster and leaves it, telling in lines of JSON how far it came: run by `ray_address` as a process.

A process, since inside Ray's own code nothing but a kill ends the waiting for a cluster that does not answer.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Mapping
from importlib import import_module

JOIN_SECONDS = 15
PATIENCE = {  # seconds, for what Ray does in turn and again
    "RAY_py_gcs_connect_timeout_s": "3",
    "RAY_gcs_server_request_timeout_seconds": "5",
}


def probe(address: str) -> None:
    """Print the versions of a cluster, and "joined" or "error"; SIGALRM ends the process where it takes too long."""
    os.environ.update(PATIENCE)
    import ray

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(JOIN_SECONDS)
    try:
        say(versions(address))
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        say({"joined": True, "gpus": [node["Resources"].get("GPU", 0.0) for node in ray.nodes() if node["Alive"]]})
    except Exception as error:
        say({"error": f"{type(error).__name__}: {error}"})


def versions(address: str) -> dict[str, str]:
    """Read a cluster's versions of Ray and Python; Ray compares them last, and may stumble over them before."""
    from ray._common.usage.usage_lib import get_cluster_metadata
    from ray._private.services import canonicalize_bootstrap_address

    client = import_module("ray._raylet").GcsClient(address=canonicalize_bootstrap_address(address))
    about = get_cluster_metadata(client) or {}
    return {name: about[f"{name}_version"] for name in ("ray", "python") if f"{name}_version" in about}


def say(found: Mapping[str, object]) -> None:
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    probe(sys.argv[1])
