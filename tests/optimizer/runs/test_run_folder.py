"""The run folder: made whole, one writer, nothing of another study, no secret, no harm to a stranger's file."""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evals.errors import TaskError
from evals.outcomes import OUTCOME_COLUMNS, Outcome, TaskInfo
from evals.score_table import table_of
from evals.statistics import f1
from optimizer.database.study_home import close
from optimizer.errors import RunError
from optimizer.masking import redacted
from optimizer.run import open_run
from optimizer.runs.atomic_file import write_atomically
from optimizer.runs.outcome_files import FRAME_COLUMNS, LATER_COLUMNS, joined_frame, outcomes_of, sound_outcomes
from optimizer.runs.run_folder import RunFolder, is_locked
from search_spaces.recipe import Recipe, Setting
from tests.toy_run import toy_run

pytestmark = pytest.mark.slow  # whole studies are run

TASKS = (
    TaskInfo("notes", "domain", "", "multiple_choice", "acc", True, 0.25, 8, 8),
    TaskInfo("science", "general", "", "multiple_choice", "acc", True, 0.25, 8, 8),
)
FINGERPRINT = {"base": "abc", "evals": {"dtype": "bf16", "seed": 0}, "items": {"search": {"notes": ["a" * 16] * 40}}}
OUTCOMES = [
    Outcome("notes", "search", f"{i:016x}", float(i % 2), 1.0, (-0.5, -1.25), i == 3) for i in range(5)
]  # fmt: skip


def made(path: Path, **changes: object) -> RunFolder:
    return RunFolder.create_or_resume(path, "name: toy\n", {**FINGERPRINT, **changes}, tasks=TASKS)


def test_creates_once_then_resumes(tmp_path: Path) -> None:
    run = made(tmp_path / "runs" / "toy")
    (run.path / "keep").write_text("kept")
    again = RunFolder.create_or_resume(run.path, "name: more trials\n", FINGERPRINT, tasks=TASKS)
    assert (again.path / "keep").read_text() == "kept"
    assert (again.path / "study.yaml").read_text() == "name: more trials\n"
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["toy"]


def test_a_failed_creation_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(RunError, match="No space left"):
        made(tmp_path / "toy")
    assert list(tmp_path.iterdir()) == []


def test_a_changed_study_is_refused_naming_each_key(tmp_path: Path) -> None:
    made(tmp_path / "toy")
    changes = {"evals": {"dtype": "float32", "seed": 0}, "items": {"search": {"notes": ["b" * 16] * 39}}, "extra": 1}
    with pytest.raises(RunError) as caught:
        made(tmp_path / "toy", **changes)
    message = str(caught.value)
    assert "evals.dtype: bf16 -> float32" in message
    assert "task notes: other items in the search suite (40 -> 39)" in message
    assert "extra: (absent) -> 1" in message
    assert "evals.seed" not in message


STORED = """\
name: toy
models: {base: /models/base, experts: {law: /models/law}}
space: {shape: uniform}
evals: {seed: 0}
"""


def test_a_changed_model_is_named_by_its_path_and_not_by_a_digest(tmp_path: Path) -> None:
    tasks, prints = TASKS, {"base": "0123456789abcdef", "experts": {"law": "aaaabbbbccccdddd"}, "space": {"p": "x"}}
    RunFolder.create_or_resume(tmp_path / "toy", STORED, prints, tasks=tasks)
    other = {"base": "fedcba9876543210", "experts": {"law": "ddddccccbbbbaaaa"}, "space": {"p": "y"}}
    given = STORED.replace("/models/law", "/models/tax").replace("uniform", "slope")
    with pytest.raises(RunError) as caught:
        RunFolder.create_or_resume(tmp_path / "toy", given, other, tasks=tasks)
    message = str(caught.value)
    assert "models.base: the files of /models/base have changed" in message
    assert "models.experts.law: /models/law -> /models/tax, another model" in message
    assert "space.shape: uniform -> slope" in message
    assert not any(digest in message for digest in ("0123456789abcdef", "ddddccccbbbbaaaa"))


