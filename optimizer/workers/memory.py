"""Memory of a worker: how torch asks for it, and what a lack of it is called (how much there is, what helps)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from optimizer.errors import WorkerError

GB = 1e9
# A variable of the environment that torch reads once, as it starts: large tensors on a CPU lie in huge pages, at
# addresses that malloc finds use for again.
HUGE_PAGES = ("THP_MEM_ALLOC_ENABLE", "1")


@contextmanager
def lack_of_memory_in_words(model_bytes: int) -> Iterator[None]:
    """Turn what Python and torch raise when memory runs out into an error for a person.

    Args:
        model_bytes: of one model, as its files hold it.

    Raises:
        WorkerError: memory ran out; the model's size, what is free, and what to lower.
    """
    try:
        yield
    except Exception as error:
        if not _is_lack_of_memory(error):
            raise
        raise WorkerError(
            f"out of memory: a worker holds a model ({model_bytes / GB:.2f} GB) and what scoring it takes, "
            f"{_what_helps(error)} ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        ) from error


def _what_helps(error: Exception) -> str:
    import torch

    from evals.memory import free_bytes

    if isinstance(error, torch.OutOfMemoryError):
        return "and its GPU has no room; lower evals.token_budget, or give each worker more GPUs: workers.gpus"
    free = free_bytes(torch.device("cpu"))  # 0 where the system does not tell
    told = f"and {free / GB:.2f} GB of this machine are free" if free else "which this machine has not"
    return f"{told}; lower workers.count or evals.token_budget"


def _is_lack_of_memory(error: Exception) -> bool:
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # torch's name for it on a CPU
