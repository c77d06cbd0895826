"""A study that derives an expert first: it is an expert like any other, made once, and found again after a kill."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from optimizer.cli import app
from optimizer.errors import MergeError, StudyFileError
from optimizer.export.commands import export_trial, merge_recipe
from optimizer.learn import learn_weights
from optimizer.run import Run, open_run
from optimizer.run_study import DERIVED_FOLDER, derived_folder, make_pool, run_study
from optimizer.search.derived import KNOWN, with_derived
from optimizer.search.plan import count_tokens, make_plan, require_sound
from optimizer.study.study_file import read_study
from optimizer.workers.deriver import Deriver
from search_spaces import Recipe
from tests.optimizer.small_study import write_study

pytestmark = pytest.mark.slow  # whole studies are run

DERIVED = "\n  derived: {clinical_rm: {from: clinical, form: regmean, lambda: 0.4}}"
SETS = ["search.trials=6", "space.method=ties"]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_study(tmp_path_factory.mktemp("study"))
    path.write_text(path.read_text().replace("    clinical: ./expert", f"    clinical: ./expert{DERIVED}"))
    return path


@pytest.fixture(scope="module")
def run(study: Path) -> Run:
    return run_study(study, SETS, Console(file=io.StringIO()))


def folders(run: Run) -> list[Path]:
    return sorted(folder for folder in (run.path.parent / DERIVED_FOLDER).iterdir() if folder.name != KNOWN)


def test_it_is_an_expert_in_space_front_export_and_mergekit(run: Run, tmp_path: Path) -> None:
    assert run.experts == ("clinical", "clinical_rm")
    (folder,) = folders(run)
    assert folder.name.startswith("clinical-regmean-0.4-")
    assert (run.trials()["state"] == "complete").sum() == 6
    assert run.points("holdout")["domain_clinical_rm"].notna().any()
    exported = export_trial(run, int(run.front().index[-1]), tmp_path / "model", describe=run.describe)
    assert str(folder) in (exported / "mergekit.yaml").read_text()
    again = merge_recipe(exported / "mergekit.yaml", tmp_path / "again")
    weights = "model.safetensors"
    assert (again / weights).read_bytes() == (exported / weights).read_bytes()


def made(study: Path, *sets: str) -> Path:
    """Derive the expert of a study, or find it, without a search."""
    plan = make_plan(read_study(study, sets))
    count_tokens(plan)
    ready = with_derived(require_sound(plan), derived_folder(plan.study), make_pool, print)
    assert ready.experts["clinical_rm"].names == ready.base.names
    return Path(ready.study.models.experts["clinical_rm"])


def test_it_is_made_once_and_anew_where_it_was_removed(run: Run, study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    derive = Deriver.derive
    monkeypatch.setattr(Deriver, "derive", lambda self, path: asked.append(path.expert) or derive(self, path))
    (folder,) = folders(run)
    assert made(study, *SETS) == folder
    assert not asked
    (known,) = (run.path.parent / DERIVED_FOLDER / KNOWN).iterdir()
    known.unlink()  # killed between the expert and the note of it
    before = (folder / "derivation.json").stat().st_mtime_ns
    assert made(study, *SETS) == folder
    assert asked == ["clinical"]
    assert (folder / "derivation.json").stat().st_mtime_ns == before
    contents = {file.name: file.read_bytes() for file in folder.iterdir()}
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    assert made(study, *SETS) == folder
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == contents
    known.write_text('{"folder": "../../elsewhere"}')
    assert made(study, *SETS) == folder


def test_another_share_form_item_or_text_is_another_expert(run: Run, study: Path, tmp_path: Path) -> None:
    for name in ("notes", "wiki"):
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} of day {i}: {i * i} were there. " for i in range(400)))
    key, notes, wiki = "models.derived.clinical_rm", f"{tmp_path}/notes.txt", f"{tmp_path}/wiki.txt"
    texts = f"{key}.calibration={notes}", f"{key}.calibration={{domain: {notes}, general: {wiki}}}"
    changes = (f"{key}.lambda=0.5", f"{key}.form=fisher", "evals.seed=3", *texts)
    found = [made(study, *SETS, change) for change in ("search.seed=1", *changes)]
    assert str(found[0]) == dict(run.recipe(0).experts)["clinical_rm"]
    assert len(set(found)) == 1 + len(changes)
    with pytest.raises(MergeError, match=r"none\.txt does not exist"):
        made(study, *SETS, f"{key}.calibration=none.txt")


def test_check_names_it_and_makes_nothing(study: Path) -> None:
    told = CliRunner(env={"COLUMNS": "140"}).invoke(
        app, ["check", str(study), "--set", "name=unmade", "--set", "runs=x"]
    )
    assert told.exit_code == 0, told.output
    assert "regmean of clinical at 0.4, made by the search" in told.output
    assert not (study.parent / "x").exists()


@pytest.mark.parametrize(
    ("derived", "message"),
    [
        ("{clinical: {from: clinical}}", "models.derived.clinical: an expert has this name"),
        ("{rm: {from: clinicl}}", "models.derived.rm.from: must be one of models.experts; .*; did you mean .clinical"),
        ("{rm: {from: clinical, lambda: 1.4}}", "models.derived.rm.lambda: must be less than 1; given 1.4"),
        ("{rm: {from: clinical, lambda: 0}}", "models.derived.rm.lambda: must be greater than 0; given 0"),
        (
            "{rm: {from: clinical, form: regmeen}}",
            "models.derived.rm.form: must be 'kfac', 'regmean' or 'fisher'; given",
        ),
        ("{r.m: {from: clinical}}", "an expert's name must be letters"),
        ("{rm: {form: fisher}}", "models.derived.rm.from: must be given"),
    ],
)
def test_what_cannot_be_derived_is_refused_by_name(study: Path, derived: str, message: str) -> None:
    with pytest.raises(StudyFileError, match=message):
        read_study(study, [f"models.derived={derived}"])


def test_the_run_folder_names_what_was_made(run: Run) -> None:
    stored = read_study(run.path / "study.yaml")
    assert not stored.models.derived
    (folder,) = (f for f in folders(run) if str(f) == stored.models.experts["clinical_rm"])
    assert json.loads((folder / "derivation.json").read_text())["share"] == 0.4
    assert open_run(run.path).experts == run.experts


def test_a_study_is_taken_up_with_it(run: Run, study: Path, tmp_path: Path) -> None:
    before = run.points().drop(columns=["front", "front_chance"])
    again = run_study(study, [*SETS, "search.trials=7"], Console(file=io.StringIO()))
    assert (again.trials()["state"] == "complete").sum() == 7
    assert again.points().drop(columns=["front", "front_chance"]).loc[before.index].equals(before)
    learn_weights(study, SETS, tmp_path / "r.json", preference=0.5, start=0.5, steps=2, by="group", loss="labels")
    assert dict(Recipe.from_json((tmp_path / "r.json").read_text()).experts).keys() == {"clinical", "clinical_rm"}
