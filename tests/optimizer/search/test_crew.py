"""A stage's jobs go to the workers in their order, and never two of one trial at once."""

from __future__ import annotations

from optimizer.search.crew import Crew
from optimizer.search.interrupt import Interrupt
from optimizer.workers.pool import Job, Result, ScoreJob, SensitivityJob


class Pool:
    """Two workers; `wait` ends the job that came last."""

    size = 2

    def __init__(self) -> None:
        self.out: list[Job] = []
        self.begun: list[Job] = []

    def submit(self, job: Job) -> None:
        assert job.trial not in [other.trial for other in self.out]
        self.out.append(job)
        self.begun.append(job)

    def wait(self, timeout: float) -> list[Result]:
        return [Result(self.out.pop(), answer=True)]

    def close(self) -> None:
        pass


def test_no_two_jobs_of_a_trial_are_out_together() -> None:
    jobs: list[Job] = [SensitivityJob(1, "clinical", 6), *(ScoreJob(n, "", "holdout") for n in (0, 1, 2))]
    crew = Crew(pool := Pool(), 1, lambda: None, lambda trial, why: None, Interrupt())
    assert [result.job for result, _ in crew.work_off(jobs)] == [jobs[1], jobs[3], jobs[0], jobs[2]]
    assert pool.begun == [jobs[0], jobs[1], jobs[3], jobs[2]]
