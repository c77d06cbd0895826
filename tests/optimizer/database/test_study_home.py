"""A run's study: it belongs to its folder, nobody else's database is touched, and readers write nowhere."""

from __future__ import annotations

import json
import shutil
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from hashlib import sha256
from pathlib import Path

import optuna
import pytest
from optuna.trial import create_trial
from sqlalchemy.engine import make_url
from typer.testing import CliRunner, Result

from optimizer.cli import app
from optimizer.database.study_db import APPLICATION_ID
from optimizer.database.study_home import close
from optimizer.database.study_server import open_server
from optimizer.database.study_url import storage_problem
from optimizer.errors import DamagedError, RunError, UnavailableError
from optimizer.run import open_run
from optimizer.runs.manifest import read_manifest
from optimizer.runs.run_folder import RunFolder
from optimizer.study.study_file import stored_storage
from tests.optimizer.fakes import Bench
from tests.optimizer.small_study import write_study

pytestmark = pytest.mark.slow  # whole studies are run


def call(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def files(folder: Path) -> dict[str, str]:
    """Every file under a folder, by what it holds."""
    return {
        str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def place(tmp_path: Path, kind: str) -> str | None:
    return f"sqlite:///{tmp_path}/elsewhere.db" if kind == "elsewhere" else None


def started(bench: Bench) -> str:
    return next(event.text for event in bench.events if event.kind == "start")


def forget_the_name(run: Path, study_yaml: str) -> None:
    """Leave a run as an earlier version left it: tasks.json does not name the study."""
    manifest = json.loads((run / "tasks.json").read_text())
    (run / "tasks.json").write_text(json.dumps({k: v for k, v in manifest.items() if k not in ("study", "storage")}))
    (run / "study.yaml").write_text(study_yaml)


BOTH = pytest.mark.parametrize("kind", ["in the folder", "elsewhere"])


# --- the study belongs to the folder ---


@BOTH
def test_a_renamed_run_goes_on(tmp_path: Path, kind: str) -> None:
    bench = Bench(tmp_path / "toy", storage=place(tmp_path, kind))
    bench.search(trials=2)
    scored = files(bench.folder / "outcomes")
    bench.folder.rename(tmp_path / "renamed")
    again = Bench(tmp_path / "renamed", storage=bench.storage)
    again.search(trials=3)
    assert started(again) == "2 of 3 trials are finished"
    assert scored.items() <= files(again.folder / "outcomes").items()
    assert open_run(again.folder, storage=bench.storage).trials()["state"].tolist()[:3] == ["complete"] * 3


@BOTH
def test_a_copied_run_is_another_with_the_same_past(tmp_path: Path, kind: str) -> None:
    bench = Bench(tmp_path / "toy", storage=place(tmp_path, kind))
    bench.search(trials=2)
    shutil.copytree(bench.folder, tmp_path / "copy")
    copy = Bench(tmp_path / "copy", storage=bench.storage)
    copy.search(trials=4)
    assert started(copy) == "2 of 4 trials are finished"
    bench.search(trials=3)
    for folder, finished in ((bench.folder, 3), (copy.folder, 4)):
        states = open_run(folder, storage=bench.storage).trials()["state"]
        assert (states == "complete").sum() == finished
    assert len(list(bench.folder.glob("outcomes/*-search.parquet"))) == 3
    copy.events.clear()
    copy.search(trials=4)
    assert started(copy) == "4 of 4 trials are finished"


@BOTH
def test_a_run_of_an_earlier_version_goes_on_under_any_name(tmp_path: Path, kind: str) -> None:
    bench = Bench(tmp_path / "toy")
    bench.search(trials=2)
    url = place(tmp_path, kind)
    study_yaml = f"name: toy\nruns: {tmp_path}\n"
    if url is not None:
        storage = bench.run.storage()
        optuna.copy_study(from_study_name="toy", from_storage=storage, to_storage=url, to_study_name="toy")
        study_yaml += f"search: {{storage: '{url}'}}\n"
    forget_the_name(bench.folder, study_yaml)
    assert (open_run(bench.folder, storage=stored_storage(bench.folder)).trials()["state"] == "complete").sum() == 2
    bench.folder.rename(tmp_path / "renamed")
    again = Bench(tmp_path / "renamed", storage=url)
    again.search(trials=3)
    assert started(again) == "2 of 3 trials are finished"
    again.folder.rename(tmp_path / "renamed again")
    assert (open_run(tmp_path / "renamed again", storage=url).trials()["state"] == "complete").sum() == 3


def test_of_several_studies_in_a_folder_its_name_decides(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "toy")
    bench.search(trials=2)
    optuna.create_study(study_name="other", storage=bench.run.storage(), directions=["maximize", "minimize"])
    assert len(open_run(bench.folder).trials()) > 0
    forget_the_name(bench.folder, "")
    bench.folder.rename(tmp_path / "third")
    with pytest.raises(DamagedError, match=r"holds 2 studies \(toy, other\)"):
        open_run(tmp_path / "third")


# --- what is missing, damaged or changed ---


@BOTH
def test_a_missing_database_is_named_and_not_made_anew(tmp_path: Path, kind: str) -> None:
    bench = Bench(tmp_path / "toy", storage=place(tmp_path, kind))
    bench.search(trials=2)
    if bench.storage is None:
        bench.run.storage()
    database = tmp_path / "elsewhere.db" if bench.storage else bench.folder / "study.db"
    database.unlink()
    result = call("status", bench.folder, *(["--storage", bench.storage] if bench.storage else []))
    assert result.exit_code == 4
    assert f"{database} is missing" in result.stderr
    assert bench.storage or "copy study.db.bak" in result.stderr
    with pytest.raises(DamagedError, match="is missing"):
        bench.search(trials=3)
    assert not database.exists()


def test_a_study_that_is_gone_from_its_database_is_not_begun_again(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "toy", storage=place(tmp_path, "elsewhere"))
    bench.search(trials=2)
    assert bench.storage is not None
    name = read_manifest(bench.folder)["study"]
    assert isinstance(name, str)
    optuna.delete_study(study_name=name, storage=bench.storage)
    for reading in (lambda: open_run(bench.folder, storage=bench.storage), lambda: bench.search(trials=3)):
        with pytest.raises(DamagedError, match=f"does not hold the study {name}"):
            reading()


def test_a_changed_storage_is_refused_with_both_named_and_no_password(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "toy")
    bench.search(trials=2)
    for url in (f"sqlite:///{tmp_path}/other.db", "postgresql://me:s3cret@host/db?sslpassword=s4cret"):
        with pytest.raises(RunError, match=r"search\.storage: study\.db in the folder -> ") as caught:
            Bench(tmp_path / "toy", storage=url).search(trials=3)
        assert url.split("me:s3cret@")[-1].split("?")[0] in str(caught.value)
        assert "cret" not in str(caught.value)
    assert not (tmp_path / "other.db").exists()


def queued(user_attrs: dict[str, object]) -> Callable[[optuna.Study], None]:
    return lambda study: study.add_trial(create_trial(values=[0.0, 0.0], user_attrs=user_attrs))


def with_sql(text: str) -> Callable[[optuna.Study], None]:
    def change(study: optuna.Study) -> None:
        from sqlalchemy import text as sql

        with study._storage._backend.engine.begin() as connection:  # type: ignore[attr-defined]
            connection.execute(sql(text))

    return change


HOSTILE = {
    "recipe a number": queued({"recipe": 5}),
    "recipe deep": queued({"recipe": "[" * 100_000}),
    "seconds a text": queued({"seconds": "ten"}),
    "seconds a huge number": queued({"seconds": 10**400}),
    "kind a list": queued({"kind": ["base"]}),
    "reason a table": queued({"reason": {}}),
    "retry of a text": queued({"retry_of": "3"}),
    "a number of 5,000 digits": with_sql(
        f"UPDATE trial_user_attributes SET value_json = '{'9' * 5000}' WHERE key = 'seconds'"
    ),
    "no JSON": with_sql("UPDATE trial_user_attributes SET value_json = '{'"),
    "deep JSON": with_sql(f"UPDATE trial_user_attributes SET value_json = '{'[' * 100_000}'"),
    "numbers twice": with_sql("UPDATE trials SET number = 0"),
    "no objectives": with_sql("DELETE FROM trial_values"),
    "endless objectives": with_sql("UPDATE trial_values SET value = NULL, value_type = 'INF_POS'"),
    "an unknown state": with_sql("UPDATE trials SET state = 'ASLEEP'"),
    "no distribution": with_sql("UPDATE trial_params SET distribution_json = '[]'"),
    "other directions": with_sql("DELETE FROM study_directions WHERE objective = 1"),
    "a view": with_sql("CREATE VIEW photos AS SELECT 1"),
    "a trigger": with_sql("CREATE TRIGGER t AFTER INSERT ON trials BEGIN DELETE FROM trials; END"),
    "another table": with_sql("CREATE TABLE photos (name)"),
    "a version from elsewhere": with_sql("UPDATE alembic_version SET version_num = 'v99'"),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    bench = Bench(tmp_path_factory.mktemp("small") / "toy")
    bench.search(trials=2)
    return bench.folder


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_crafted_study_is_refused_and_left_as_it_is(small: Path, tmp_path: Path, kind: str) -> None:
    bench = Bench(shutil.copytree(small, tmp_path / "toy"))
    storage = bench.run.storage()
    HOSTILE[kind](optuna.load_study(study_name=None, storage=storage))
    close(storage)
    before = files(bench.folder)
    result = call("status", bench.folder)
    assert result.exit_code == 4, result.output
    assert result.stderr.startswith(f"error: {bench.folder}/study.db ")
    with pytest.raises(DamagedError, match="left as it is"):
        bench.search(trials=3)
    changed = {name for name, digest in files(bench.folder).items() if before.get(name) != digest}
    assert changed <= {"lock", "tasks.json", "study.yaml"}
    assert "Traceback" not in result.output


# --- nobody else's database is touched ---


def another_programs(path: Path, kind: str) -> Path:
    if kind == "Optuna's own":
        study = optuna.create_study(study_name="mine", storage=f"sqlite:///{path}", directions=["minimize"])
        study.tell(study.ask(), 1.0)
        return path
    with closing(sqlite3.connect(path)) as database:
        if kind == "in WAL mode":
            database.execute("PRAGMA journal_mode=WAL")
        if kind == "with its mark":
            database.execute("PRAGMA application_id=7")
        else:
            database.execute("CREATE TABLE photos (name)")
        database.commit()
    if kind == "cut off":
        path.write_bytes(path.read_bytes()[:5000])
    return path


STRANGERS = ["with tables", "in WAL mode", "with its mark", "Optuna's own", "cut off"]


@pytest.mark.parametrize("kind", STRANGERS)
def test_another_programs_database_is_written_by_no_reader_and_no_search(
    small: Path, tmp_path: Path, kind: str
) -> None:
    other = another_programs(tmp_path / "photos.db", kind)
    run = shutil.copytree(small, tmp_path / "run")
    forget_the_name(run, f"name: toy\nsearch: {{storage: 'sqlite:///{other}'}}\n")
    (run / "study.db").unlink()
    shutil.rmtree(run / "outcomes")
    before = files(tmp_path)
    for command in ("status", "front", "report"):
        result = call(command, run)
        assert result.exit_code == 4, result.output
        assert f"{other} " in result.stderr
        assert "left as it is" in result.stderr
    assert files(tmp_path) == before
    with pytest.raises(DamagedError, match="left as it is"):
        Bench(tmp_path / "toy", storage=f"sqlite:///{other}").search(trials=2)
    assert {name: digest for name, digest in files(tmp_path).items() if name in before} == before
    assert sorted(path.name for path in tmp_path.glob("photos*")) == ["photos.db"]


def test_a_search_looks_at_its_database_before_anything_is_made(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    other = another_programs(tmp_path / "photos.db", "with tables")
    before = files(tmp_path)
    for command, code in (("search", 4), ("check", 2)):
        result = call(command, study, "--set", f"search.storage=sqlite:///{other}")
        assert result.exit_code == code, result.output
        assert "photos.db was not made by mergefront" in "".join(result.output.split("\n"))
    assert files(tmp_path) == before
    assert not (tmp_path / "runs").exists()


def test_runs_may_share_a_database_of_ours(tmp_path: Path) -> None:
    url = place(tmp_path, "elsewhere")
    benches = [Bench(tmp_path / folder / "toy", storage=url) for folder in ("one", "other")]
    for bench in benches:
        bench.search(trials=2)
        assert started(bench) == "2 trials"
    for bench in benches:
        assert (open_run(bench.folder, storage=url).trials()["state"] == "complete").sum() == 2
    with closing(sqlite3.connect(tmp_path / "elsewhere.db")) as database:
        assert database.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)


def test_a_study_that_somebody_adds_beside_ours_is_neither_in_the_way_nor_taken_for_ours(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "toy", storage=place(tmp_path, "elsewhere"))
    bench.search(trials=2)
    other = optuna.create_study(study_name="mine", storage=bench.storage, directions=["maximize", "minimize"])
    other.tell(other.ask(), [1.0, 2.0])
    with closing(sqlite3.connect(tmp_path / "elsewhere.db")) as database:
        database.execute("PRAGMA application_id=0")
    bench.events.clear()
    bench.search(trials=3)
    assert started(bench) == "2 of 3 trials are finished"
    manifest = json.loads((bench.folder / "tasks.json").read_text())
    (bench.folder / "tasks.json").write_text(json.dumps(manifest | {"study": "mine"}))
    for reading in (lambda: open_run(bench.folder, storage=bench.storage), lambda: bench.search(trials=4)):
        with pytest.raises(DamagedError, match="holds the study 'mine'"):
            reading()
    assert len(other.trials) == 1


@pytest.mark.parametrize("kind", ["a folder", "empty", "text", "zeroed", "half", "garbled"])
def test_a_file_that_is_no_study_exits_with_4_and_is_left_as_it_is(small: Path, tmp_path: Path, kind: str) -> None:
    run = shutil.copytree(small, tmp_path / "toy")
    database, whole = run / "study.db", (small / "study.db").read_bytes()
    (run / "study.db.bak").write_bytes(whole)
    contents = {
        "empty": b"",
        "text": b"not a database at all",
        "zeroed": bytes(100) + whole[100:],
        "half": whole[: len(whole) // 2],
        "garbled": whole[:8192] + b"\xa5" * 16384 + whole[24576:],
    }
    if kind == "a folder":
        database.unlink()
        database.mkdir()
    else:
        database.write_bytes(contents[kind])
    before = files(run)
    result = call("status", run)
    assert result.exit_code == 4, result.output
    assert str(database) in result.stderr
    assert "left as it is" in result.stderr
    assert kind == "empty" or "restore the copy study.db.bak" in result.stderr
    with pytest.raises(DamagedError, match="left as it is"):
        Bench(run).search(trials=3)
    assert {name: digest for name, digest in files(run).items() if name in before} == before


def test_a_database_left_in_mid_commit_can_be_read_and_written(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "toy", storage=place(tmp_path, "elsewhere"))
    bench.search(trials=2)
    database, twin = tmp_path / "elsewhere.db", tmp_path / "twin.db"
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")
        connection.execute("PRAGMA cache_size=1")
        connection.execute("UPDATE trial_user_attributes SET value_json = value_json || printf('%.9999c', ' ')")
        journal = Path(f"{database}-journal")
        left = {path: path.read_bytes() for path in (database, journal)}
        connection.rollback()
    for path, content in left.items():
        path.write_bytes(content)
    assert not twin.exists()
    assert (open_run(bench.folder, storage=bench.storage).trials()["state"] == "complete").sum() == 2
    assert journal.exists()
    bench.events.clear()
    bench.search(trials=3)
    assert started(bench) == "2 of 3 trials are finished"


# --- URLs ---

BAD_URLS = [
    "",
    "foo",
    "nosuch://host/db",
    "postgres://me@host/db",
    "postgresql://host:port/db",
    "sqlite://",
    "sqlite:///:memory:",
    "sqlite:///file:/x.db?uri=true",
    "sqlite:////x.db?mode=ro",
    "sqlite:////x.db?timeout=soon",
    "sqlite://host/x.db",
    "sqlite+aiosqlite:////x.db",
    "sqlite:////x\0.db",
]


@pytest.mark.parametrize("url", BAD_URLS)
def test_a_url_that_cannot_be_meant_is_refused(small: Path, url: str) -> None:
    assert storage_problem(url)
    with pytest.raises(RunError, match=r"^search\.storage: "):
        open_run(small, storage=url)


def test_check_names_a_bad_url(tmp_path: Path) -> None:
    result = call("check", write_study(tmp_path), "--set", "search.storage='sqlite:///:memory:'")
    assert result.exit_code == 2
    assert "search.storage: a SQLite URL must name a file" in result.stderr


def test_a_relative_file_is_the_same_from_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from optimizer.study.study_file import dump_study, read_study

    study = write_study(tmp_path)
    monkeypatch.chdir(tmp_path)
    text = dump_study(read_study(study, ["search.storage=sqlite:///x.db?timeout=5"]))
    assert f"storage: sqlite:///{tmp_path}/x.db?timeout=5" in text


def test_a_missing_driver_is_named_with_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    with pytest.raises(RunError, match=r"needs the driver psycopg2.*`pip install psycopg2-binary") as caught:
        Bench(tmp_path / "toy", storage="postgresql+psycopg2://me:s3cret@host/db").search(trials=2)
    assert "s3cret" not in str(caught.value)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=f"the folder {tmp_path}/none does not exist"):
        Bench(tmp_path / "toy", storage=f"sqlite:///{tmp_path}/none/x.db").search(trials=2)


# --- servers, with SQLite in their place ---


def test_a_server_is_looked_at_before_it_is_written(tmp_path: Path) -> None:
    other = another_programs(tmp_path / "other.db", "with tables")
    empty = make_url(f"sqlite:///{tmp_path}/empty.db")
    with closing(sqlite3.connect(tmp_path / "empty.db")) as database:
        database.execute("PRAGMA user_version=1")
    before = files(tmp_path)
    for write in (False, True):
        with pytest.raises(DamagedError, match="holds the table 'photos'"):
            open_server(make_url(f"sqlite:///{other}"), write=write)
    with pytest.raises(DamagedError, match="holds no study"):
        open_server(empty, write=False)
    assert files(tmp_path) == before
    storage = open_server(empty, write=True)
    optuna.create_study(study_name="one", storage=storage)
    assert optuna.get_all_study_names(open_server(empty, write=False)) == ["one"]


def test_a_server_that_does_not_answer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="does not answer"):
        open_server(make_url(f"sqlite:///{tmp_path}/none/x.db"), write=True)


# --- reading ---


def test_a_reader_of_a_run_elsewhere_writes_nowhere(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "toy", storage=place(tmp_path, "elsewhere"))
    bench.search(trials=2)
    before = files(tmp_path)
    assert call("status", bench.folder, "--storage", str(bench.storage)).exit_code == 0
    assert files(tmp_path) == before
    result = call("status", bench.folder)
    assert result.exit_code == 2
    assert f"at sqlite:///{tmp_path}/elsewhere.db" in result.stderr


def test_a_search_that_has_not_begun_is_no_damage(tmp_path: Path) -> None:
    run = Bench(tmp_path / "toy").run
    result = call("status", run.path)
    assert result.exit_code == 0
    assert "No finished trial yet" in result.stdout
    assert RunFolder(run.path).database.exists()
