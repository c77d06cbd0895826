"""Who scores, learns and derives: jobs go into a pool, results come out. `SerialPool` is the pool in this process.

The search submits jobs and collects results; a pool never retries. A worker that dies or runs too long is replaced,
and its job comes back as `died`, for the search to give to another worker.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from optimizer.runs.sensitivities import Sensitivities
from optimizer.workers.orders import Derivation, Learned, Lesson

if TYPE_CHECKING:
    from optimizer.workers.worker import Evaluation


Only = Mapping[str, Sequence[str]]  # item hashes by task


class WorkerLike(Protocol):
    """What a pool needs of a worker."""

    def evaluate(self, recipe: str, suite: str, only: Only | None) -> Evaluation: ...

    def learn(self, lesson: Lesson) -> Learned: ...

    def derive(self, path: Derivation) -> list[Path]: ...

    def sensitivities(self, expert: str, *, items: int) -> Sensitivities: ...


MakeWorker = Callable[[], WorkerLike]


class Job(Protocol):
    """What a worker does for one trial."""

    @property
    def trial(self) -> int: ...

    @property
    def length(self) -> float:
        """How much longer than scoring a recipe it may take, a factor."""

    def work(self, worker: WorkerLike) -> Any:
        """Have a worker do it."""


@dataclass(frozen=True, slots=True)
class ScoreJob:
    """One recipe (JSON) to score on one suite; the answer is an Evaluation.

    Args:
        only: of these tasks only these items, by hash; None: all.
    """

    trial: int
    recipe: str
    suite: str
    only: Only | None = None
    length = 1.0

    def work(self, worker: WorkerLike) -> Evaluation:
        return worker.evaluate(self.recipe, self.suite, self.only)


@dataclass(frozen=True, slots=True)
class LearnJob:
    """Weights to learn; the answer is Learned."""

    trial: int
    lesson: Lesson

    @property
    def length(self) -> float:
        return 4.0 + 2.0 * self.lesson.steps

    def work(self, worker: WorkerLike) -> Learned:
        return worker.learn(self.lesson)


@dataclass(frozen=True, slots=True)
class DeriveJob:
    """Derived experts to make; the answer is their folders."""

    trial: int
    path: Derivation
    length = 20.0

    def work(self, worker: WorkerLike) -> list[Path]:
        return worker.derive(self.path)


@dataclass(frozen=True, slots=True)
class SensitivityJob:
    """An expert's sensitivities on some items of each task; the trial is the expert's, the answer Sensitivities."""

    trial: int
    expert: str
    items: int
    length = 40.0

    def work(self, worker: WorkerLike) -> Sensitivities:
        return worker.sensitivities(self.expert, items=self.items)


@dataclass(frozen=True, slots=True)
class Result:
    """How a job ended: with an answer, or with an error.

    Args:
        answer: what the job says; None where there is an error.
        died: the worker, not the recipe, may be to blame.
        sources_changed: a checkpoint's file is not the one that was opened: no recipe can be scored as before.
    """

    job: Job
    answer: Any
    error: str = ""
    died: bool = False
    sources_changed: bool = False


class Pool(Protocol):
    """Workers that take jobs; used by one thread."""

    @property
    def size(self) -> int: ...

    def submit(self, job: Job) -> None: ...

    def wait(self, timeout: float) -> list[Result]:
        """Return results that are there within `timeout` seconds; as soon as there is one."""

    def close(self, *, kill: bool = False) -> None: ...


class Closing:
    """Lets a pool be used in a `with` statement."""

    def close(self, *, kill: bool = False) -> None:
        raise NotImplementedError

    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(kill=kind is not None)


class SerialPool(Closing):
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
            return [Result(job, job.work(self._worker))]
        except Exception as error:
            return [Failure.of(error).ends(job)]

    def close(self, *, kill: bool = False) -> None:
        self._jobs.clear()


def describe(error: BaseException) -> str:
    """Write an error in one line: our own messages stand for themselves, others need their kind."""
    from evals.errors import TaskError
    from optimizer.errors import MergefrontError

    text = " ".join(str(error).split())
    return text if isinstance(error, MergefrontError | TaskError) and text else f"{type(error).__name__}: {text}"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a job has no answer, in plain types: an exception of another process may not unpickle here."""

    error: str
    sources_changed: bool

    @classmethod
    def of(cls, error: Exception) -> Failure:
        from optimizer.errors import CheckpointError

        return cls(describe(error), isinstance(error, CheckpointError))  # all that a built worker has open is sources

    def ends(self, job: Job) -> Result:
        """Return the result of a job that failed so."""
        return Result(job, None, self.error, sources_changed=self.sources_changed)
