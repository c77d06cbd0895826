"""The crew of a search: the pool with second chances, unchanged checkpoints, and a person's wish to stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from optimizer.errors import CheckpointError, SearchError
from optimizer.search.interrupt import Interrupt
from optimizer.workers.pool import Job, Pool, Result

POLL_SECONDS = 1.0


@dataclass(slots=True)
class OpenJob:
    """A job that is out with the pool."""

    job: Job
    started: float  # monotonic seconds
    attempts: int = 1


@dataclass(slots=True)
class Crew:
    """The pool with second chances: a job whose worker died goes to another worker, up to `max_attempts` times.

    Args:
        require_unchanged: raises CheckpointError where a checkpoint's file is not as it was.
        retried: is told of a trial that gets another attempt, and why.
    """

    pool: Pool
    max_attempts: int
    require_unchanged: Callable[[], None]
    retried: Callable[[int, str], None]
    interrupt: Interrupt
    out: dict[int, OpenJob] = field(default_factory=dict)

    @property
    def takes_jobs(self) -> bool:
        """Whether a worker is free and nobody asked to stop."""
        return len(self.out) < self.pool.size and self.interrupt.since is None

    @property
    def jobs(self) -> list[Job]:
        """The jobs that are out."""
        return [entry.job for entry in self.out.values()]

    def submit(self, job: Job) -> None:
        """Give a worker a job."""
        self.out[job.trial] = OpenJob(job, time.monotonic())
        self.pool.submit(job)

    def wait(self) -> list[tuple[Result, float]]:
        """Give the final results so far, and the seconds each took.

        Raises:
            SearchError: a checkpoint's file changed: no result can be trusted, and another attempt would die too.
            KeyboardInterrupt: the jobs took too long to end after a person asked to stop.
        """
        if self.interrupt.overdue:
            raise KeyboardInterrupt
        final = []
        results = self.pool.wait(POLL_SECONDS)
        self._require_sources(results)
        for result in results:
            entry = self.out[result.job.trial]
            if result.died and entry.attempts < self.max_attempts:
                self.retried(result.job.trial, f"attempt {entry.attempts} of {self.max_attempts}: {result.error}")
                entry.attempts += 1
                self.pool.submit(result.job)
            else:
                del self.out[result.job.trial]
                final.append((result, time.monotonic() - entry.started))
        return final

    def work_off(self, jobs: Iterable[Job]) -> Iterator[tuple[Result, float]]:
        """Yield the final results of a stage whose jobs are all known, and the seconds each took.

        Jobs go out in their order, but for one of a trial that another job is out for.

        Raises:
            SearchError, KeyboardInterrupt: as of `wait`; KeyboardInterrupt also where a person asked to stop.
        """
        waiting = list(jobs)
        while waiting or self.out:
            while self.takes_jobs and (job := next((job for job in waiting if job.trial not in self.out), None)):
                waiting.remove(job)
                self.submit(job)
            if not self.out:
                break
            yield from self.wait()
        self.end()

    def end(self) -> None:
        """End a stage in which no job is out.

        Raises:
            KeyboardInterrupt: a person asked to stop.
        """
        if self.interrupt.since is not None:
            raise KeyboardInterrupt

    def _require_sources(self, results: Sequence[Result]) -> None:
        try:
            if results:
                self.require_unchanged()
            for result in results:  # a worker of another machine may have other files than this one
                if result.sources_changed:
                    raise CheckpointError(result.error)
        except CheckpointError as error:
            raise SearchError(
                f"every trial needs the checkpoints as they were when the search started: {error}\n"
                "The trials in hand are not counted; start the search again and they are run again"
            ) from error
