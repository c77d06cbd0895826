"""One small study and a worker of it, for what workers learn and derive."""

from __future__ import annotations

import pytest

from optimizer.run_study import worker_spec
from optimizer.study.schema import Study
from optimizer.study.study_file import read_study
from optimizer.workers.worker import Worker
from tests.optimizer.small_study import write_study


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return read_study(write_study(tmp_path_factory.mktemp("taught"), items=10))


@pytest.fixture(scope="session")
def worker(study: Study) -> Worker:
    return Worker(worker_spec(study))
