"""A disk without room: a limit on file sizes, set at the start or in mid-run, ends in one message and harms nothing."""

from __future__ import annotations

import multiprocessing
import resource
import shutil
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from optimizer.errors import UnavailableError
from optimizer.room import require_room
from optimizer.run import open_run
from search_spaces.recipe import Recipe
from tests.optimizer.fakes import Bench
from tests.optimizer.search.test_kill import FORKS, driver

pytestmark = pytest.mark.slow  # whole studies are run

BUDGET = 8
AT_START = (40, 30_000, 1_100_000)  # bytes
IN_MID_RUN = (0, 5_000, 60_000)
LEFT_OPEN = (0, 1_000_000)


def limit(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def attempted(action: Callable[[], object]) -> str:
    """What a person is told, and "done" where nothing was in the way; any other error is the test's."""
    try:
        action()
    except UnavailableError as error:
        return str(error)
    finally:
        limit(resource.RLIM_INFINITY)
    return "done"


def after_some_trials(size: int) -> Callable[[Recipe], None]:
    calls: Iterator[int] = iter(range(BUDGET + 1))
    return lambda _: limit(size) if next(calls) == 1 else None


def finished(folder: Path) -> int:
    return int((open_run(folder).trials()["state"] == "complete").sum())


def told(folder: Path, end: Connection) -> None:
    """Try a study under every limit, each in a copy of its folder, and send (limit, what was told, trials before, and
    after)."""
    for moment, sizes in (("start", AT_START), ("mid-run", IN_MID_RUN), ("read", LEFT_OPEN), ("left open", LEFT_OPEN)):
        stored = folder / ("killed/toy" if moment in ("read", "left open") else "toy")
        for size in sizes:
            copy = shutil.copytree(stored, folder / f"{moment} {size}" / "toy")
            before = finished(stored)
            if moment == "mid-run":
                search = lambda: Bench(copy).search(trials=BUDGET, before=after_some_trials(size))  # noqa: E731, B023
                text = attempted(search)
            else:
                limit(size)
                act = open_run if moment == "read" else lambda path: Bench(path).search(trials=BUDGET)
                text = attempted(lambda: act(copy))  # noqa: B023
            end.send((moment, size, text, before, finished(copy)))
    end.send(None)


def test_under_any_limit_on_file_sizes_the_bytes_are_named_and_the_study_stays_whole(tmp_path: Path) -> None:
    Bench(tmp_path / "toy").search(trials=2)
    (tmp_path / "killed").mkdir()
    killed = driver(tmp_path / "killed", "tell.after:3")
    killed.join(60)
    ours, theirs = multiprocessing.Pipe()
    child = FORKS.Process(target=told, args=(tmp_path, theirs))
    child.start()
    theirs.close()
    results = list(iter(ours.recv, None))
    child.join(60)
    assert child.exitcode == 0
    assert len(results) == len(AT_START) + len(IN_MID_RUN) + 2 * len(LEFT_OPEN)
    for moment, size, text, before, after in results:
        may_do = moment == "read" and size > 32_768  # what SQLite shares with a reader of a log that was left
        assert text == "done" if may_do else (text.startswith("no space: ") and " bytes (File too large)" in text), text
        assert after >= before
    bench = Bench(tmp_path / "mid-run 60000" / "toy")
    bench.search(trials=BUDGET)
    assert finished(bench.folder) == BUDGET


def test_the_backup_is_whole_or_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path / "toy")
    bench.search(trials=2)
    bench.run.storage()
    before = (bench.folder / "study.db.bak").read_bytes()
    bench.search(trials=3)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UnavailableError, match="cannot be written"):
        bench_storage(bench)
    assert (bench.folder / "study.db.bak").read_bytes() == before
    assert not (bench.folder / "study.db.bak.tmp").exists()


def bench_storage(bench: Bench) -> object:
    from optimizer.runs.run_folder import RunFolder

    return RunFolder(bench.folder).storage()


def test_a_system_that_reserves_nothing_is_asked_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.posix_fallocate")  # as on macOS
    require_room(tmp_path, 1)
    with pytest.raises(UnavailableError, match=r"no space: .* needs .* \(No space left on device\)"):
        require_room(tmp_path, 1 << 60)
    assert list(tmp_path.iterdir()) == []