def test_a_setting_that_chooses_the_items_is_named_once(tmp_path: Path) -> None:
    def with_items(letter: str) -> dict[str, object]:
        return {"items": {suite: {task.name: [letter * 16] for task in TASKS} for suite in ("search", "holdout")}}

    RunFolder.create_or_resume(tmp_path / "toy", STORED, with_items("a"), tasks=TASKS)
    with pytest.raises(RunError) as caught:
        RunFolder.create_or_resume(tmp_path / "toy", STORED.replace("seed: 0", "seed: 5"), with_items("b"), tasks=TASKS)
    lines = [line for line in str(caught.value).splitlines() if line.startswith("  ")]
    assert lines == ["  evals.seed: 0 -> 5"]


def test_changed_tasks_are_refused(tmp_path: Path) -> None:
    made(tmp_path / "toy")
    with pytest.raises(RunError, match="task science: is in the stored study only"):
        RunFolder.create_or_resume(tmp_path / "toy", "", FINGERPRINT, tasks=TASKS[:1])


def test_a_sentinel_makes_another_study_and_is_named_once(tmp_path: Path) -> None:
    """Also where it was a general task before."""
    made(tmp_path / "toy")
    new = replace(TASKS[0], name="pairs", role="sentinel", search_items=0)
    items = {"items": {"search": {"notes": ["a" * 16] * 40, "pairs": []}, "holdout": {"pairs": ["c" * 16]}}}
    with pytest.raises(RunError) as caught:
        RunFolder.create_or_resume(tmp_path / "toy", "", FINGERPRINT | items, tasks=[*TASKS, new])
    assert changes_of(caught.value) == ["task pairs: is in this study only"]
    turned = replace(TASKS[1], role="sentinel", search_items=0)
    with pytest.raises(RunError) as caught:
        RunFolder.create_or_resume(tmp_path / "toy", "", FINGERPRINT, tasks=[TASKS[0], turned])
    assert changes_of(caught.value)[0] == "task science: role: general -> sentinel"


def changes_of(error: RunError) -> list[str]:
    """The lines of a refusal that say what changed."""
    return [line.strip() for line in str(error).splitlines() if line.startswith("  ")]


def test_a_sentinels_items_are_of_the_holdout_suite_alone(tmp_path: Path) -> None:
    path = toy_run(tmp_path / "toy", trials=3, sentinel=True)
    run = RunFolder(path)
    tasks, digest = open_run(path).tasks, open_run(path).recipe(0).digest
    assert run.outcomes_fault(0, "search", digest=digest, tasks=tasks) == ""
    assert run.outcomes_fault(0, "holdout", digest=digest, tasks=tasks) == ""
    whole = [Outcome(*row) for row in run.read_outcomes(0, "holdout")[list(OUTCOME_COLUMNS)].itertuples(index=False)]
    run.write_outcomes(0, "holdout", digest, [row for row in whole if row.task != "letters"])
    assert "60 items of letters" in run.outcomes_fault(0, "holdout", digest=digest, tasks=tasks)
    run.write_outcomes(0, "search", digest, [replace(row, suite="search") for row in whole])
    assert "240 items of minimal_pairs" in run.outcomes_fault(0, "search", digest=digest, tasks=tasks)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"value": 1e308}, "beyond 1e+30"),  # each is finite, their sum is not
        ({"weight": -1e300}, "beyond 1e+30"),
        ({"weight": 1e-300}, "below 1e-30"),
        ({"value": float("inf")}, "not finite"),
        ({"value": 0.0}, ""),
        ({"value": -(2.0**40)}, ""),
    ],
)
def test_numbers_whose_sums_are_not_finite_are_refused(changes: dict[str, float], fault: str, tmp_path: Path) -> None:
    path = toy_run(tmp_path / "toy", trials=3)
    run, tasks, digest = RunFolder(path), open_run(path).tasks, open_run(path).recipe(0).digest
    whole = outcomes_of(run.read_outcomes(0, "search"))
    run.write_outcomes(0, "search", digest, [replace(whole[0], **changes), *whole[1:]])
    found = run.outcomes_fault(0, "search", digest=digest, tasks=tasks)
    assert (fault in found) if fault else not found


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(RunError, match="not a run folder"):
        made(tmp_path / "photos")
    with pytest.raises(RunError, match="is a file"):
        made(tmp_path / "photos" / "cat.jpg")
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.jpg"]


