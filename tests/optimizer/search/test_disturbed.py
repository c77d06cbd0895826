"""Searches among other programs, wrong clocks, odd names, planted secrets and crafted studies."""

from __future__ import annotations

import ast
import ctypes
import json
import multiprocessing
import os
import pickle
import shutil
import sqlite3
import tempfile
import threading
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from typer.testing import CliRunner, Result

from optimizer.cli import app
from optimizer.database.study_home import close
from optimizer.errors import MergeError, RunError, SearchError, UnavailableError
from optimizer.run import open_run
from optimizer.workers.pool import Only, SerialPool
from optimizer.workers.worker import Evaluation
from search_spaces.recipe import Recipe
from tests.conftest import ROOT
from tests.optimizer.fakes import Bench, FakeWorker, is_anchor
from tests.optimizer.small_study import write_study

pytestmark = pytest.mark.slow  # whole studies are run

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.optimizer.fakes", "optimizer.run"])


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "toy")


def call(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def finished(bench: Bench) -> dict[int, list[float]]:
    with optuna_study(bench) as study:
        return {t.number: t.values for t in study.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE}


class optuna_study:
    """The study of a bench, its connections closed in the end."""

    def __init__(self, bench: Bench) -> None:
        self._storage = bench.run.storage(bench.storage)

    def __enter__(self) -> optuna.Study:
        return optuna.load_study(study_name=None, storage=self._storage)

    def __exit__(self, *_: object) -> None:
        close(self._storage)


# --- another program has the database ---


@dataclass
class Stranger:
    """Locks a database when the first searched recipe is scored, for so many seconds or until it is told to go."""

    database: Path
    seconds: float | None
    connection: sqlite3.Connection | None = None

    def __call__(self, recipe: Recipe) -> None:
        if self.connection is None and not is_anchor(recipe):
            self.connection = sqlite3.connect(self.database, check_same_thread=False, timeout=60)
            self.connection.execute("BEGIN EXCLUSIVE")
            if self.seconds is not None:
                threading.Timer(self.seconds, self.go).start()

    def go(self) -> None:
        assert self.connection is not None
        self.connection.rollback()
        self.connection.close()


def test_a_database_that_is_locked_for_a_moment_is_waited_for(bench: Bench) -> None:
    stranger = Stranger(bench.folder / "study.db", 0.5)
    bench.search(trials=12, before=stranger)
    assert stranger.connection is not None
    assert len(finished(bench)) == 12


def test_a_database_that_stays_locked_is_named_and_nothing_scored_is_lost(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "toy", storage=f"sqlite:///{tmp_path}/elsewhere.db?timeout=0.3")
    stranger = Stranger(tmp_path / "elsewhere.db", None)
    with pytest.raises(UnavailableError, match=r"elsewhere\.db .*locked") as caught:
        bench.search(trials=12, before=stranger)
    assert "maximum length" not in str(caught.value)
    stranger.go()
    scored = {path.name: path.stat().st_mtime_ns for path in bench.folder.glob("outcomes/*")}
    bench.search(trials=12)
    assert len(finished(bench)) == 12
    assert scored.items() <= {path.name: path.stat().st_mtime_ns for path in bench.folder.glob("outcomes/*")}.items()


# --- what a search does not depend on ---


def test_a_clock_that_jumps_back_changes_nothing(bench: Bench, tmp_path: Path) -> None:
    bench.search(trials=10)
    with closing(sqlite3.connect(bench.folder / "study.db")) as database:
        for column in ("datetime_start", "datetime_complete"):
            database.execute(f"UPDATE trials SET {column} = datetime({column}, '-1 hour') WHERE number >= 5")
        database.commit()
    bench.search(trials=12)
    even = Bench(tmp_path / "even" / "toy")
    even.search(trials=10)
    even.search(trials=12)
    assert finished(bench) == finished(even)
    assert open_run(bench.folder).front().equals(open_run(even.folder).front())


@dataclass
class Coarse(FakeWorker):
    """Scores all searched recipes alike, better than any anchor."""

    def evaluate(self, recipe: str, suite: str, only: Only | None = None) -> Evaluation:
        exact = super().evaluate(recipe, suite, only)
        if is_anchor(Recipe.from_json(recipe)):
            return exact
        alike = [replace(row, value={"skill_clinical": 0.75, "general": 0.88}[row.task]) for row in exact.outcomes]
        return replace(exact, outcomes=tuple(alike))


def test_equal_points_are_all_on_the_front_and_keep_their_order(bench: Bench) -> None:
    bench.search(trials=20, pool=SerialPool(Coarse))
    run = open_run(bench.folder)
    front, points = run.front(), run.points()
    searched = points.index[points["kind"] == "search"]
    assert len(searched) > 5
    assert list(front.index[front.index.isin(searched)]) == list(searched)


NAME = "ünïcode-名前-\u202eعربي🙂 a'b\"c?d%20{e}#f\n-rf ..;$(x) " + "n" * 120


def test_a_folder_may_have_any_name(tmp_path: Path) -> None:
    for name in (NAME, "-rf", "CON", "nul.db"):
        bench = Bench(tmp_path / name / "toy")
        bench.search(trials=10)
        run = open_run(bench.folder)
        assert len(run.points()) == 10
        for verb in ("status", "front", "report"):
            result = call(verb, bench.folder)
            assert result.exit_code == 0, result.output
            assert "\u202e" not in result.output
    assert len(list(tmp_path.iterdir())) == 4


# --- secrets, code, rights ---


def test_planted_secrets_are_in_no_file_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token, password = "hf_" + "Q" * 34, "s3cr3t-Passw0rd"
    study = write_study(tmp_path)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, token)
    monkeypatch.setenv("SECRET_URL", f"postgresql://me:{password}@host/db")
    result = call("search", study)
    assert result.exit_code == 0, result.output
    run = tmp_path / "runs" / "small"
    assert call("export", run, "--knee").exit_code == 0
    found = [path for path in run.rglob("*") if path.is_file()]
    assert len(found) > 15
    for path in found:
        assert token.encode() not in path.read_bytes(), path
        assert password.encode() not in path.read_bytes(), path
    assert token not in result.output


