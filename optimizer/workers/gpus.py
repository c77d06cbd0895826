"""How many GPUs each worker has: what a study asks for, held against what the machine or the cluster has."""

from __future__ import annotations

import math
from collections.abc import Sequence

from optimizer.errors import WorkerError
from optimizer.workers.ray_address import require_cluster


def share_of(gpus: float) -> float:
    """Return what Ray is asked for: a whole number, or exactly one nth of a GPU for what a person wrote as 0.33."""
    return gpus if gpus >= 1 else 1.0 / round(1.0 / gpus)


def gpu_share(count: int, gpus: float) -> float:
    """Return the part of a GPU each worker takes so that all fit: whole ones, or 1/n where n workers share one."""
    return 1.0 / math.ceil(count / gpus) if gpus >= 1 else 0.0


def require_gpus(gpus: float, count: int, address: str | None) -> None:
    """Make sure, before a search, that workers find the GPUs they are to have.

    Args:
        gpus: for each worker.
        count: workers; 0 is this process.
        address: of a Ray cluster, which is joined to ask; None: this machine.

    Raises:
        WorkerError: there are too few, or no cluster can be joined.
    """
    if address is None:
        from optimizer.checkpoints.devices import gpus_seen  # brings torch

        require_among(gpus, count, [gpus_seen()], joins=False)
    else:
        require_among(gpus, count, require_cluster(address), joins=True)


def require_among(gpus: float, count: int, machines: Sequence[float], *, joins: bool) -> None:
    """Raise WorkerError where machines with so many GPUs each have too few.

    Args:
        joins: whether they are a cluster's, which may grow: then room for one worker is enough.
    """
    workers, each = max(1, count), share_of(gpus)
    room = sum(int(have / each + 1e-6) for have in machines)
    most = f"{max(machines, default=0):g}"
    where = f"the largest machine of the cluster has {most}" if joins else f"this machine has {most}"
    if not room:
        raise WorkerError(f"must be at most the GPUs of one machine; given {gpus:g}, and {where}; lower workers.gpus")
    if room < workers and not joins:
        wanted = f"{gpus:g} for each of {workers} workers, which is {math.ceil(workers * each - 1e-6)} GPUs"
        raise WorkerError(f"given {wanted}, and {where}; lower workers.count to {room}, or workers.gpus")
