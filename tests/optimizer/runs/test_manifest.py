"""tasks.json of a run folder that somebody made: read or refused, never a traceback."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from optimizer.errors import DamagedError, RunError, StudyFileError
from optimizer.run import open_run
from optimizer.runs.manifest import read_manifest, tasks_of
from optimizer.study.study_file import stored_storage
from optimizer.views.report import write_report
from tests.toy_run import toy_run

TASK = {
    "name": "notes", "role": "domain", "expert": "", "output_type": "multiple_choice", "metric": "acc",
    "higher_is_better": True, "chance": 0.25, "search_items": 8, "holdout_items": 8,
}  # fmt: skip


def crafted(folder: Path, content: object) -> Path:
    folder.mkdir(exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "tasks.json").write_text(text)
    return folder


def manifest(**changes: object) -> dict[str, object]:
    return {"format": 1, "tasks": [TASK], "fingerprint": {}} | changes


def test_a_plain_manifest_is_read(tmp_path: Path) -> None:
    run = crafted(tmp_path / "run", manifest())
    (task,) = tasks_of(read_manifest(run), run / "tasks.json")
    assert (task.name, task.chance, task.higher_is_better) == ("notes", 0.25, True)


def test_a_sentinel_is_read(tmp_path: Path) -> None:
    run = crafted(tmp_path / "run", manifest(tasks=[TASK, TASK | {"name": "s", "role": "sentinel", "search_items": 0}]))
    assert [task.role for task in tasks_of(read_manifest(run), run / "tasks.json")] == ["domain", "sentinel"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            manifest(tasks=[TASK | {"role": "sentinel"}]),
            "tasks.0.search_items must be 0, since the search has no items of a sentinel task; given 8",
        ),
        ("[" * 100_000, "is not a run folder: .*tasks.json: lists and objects may lie 64 deep"),
        ("9" * 5000, "is not a run folder: .*a whole number may have 300 digits"),
        ("[]", "tasks.json must hold format, tasks and fingerprint; given a list"),
        ("{}", "tasks.json must hold format, tasks and fingerprint; given nothing"),
        (manifest(format=[1]), r"has format \[1\], this version reads format 1"),
        (manifest(format=True), "has format true, this version reads format 1"),
        ({"format": 1, "tasks": [TASK]}, "must hold format, tasks and fingerprint; given format, tasks"),
        (manifest(fingerprint=[]), r"fingerprint must hold keys and values; given \[\]"),
        (manifest(tasks={}), "tasks must be a list of tasks; given {}"),
        (manifest(tasks=["notes"]), 'tasks.0 must hold keys and values; given "notes"'),
        (manifest(tasks=[TASK | {"name": 3}]), "tasks.0.name must be a text; given 3"),
        (manifest(tasks=[TASK | {"name": "x/" * 3000}]), "tasks.0.name must be 4,096 characters at most; given"),
        (manifest(tasks=[TASK | {"role": "both"}]), 'tasks.0.role must be domain, general or sentinel; given "both"'),
        (manifest(tasks=[TASK | {"chance": "x"}]), 'tasks.0.chance must be a number; given "x"'),
        (manifest(tasks=[TASK | {"chance": float("nan")}]), "numbers must be finite; given NaN"),
        (manifest(tasks=[TASK | {"higher_is_better": 1}]), "tasks.0.higher_is_better must be true or false; given 1"),
        (manifest(tasks=[TASK | {"search_items": 2.5}]), "tasks.0.search_items must be a whole number; given 2.5"),
        (manifest(tasks=[TASK | {"search_items": -1}]), "tasks.0.search_items must be a whole number; given -1"),
        (manifest(tasks=[TASK | {"evil": 1}]), "tasks.0.evil is not known"),
        (manifest(tasks=[{"name": "x"}]), "tasks.0.role must be given"),
        (manifest(study=5), "study must be a text; given 5"),
        (manifest(study="a", storage=[]), r"storage must be a text; given \[\]"),
        (manifest(study="a"), "storage must be a text; given null"),
        (manifest(tasks=[TASK, TASK]), 'tasks.1.name must be another than those before it; given "notes"'),
    ],
)
def test_a_crafted_manifest_is_refused_by_key(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(RunError, match=message) as caught:
        open_run(crafted(tmp_path / "run", content))
    said = str(caught.value)
    assert isinstance(caught.value, DamagedError) == ("is not a run folder" not in said and "has format" not in said)


def test_a_password_that_an_earlier_version_kept_is_masked(tmp_path: Path) -> None:
    run = crafted(tmp_path / "run", manifest(study="a", storage="postgresql://me:s3/cret@host/db"))
    assert read_manifest(run)["storage"] == "postgresql://***@host/db"


def test_a_manifest_that_is_no_file_is_no_wait(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run/tasks.json")
    with pytest.raises(RunError, match=r"is not a run folder: .*must be a regular file; given a pipe"):
        open_run(tmp_path / "run")


@pytest.mark.parametrize("storage", ["3", "[a]", "{a: b}", "true"])
def test_the_stored_storage_is_a_text(tmp_path: Path, storage: str) -> None:
    (tmp_path / "study.yaml").write_text(f"search: {{storage: {storage}}}")
    with pytest.raises(StudyFileError, match=r"study\.yaml: search.storage must be a text; given"):
        stored_storage(tmp_path)


def test_a_report_does_not_wait_for_a_study_file_that_is_a_pipe(tmp_path: Path) -> None:
    run = toy_run(tmp_path / "toy", trials=3)
    (run / "study.yaml").unlink()
    os.mkfifo(run / "study.yaml")
    with pytest.raises(RunError, match=r"study\.yaml: must be a regular file; given a pipe"):
        write_report(open_run(run))