@dataclass
class Payload:
    marker: str

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("sampler", ["random", "tpe", "nsga2", "cmaes"])
def test_pickles_in_a_study_are_never_opened(bench: Bench, tmp_path: Path, sampler: str) -> None:
    bench.search(trials=10)
    marker = tmp_path / "marker"
    payload = pickle.dumps(Payload(str(marker)))
    with optuna_study(bench) as study:
        trial = study.ask()
        for key in ("cma:optimizer", "cma:optimizer:0", "nsga2:population", "sampler"):
            study._storage.set_trial_system_attr(trial._trial_id, key, payload.hex())
            study._storage.set_study_system_attr(study._study_id, key, payload.hex())
            trial.set_user_attr(key, payload.hex())
    open_run(bench.folder).summary()
    bench.search(trials=12, sampler=sampler)
    assert not marker.exists()
    pickle.loads(payload)
    assert marker.exists()  # the payload works


def _heeding_modes(folder: Path, answer: Path) -> None:
    """Look at a run and try to write to it, as a process that a folder's mode binds: root without the right to pass."""
    libc, header, rights = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, rights) == 0
    rights[0] &= ~0b1110  # effective: CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER
    assert libc.capset(header, rights) == 0
    said = []
    for act in (lambda: Bench(folder).run, lambda: open_run(folder).summary()):
        try:
            said.append(str(act()))
        except RunError as error:
            said.append(f"refused: {error}")
    answer.write_text(json.dumps(said))


def test_a_folder_that_may_not_be_written_can_be_read() -> None:
    parent = Path(tempfile.mkdtemp())
    try:
        (parent / "answers").mkdir()
        bench = Bench(parent / "toy")
        bench.search(trials=10)
        for path in (bench.folder, *bench.folder.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        child = FORKS.Process(target=_heeding_modes, args=(bench.folder, parent / "answers" / "said"))
        child.start()
        child.join(60)
        refused, read = json.loads((parent / "answers" / "said").read_text())
        assert refused.startswith(f"refused: a search must write to {bench.folder}: ")
        assert "10 of 1" in read
    finally:
        for path in (parent / "toy").rglob("*"):
            path.chmod(0o755)
        (parent / "toy").chmod(0o755)
        shutil.rmtree(parent)


def test_no_process_of_ours_is_forked() -> None:
    """A fork after torch has run threads hangs, so that processes are started anew: subprocess, and Ray's own."""
    sources = [path for package in ("optimizer", "evals", "search_spaces") for path in (ROOT / package).rglob("*.py")]
    assert len(sources) > 50
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += (
                [f"{node.value.id}.{node.attr}"]
                if (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name))
                else []
            )
            assert not {"multiprocessing", "os.fork", "pty", "pickle", "marshal", "shelve"} & set(names), path


# --- little or nothing finished ---


def test_more_failures_than_successes_at_the_start_stop_the_search(bench: Bench) -> None:
    asked: list[Recipe] = []

    def two_of_three(recipe: Recipe) -> None:
        if not is_anchor(recipe):
            asked.append(recipe)
            if len(asked) % 3:
                raise MergeError("nonfinite: tensor x" if len(asked) % 2 else "nonfinite: tensor y")

    bench.search(trials=9)
    with pytest.raises(SearchError, match=r"^11 of the first 16 trials failed, 6 of them so: nonfinite: tensor y\n"):
        bench.search(trials=60, before=two_of_three)
    bench.search(trials=30)
    assert bench.events[-1].text.startswith("30 trials finished")


def test_a_run_without_a_finished_trial_is_shown_with_exit_code_0(bench: Bench) -> None:
    folder = bench.run.path
    for words in (("status",), ("status", "--json"), ("front",), ("front", "--json"), ("report",)):
        result = call(words[0], folder, *words[1:])
        assert result.exit_code == 0, result.output
    assert json.loads(call("front", folder, "--json").stdout)["points"] == []
    assert json.loads((folder / "front.json").read_text())["points"] == []
    assert "<html" in (folder / "report.html").read_text()