def test_another_format_is_refused(tmp_path: Path) -> None:
    run = made(tmp_path / "toy")
    manifest = run.path / "tasks.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 9'))
    with pytest.raises(RunError, match="has format 9"):
        made(run.path)


def test_a_second_writer_is_told_who_holds_the_lock(tmp_path: Path) -> None:
    run = made(tmp_path / "toy")
    with run.lock(), pytest.raises(RunError, match=rf"in use by process {os.getpid()} on .* since "):
        run.lock()
    run.lock().release()


@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
def test_a_lock_that_is_no_plain_file_is_refused_and_read_around(tmp_path: Path, kind: str) -> None:
    run = made(tmp_path / "toy")
    lock, other = run.path / "lock", tmp_path / "other"
    other.write_text("precious")
    {"folder": lock.mkdir, "pipe": lambda: os.mkfifo(lock), "link": lambda: lock.symlink_to(other)}[kind]()
    with pytest.raises(RunError, match="lock must be a plain file"):
        run.lock()
    assert is_locked(run.path) is False
    assert other.read_text() == "precious"


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made(tmp_path / "toy")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(RunError, match=r"lock cannot be locked \(.*No locks available\); put the run folder on a"):
        run.lock()


def test_the_lock_dies_with_its_process(tmp_path: Path) -> None:
    run = made(tmp_path / "toy")
    code = (
        "import os, sys; from pathlib import Path; from optimizer.runs.run_folder import RunFolder\n"
        "lock = RunFolder(Path(sys.argv[1])).lock(); print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(RunError, match=f"process {holder.pid}"):
        run.lock()
    holder.kill()
    holder.communicate()
    run.lock().release()


def test_outcomes_come_back_as_they_went(tmp_path: Path) -> None:
    run = made(tmp_path / "toy")
    run.write_outcomes(7, "search", "d1", OUTCOMES)
    frame = run.read_outcomes(7, "search")
    back = [
        Outcome(r.task, r.suite, r.item, r.value, r.weight, tuple(r.loglikelihoods), r.truncated)
        for r in frame.itertuples()
    ]
    assert back == OUTCOMES
    assert set(frame["trial"]) == {7}
    assert run.has_outcomes(7, "search")
    assert not run.has_outcomes(7, "holdout")


def test_outcomes_of_an_earlier_version_have_no_value_where_it_had_no_column(tmp_path: Path) -> None:
    run = made(tmp_path / "toy")
    path = run.write_outcomes(7, "search", "d1", OUTCOMES)
    pq.write_table(pq.read_table(path).drop_columns([*LATER_COLUMNS]), path)
    frame = run.read_outcomes(7, "search")
    assert list(frame.columns) == list(FRAME_COLUMNS)
    assert frame["broken_off"].count() == 0
    assert frame["inclusion"].count() == 0
    assert set(frame["cluster"]) == set(frame["statistic"]) == {""}
    assert set(frame["answer"]) == {None}


def _table(run: RunFolder, trial: int, digest: str) -> pa.Table:
    tasks = [replace(TASKS[0], search_items=len(OUTCOMES))]
    return sound_outcomes(run.path, trial, "search", digest=digest, tasks=tasks)


def test_outcomes_of_many_trials_are_as_those_of_each(tmp_path: Path) -> None:
    run = made(tmp_path / "toy")
    for trial, digest in ((7, "d1"), (9, "d2")):
        run.write_outcomes(trial, "search", digest, OUTCOMES)
    path = run.path / "outcomes" / "00009-search.parquet"
    pq.write_table(pq.read_table(path).drop_columns([*LATER_COLUMNS]), path)
    tables = {7: _table(run, 7, "d1"), 9: _table(run, 9, "d2")}
    together = joined_frame(tables)
    assert list(together.columns) == list(FRAME_COLUMNS)
    for trial in tables:
        own, one = together[together["trial"] == trial], run.read_outcomes(trial, "search")
        for name in FRAME_COLUMNS:
            found, expected = own[name].to_list(), one[name].to_list()
            for value, other in zip(found, expected, strict=True):
                if isinstance(other, np.ndarray):
                    assert list(value) == list(other)
                else:
                    assert value == other or (pd.isna(value) and pd.isna(other)), name


def test_a_statistic_of_many_trials_is_made_of_what_each_stored(tmp_path: Path) -> None:
    run = made(tmp_path / "toy")
    counted = [replace(row, statistic="f1", parts=(i % 2, 1.0, i == 3), right=(0,)) for i, row in enumerate(OUTCOMES)]
    for trial in (7, 9):
        run.write_outcomes(trial, "search", "d", counted)
    table = table_of(joined_frame({trial: _table(run, trial, "d") for trial in (7, 9)}), "notes")
    assert table.scores.tolist() == table_of(run.read_outcomes(9, "search"), "notes").scores.tolist() * 2
    assert table.scores[0] == pytest.approx(float(f1(np.array([2.0, 5.0, 1.0]))))
    path = run.path / "outcomes" / "00009-search.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["parts"]), path)
    with pytest.raises(TaskError, match="task notes must have parts"):
        table_of(joined_frame({trial: _table(run, trial, "d") for trial in (7, 9)}), "notes")


def test_a_damaged_outcomes_file_is_named(tmp_path: Path) -> None:
    run = made(tmp_path / "toy")
    path = run.write_outcomes(7, "search", "d1", OUTCOMES)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RunError, match=r"00007-search\.parquet cannot be read"):
        run.read_outcomes(7, "search")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "file", b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="No space left on device"):
        write_atomically(tmp_path / "file", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"old")]


