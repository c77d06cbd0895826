"""Sources for machines without the driver's disk: found where they are, copied once, compared, given back."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evals.outcomes import SEARCH
from evals.task_files import files_of
from optimizer.errors import WorkerError
from optimizer.run_study import derived_folder, listings_of, worker_spec
from optimizer.search.prepared import SHARES
from optimizer.study.study_file import read_study
from optimizer.workers import staging
from optimizer.workers.orders import Derivation, Lesson
from optimizer.workers.ray_pool import library_versions, require_versions
from optimizer.workers.staging import Listing, LocalSources, SourceServer, StagedWorker, below
from optimizer.workers.worker import Worker
from search_spaces.recipe import Recipe, Setting
from tests.optimizer.small_study import write_study


class Asked:
    """A server in this process, and what was asked of it."""

    def __init__(self, server: SourceServer) -> None:
        self.server, self.calls = server, list[str]()

    def __call__(self, method: str, *arguments: Any) -> Any:
        self.calls.append(method)
        return getattr(self.server, method)(*arguments)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("a" * 100)
    (folder / "pytorch_model.bin").write_text("other weights")
    return folder


@pytest.fixture
def asked(model: Path, tmp_path: Path) -> Asked:
    return Asked(SourceServer({str(model): Listing.of_model(model)}, tmp_path / "derived"))


def elsewhere(asked: Asked, tmp_path: Path, name: str = "other") -> LocalSources:
    """A machine with an empty disk."""
    return LocalSources(asked, tmp_path / name / "staged", disk=tmp_path / name)


def test_a_source_on_a_shared_disk_is_not_copied(asked: Asked, model: Path, tmp_path: Path) -> None:
    assert LocalSources(asked, tmp_path / "staged").find(str(model)) == str(model)
    assert asked.calls == ["listing"]
    assert not (tmp_path / "staged").exists()


def test_a_source_that_is_not_here_is_copied_once(
    asked: Asked, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "CHUNK", 7)
    there = elsewhere(asked, tmp_path)
    copy = Path(there.find(str(model)))
    assert sorted(file.name for file in copy.iterdir()) == ["config.json", "tokenizer.json"]
    assert (copy / "tokenizer.json").read_text() == "a" * 100
    assert there.find(str(model)) == str(copy)
    read = asked.calls.count("read")
    assert read == 1 + 15  # 2 and 100 bytes by 7
    assert elsewhere(asked, tmp_path).find(str(model)) == str(copy)  # a later worker of the same machine
    assert asked.calls.count("read") == read


def test_workers_of_a_machine_wait_for_the_one_that_copies(asked: Asked, model: Path, tmp_path: Path) -> None:
    found: list[str] = []
    workers = [threading.Thread(target=lambda: found.append(elsewhere(asked, tmp_path).find(str(model)))) for _ in "ab"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(set(found)) == 1
    assert asked.calls.count("read") == 2


def test_another_content_under_the_same_path_is_not_taken_for_it(asked: Asked, model: Path, tmp_path: Path) -> None:
    same = below(tmp_path / "other", str(model))
    same.mkdir(parents=True)
    for file in ("config.json", "tokenizer.json"):
        (same / file).write_text((model / file).read_text())
    assert elsewhere(asked, tmp_path).find(str(model)) == str(model)
    (same / "tokenizer.json").write_text("b" * 100)
    copy = Path(elsewhere(asked, tmp_path).find(str(model)))
    assert (copy / "tokenizer.json").read_text() == "a" * 100


def test_what_arrives_otherwise_than_listed_is_refused(asked: Asked, model: Path, tmp_path: Path) -> None:
    (model / "tokenizer.json").write_text("b" * 100)
    with pytest.raises(WorkerError, match="model did not arrive as it is on the driver's machine"):
        elsewhere(asked, tmp_path).find(str(model))
    assert not [path for path in (tmp_path / "other" / "staged").iterdir() if path.is_dir()]


def test_only_listed_files_are_given_out(asked: Asked, model: Path) -> None:
    with pytest.raises(AssertionError, match="only what was listed"):
        asked.server.read(str(model), "/etc/passwd", 0)


def test_a_name_that_every_machine_knows_stays_a_name(asked: Asked, tmp_path: Path) -> None:
    assert elsewhere(asked, tmp_path).find("arc_easy") == "arc_easy"


def test_a_derived_expert_comes_back_and_is_given_out(asked: Asked, model: Path, tmp_path: Path) -> None:
    name = str(tmp_path / "derived" / "clinical-regmean")
    there = elsewhere(asked, tmp_path)
    there.give(model, name)
    assert (tmp_path / "derived" / "clinical-regmean" / "tokenizer.json").read_text() == "a" * 100
    assert there.find(name) == str(model)  # its maker has it
    copy = Path(elsewhere(asked, tmp_path, "third").find(name))
    assert copy.is_relative_to(tmp_path / "third")
    assert (copy / "tokenizer.json").read_text() == "a" * 100
    asked.calls.clear()
    there.give(model, name)
    assert asked.calls == ["begin"]


def test_files_of_a_task_are_all_that_it_reads(tmp_path: Path) -> None:
    (tmp_path / "quiz").mkdir()
    (tmp_path / "common.yaml").write_text("dataset_path: json\nmetric_list: [{metric: acc}]\n")
    task = tmp_path / "quiz" / "quiz.yaml"
    task.write_text(
        "include: ../common.yaml\ntask: quiz\ndataset_kwargs: {data_files: {test: [a.jsonl, ../b.jsonl]}}\n"
    )
    for file in ("quiz/a.jsonl", "b.jsonl", "quiz/notes.txt", "quiz/code.py"):
        (tmp_path / file).write_text("")
    names = {file.relative_to(tmp_path).as_posix() for file in files_of(str(tmp_path / "quiz"), code=False)}
    assert names == {"quiz/quiz.yaml", "common.yaml", "quiz/a.jsonl", "b.jsonl"}
    assert tmp_path / "quiz" / "code.py" in files_of(str(task), code=True)


def test_a_temporary_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging.tempfile, "gettempdir", lambda: str(tmp_path))
    assert staging.own_temporary().stat().st_mode & 0o077 == 0
    monkeypatch.setattr(staging.os, "getuid", lambda: 12345)
    (tmp_path / "mergefront-sources-12345").mkdir()
    with pytest.raises(WorkerError, match=r"mergefront-sources-12345 belongs to another user.*workers\.staging"):
        staging.own_temporary()


def test_a_machine_of_other_versions_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    here = library_versions()
    require_versions(here)
    monkeypatch.setattr("platform.node", lambda: "node-7")
    with pytest.raises(WorkerError, match=rf"node-7 has torch {re.escape(here['torch'])} \(not 1\.0\); .*torch==1\.0"):
        require_versions(here | {"torch": "1.0"})


@pytest.mark.parametrize("name", ["shared", "other"])
def test_a_worker_elsewhere_gives_what_one_here_gives(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = read_study(write_study(tmp_path / "study"), [])
    asked = Asked(SourceServer(listings_of(study), derived_folder(study)))
    if name == "other":
        monkeypatch.setattr(staging, "LocalSources", lambda ask, root: elsewhere(ask, tmp_path))
        monkeypatch.setattr(Path, "is_dir", without(derived_folder(study).parent, Path.is_dir))
    spec = worker_spec(study)
    here, there = Worker(spec), StagedWorker(spec, str(tmp_path / "staged"), asked)
    half = Recipe(
        "task_arithmetic", spec.base, spec.experts, (Setting("weight", spec.experts[0][0], "", 0.5),)
    ).to_json()
    assert there.evaluate(half, SEARCH).outcomes == here.evaluate(half, SEARCH).outcomes
    lesson = Lesson(half, ((spec.experts[0][0], 0.6),), "group", 2, (-1.0, 2.0), 0)
    assert there.learn(lesson).recipe == here.learn(lesson).recipe
    path = Derivation("regmean", spec.experts[0][0], SHARES, derived_folder(study))
    folders = there.derive(path)
    assert all(folder.is_dir() and folder.parent == path.folder for folder in folders)
    apart = here.derive(replace(path, folder=tmp_path / "apart"))
    for mine, theirs in zip(apart, folders, strict=True):
        assert {file.name: file.read_bytes() for file in mine.iterdir()} == {
            file.name: file.read_bytes() for file in theirs.iterdir()
        }
    derived = Recipe("task_arithmetic", spec.base, (("d", str(folders[0])),), (Setting("weight", "d", "", 1.0),))
    assert there.evaluate(derived.to_json(), SEARCH).outcomes == here.evaluate(derived.to_json(), SEARCH).outcomes
    assert ("read" in asked.calls) == (name == "other")


def without(hidden: Path, is_dir: Callable[[Path], bool]) -> Callable[[Path], bool]:
    """What a machine sees that lacks a folder."""
    return lambda path: path != hidden and is_dir(path)
