"""A study on PostgreSQL, where its programs are on this machine: the whole life, and drivers killed on the way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.kill_loop import faults, loop
from optimizer.run import open_run
from tests.optimizer.fakes import Bench
from tests.optimizer.small_study import write_study
from tests.postgres import postgres, programs

pytest.importorskip("psycopg", reason="the extra postgres is not installed")
pytestmark = [
    pytest.mark.slow,  # a server is started, whole studies are run
    pytest.mark.skipif(programs() is None, reason="PostgreSQL is not installed"),
]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with postgres() as url:
        yield url


def test_a_study_is_the_same_as_in_its_folder_also_where_it_was_taken_up_again(tmp_path: Path, server: str) -> None:
    local, there = Bench(tmp_path / "local"), Bench(tmp_path / "there", storage=server)
    for bench in (local, there):
        bench.search(trials=9)
    first = open_run(there.folder, storage=server)
    assert len(first.points()) == 9
    for bench in (local, there):
        bench.search(trials=14)
    ours, theirs = open_run(local.folder), open_run(there.folder, storage=server)
    for frame in ("points", "front", "anchors"):
        pd.testing.assert_frame_equal(getattr(ours, frame)(), getattr(theirs, frame)())
    assert not (there.folder / "study.db").exists()
    assert all(ours.recipe(trial) == theirs.recipe(trial) for trial in ours.points().index)


def test_studies_share_a_database_by_their_names(tmp_path: Path, server: str) -> None:
    one, other = (Bench(tmp_path / name, storage=server) for name in ("one", "other"))
    one.search(trials=6)
    other.search(trials=7)
    counts = [len(open_run(bench.folder, storage=server).points()) for bench in (one, other)]
    assert counts == [6, 7]


def test_drivers_killed_at_random_moments_lose_and_double_nothing(tmp_path: Path, server: str) -> None:
    study = write_study(tmp_path)
    loop(study, kills=3, seed=0, workers=0, trials=14, storage=server)
    assert list(faults(study, trials=14, storage=server)) == []
