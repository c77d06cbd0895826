"""A whole study with a sentinel task: the search and what learns never see it, the end does."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from optimizer.errors import RunError
from optimizer.run import Run
from optimizer.run_study import run_study, worker_spec
from optimizer.runs.run_folder import RunFolder
from optimizer.search.plan import count_tokens, make_plan
from optimizer.study.schema import Study
from optimizer.study.study_file import read_study
from optimizer.views.plan import print_plan
from optimizer.workers.orders import Lesson
from optimizer.workers.worker import Worker
from tests.optimizer.small_study import write_study, write_task

pytestmark = pytest.mark.slow  # whole studies are run


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    path = write_study(folder)
    write_task(folder, "letters", items=9)
    write_task(folder, "figures", items=9)
    text = path.read_text().replace("  # sentinel:", "  sentinel: [{task: ./letters, holdout_items: 9}]  #")
    path.write_text(text.replace("holdout_items: 100", "holdout_items: 4"))
    return path


@pytest.fixture(scope="module")
def study(path: Path) -> Study:
    return read_study(path)


@pytest.fixture(scope="module")
def run(path: Path) -> Run:
    return run_study(path, [], Console(file=io.StringIO()))


def test_check_shows_it(study: Study) -> None:
    plan = make_plan(study)
    count_tokens(plan)
    console = Console(width=100, record=True, file=io.StringIO())
    print_plan(plan, console)
    (line,) = (line for line in console.export_text().splitlines() if line.split()[:1] == ["letters"])
    assert line.split()[1:3] == ["sentinel", "bits_per_byte"]
    assert line.split()[-2:] == ["0", "9"]
    assert plan.problems == []


def test_only_the_end_of_a_search_scores_it(run: Run) -> None:
    folder = RunFolder(run.path)
    assert set(folder.read_outcomes(0, "search")["task"]) == {"skill", "manners"}
    judged = set(run.sentinels()["trial"])
    assert judged == {*run.front().index, *run.anchors().index}
    for trial in judged:
        tasks = folder.read_outcomes(trial, "holdout")["task"]
        assert (tasks == "letters").sum() == 9
    assert '"sentinels"' in (run.path / "front.json").read_text()


def test_another_sentinel_is_another_study(run: Run, path: Path) -> None:
    given = ["evals.sentinel=[{task: ./letters, holdout_items: 9}, {task: ./figures, holdout_items: 9}]"]
    with pytest.raises(RunError, match=r"what changed:\n  task figures: is in this study only\nchange it back"):
        run_study(path, given, Console(file=io.StringIO()))
    with pytest.raises(RunError, match=r"what changed:\n  task letters: is in the stored study only\nchange it back"):
        run_study(path, ["evals.sentinel=[]"], Console(file=io.StringIO()))


def test_what_is_learned_does_not_depend_on_it(run: Run, path: Path, study: Study) -> None:
    lesson = Lesson(run.recipe(2).to_json(), (("clinical", 0.5),), "group", 3, (-1.0, 2.0), 0)
    without = worker_spec(read_study(path, ["evals.sentinel=[]"]))
    with_it, alone = (Worker(spec).learn(lesson) for spec in (worker_spec(study), without))
    assert (with_it.recipe, with_it.kept, with_it.candidates) == (alone.recipe, alone.kept, alone.candidates)
