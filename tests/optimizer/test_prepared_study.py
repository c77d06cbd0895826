"""A study of pico models with derived experts and a learned anchor, by real workers, from the search to an export."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from optimizer.errors import RunError
from optimizer.export.commands import export_knob, export_trial, merge_recipe
from optimizer.run import Run, open_run
from optimizer.run_study import DERIVED_FOLDER, run_study
from optimizer.runs.outcome_files import outcomes_path
from optimizer.runs.sensitivities import sensitivity_file
from optimizer.runs.trial import Role
from optimizer.search.plan import make_plan
from optimizer.study.study_file import read_study
from optimizer.views.plan import print_plan
from tests.optimizer.small_study import write_study

pytestmark = pytest.mark.slow  # whole studies are run

SETS = ["anchors.derived=[regmean]", "search.learned={count: 1, steps: 4}", "search.trials=12"]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def run(study: Path) -> Run:
    return run_study(study, SETS, Console(file=io.StringIO()))


def trial_of(run: Run, role: Role) -> int:
    return next(trial for trial, kind in run.kinds.items() if kind.role is role)


def test_check_names_what_candidates_do_not_pay_for(study: Path) -> None:
    for candidates, said in (
        (9, "derived regmean 0.2, derived regmean 0.4, derived regmean 0.6, 5 of 5 learned points"),
        (20, "derived regmean 0.2, 5 of 5 learned points"),
        (60, "5 of 5 learned points"),  # of four texts a task a lesson reads all, 24 times forward and backward
        (120, "4 of 5 learned points"),
        (900, ""),
    ):
        plan = make_plan(
            read_study(study, ["anchors.derived=[regmean]", "search.learned=5", f"search.candidates={candidates}"])
        )
        console = Console(width=160, record=True, file=io.StringIO())
        print_plan(plan, console)
        text = console.export_text()
        assert (f"{said}: {candidates} candidates do not pay for it" in text) == bool(said)


def test_derived_and_learned_anchors_are_scored_and_judged(run: Run) -> None:
    kinds = list(run.trials()["kind"])
    assert sum(kind.startswith("derived regmean") for kind in kinds) == 3
    assert "learned p=0.60" in kinds
    assert set(run.trials()["state"]) == {"complete"}
    judged = run.points("holdout")["domain"].notna()
    assert all(judged[trial] for trial, kind in run.kinds.items() if kind.is_prepared)


def test_a_derived_expert_lies_beside_the_runs_and_is_made_once(run: Run, study: Path) -> None:
    folders = sorted((run.path.parent / DERIVED_FOLDER).iterdir())
    assert len(folders) == 3
    before = [folder.stat().st_mtime_ns for folder in folders]
    again = run_study(study, [*SETS, "name=again"], Console(file=io.StringIO()))
    assert [folder.stat().st_mtime_ns for folder in folders] == before
    assert len(sorted((run.path.parent / DERIVED_FOLDER).iterdir())) == 3
    kept = [k for k in run.points().columns if k != "front"]
    trials = [trial for trial, kind in run.kinds.items() if kind.is_anchor]
    assert run.points().loc[trials, kept].equals(again.points().loc[trials, kept])  # the same to the bit


def test_kinds_of_modules_are_searched_beside_both(study: Path) -> None:
    own = ["name=kinds", "space.modules={reads: [q_proj, k_proj], mlp: }", "space.method=ties", "search.trials=14"]
    run = run_study(study, [*SETS, *own], Console(file=io.StringIO()))
    assert set(run.trials()["state"]) == {"complete"}
    searched, derived = (run.recipe(trial_of(run, role)) for role in (Role.SEARCHED, Role.DERIVED))
    assert "layer.00.reads" in {setting.group for setting in searched.settings}
    assert {setting.value for setting in derived.settings} == {1.0}
    assert trial_of(run, Role.LEARNED) in run.points().index


def test_both_are_exported_as_models_that_a_document_makes_again(run: Run, tmp_path: Path) -> None:
    for role in (Role.DERIVED, Role.LEARNED):
        trial = trial_of(run, role)
        folder = export_trial(run, trial, tmp_path / str(trial), describe=run.describe)
        again = merge_recipe(folder / "mergekit.yaml", tmp_path / f"{trial}-again")
        assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
        yaml.safe_load((folder / "mergekit.yaml").read_text())


def test_a_knob_between_two_trials_is_exported_with_their_figures(run: Run, tmp_path: Path) -> None:
    folder = export_knob(run, 0.8, tmp_path / "knob", describe=run.describe)
    card = (folder / "README.md").read_text()
    assert "It lies between trial" in card
    assert "learned p=0.60" in card
    assert "was not scored itself" in card


def test_what_a_lesson_gave_is_in_the_study(run: Run) -> None:
    told = run.lessons().loc[trial_of(run, Role.LEARNED)]
    assert told["preference"] == pytest.approx(0.6)
    assert told["kept"] <= told["kept_before"]
    assert told["candidates"] > 0


def test_where_gain_and_loss_come_from_is_measured_and_shown(run: Run) -> None:
    measured = run.sensitivities()["clinical"]
    assert all(measured.error(objective) < 0.1 for objective in ("domain", "general"))  # bf16
    assert run.plot_sensitivities("clinical").data
    assert 'id="sensitivities-clinical"' in (run.path / "report.html").read_text()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"expert": NaN}'])
def test_sensitivities_that_cannot_be_read_are_left_out(run: Run, text: str) -> None:
    path = sensitivity_file(run.path, "clinical")
    stored = path.read_text()
    path.write_text(text)
    try:
        assert not open_run(run.path).sensitivities()
        with pytest.raises(RunError, match="has no sensitivities of 'clinical'"):
            open_run(run.path).plot_sensitivities("clinical")
    finally:
        path.write_text(stored)


def test_a_derived_expert_that_was_removed_is_made_again(study: Path, run: Run) -> None:
    for folder in (run.path.parent / DERIVED_FOLDER).iterdir():
        shutil.rmtree(folder)
    trial = trial_of(run, Role.DERIVED)
    outcomes_path(run.path, trial, "holdout").unlink()  # it must be judged anew
    outcomes_path(run.path, trial + 1, "search").unlink()  # it must be scored anew
    again = run_study(study, SETS, Console(file=io.StringIO()))
    assert not again.lost_outcomes("search")
    assert open_run(run.path).points().equals(run.points())