def test_storage_keeps_trials_and_a_backup(tmp_path: Path) -> None:
    run = made(tmp_path / "toy ? {x} %41")  # nothing in a path is special
    study = optuna.create_study(study_name="toy", storage=run.storage(), directions=["maximize", "minimize"])
    trial = study.ask()
    trial.set_user_attr("recipe", Recipe("linear", "b", (("e", "e"),), (Setting("weight", "", "", 1.0),)).to_json())
    study.tell(trial, [1.0, 0.5])
    again = optuna.load_study(study_name="toy", storage=run.storage())
    assert again.trials[0].values == [1.0, 0.5]
    with closing(sqlite3.connect(run.path / "study.db.bak")) as backup:
        assert backup.execute("SELECT count(*) FROM trials").fetchone() == (1,)
    with closing(sqlite3.connect(run.database)) as live:
        assert live.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def strange(path: Path, kind: str) -> None:
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "another program's":
        with closing(sqlite3.connect(path)) as database:
            database.execute("CREATE TABLE photos (name)")
            database.commit()
    else:
        path.write_bytes({"empty": b"", "text": b"not a database at all", "zeroed": bytes(4096)}[kind])


@pytest.mark.parametrize("kind", ["folder", "another program's", "empty", "text", "zeroed"])
def test_a_database_that_is_not_ours_is_left_alone(tmp_path: Path, kind: str) -> None:
    run = made(tmp_path / "toy")
    strange(run.database, kind)
    before = sha256(run.database.read_bytes()).digest() if run.database.is_file() else b""
    with pytest.raises(RunError, match="left as it is"):
        run.storage()
    assert (sha256(run.database.read_bytes()).digest() if run.database.is_file() else b"") == before


def test_a_torn_database_names_its_backup(tmp_path: Path) -> None:
    run = made(tmp_path / "toy")
    for _ in range(2):
        storage = run.storage()
        optuna.create_study(study_name="toy", storage=storage, load_if_exists=True)
        close(storage)
    run.database.write_bytes(run.database.read_bytes()[:6000])
    with pytest.raises(RunError, match=r"restore the copy study\.db\.bak"):
        run.storage()


@pytest.mark.parametrize("password", ["s3cret", "s3/cret"])
def test_secrets_do_not_reach_the_folder(tmp_path: Path, password: str) -> None:
    token = "hf_" + "a" * 30
    url = f"postgresql://me:{password}@host/db"
    run = RunFolder.create_or_resume(tmp_path / "toy", f"storage: {url}\n", FINGERPRINT, tasks=TASKS)
    run.log(f"using {token} and {url}")
    text = b"".join(path.read_bytes() for path in run.path.iterdir() if path.is_file())
    assert token.encode() not in text
    assert password.encode() not in text
    assert redacted("models/base:main at https://host/x") == "models/base:main at https://host/x"
