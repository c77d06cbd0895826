"""What the recommended merge lost and won, with its texts: on the page and in JSON, whatever they hold."""

from __future__ import annotations

import io
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from optimizer.cli import app
from optimizer.run import open_run
from optimizer.run_study import run_study
from optimizer.views import flips_page
from optimizer.views.report import report_html
from tests.optimizer.small_study import write_study

pytestmark = pytest.mark.slow  # whole studies are run

EVIL = "</summary><img src=x onerror=alert(1)>\x1b[2J\u202e|"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    study = write_study(folder)
    rows = [{"q": f"{EVIL} is {i} so?", "c": [f"yes {i}", f"no {EVIL}", "never"], "g": i % 3} for i in range(60)]
    (folder / "quiz.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "quiz.yaml").write_text(
        "task: quiz\ndataset_path: json\ndataset_kwargs: {data_files: {test: quiz.jsonl}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: c\ndoc_to_target: g\n"
        "metric_list: [{metric: acc}]\n"
    )
    tasks = f"evals.sentinel=[{{task: {folder}/quiz.yaml, holdout_items: 40}}]"
    return run_study(study, [tasks, "search.trials=7"], Console(file=io.StringIO())).path


@pytest.fixture
def path(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "small")


class Details(HTMLParser):
    """The tags of a page, and the text of its closed parts but for the study file."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "details":
            self.texts.append("")
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if "details" in self._open:
            self.texts[-1] += data


def test_the_page_lists_what_the_knee_lost_and_won_with_texts_that_are_inert(path: Path) -> None:
    run = open_run(path)
    flipped = run.flipped_items(run.knee())
    assert len(flipped) > 2
    assert flipped["question"].str.startswith(EVIL).all()
    for _, row in flipped.iterrows():
        assert (row["base"] == row["right"], row["merge"] == row["right"]) == (
            (True, False) if row["change"] == "lost" else (False, True)
        )
    page = Details((path / "report.html").read_text())
    assert "img" not in page.tags
    (quiz,) = (text for text in page.texts if text.startswith("quiz: "))
    lost = int((flipped["change"] == "lost").sum())
    assert quiz.startswith(f"quiz: {lost} lost, {len(flipped) - lost} won")
    for question in flipped["question"]:
        assert question.replace("\x1b", " ").replace("\u202e", " ") in quiz
    assert not {"\x1b", "\u202e"} & {*quiz}


def test_json_has_them_and_keeps_them_when_the_task_is_gone(path: Path, finished: Path) -> None:
    run = open_run(path)
    stored = json.loads((path / "front.json").read_text())["flipped"]
    assert stored["trial"] == run.knee()
    assert [row["change"] for row in stored["items"]] == sorted(row["change"] for row in stored["items"])
    shown = json.loads(CliRunner().invoke(app, ["front", str(path), "--json"]).stdout)["flipped"]
    texts = {(row["task"], row["item"]): row["question"] for row in stored["items"]}
    assert shown == stored
    task = finished.parent.parent / "quiz.yaml"
    hidden = task.rename(task.with_suffix(".hidden"))
    try:
        assert CliRunner().invoke(app, ["report", str(path)]).exit_code == 0
        again = json.loads((path / "front.json").read_text())["flipped"]
        assert {(row["task"], row["item"]): row["question"] for row in again["items"]} == texts
        assert "quiz: " in report_html(open_run(path))
        (path / "front.json").unlink()
        told = CliRunner().invoke(app, ["report", str(path)])
        assert told.exit_code == 0, told.output
        bare = json.loads((path / "front.json").read_text())["flipped"]
    finally:
        hidden.rename(task)
    assert {row["question"] for row in bare["items"]} == {""}
    assert "quiz: " not in report_html(open_run(path))


@pytest.mark.parametrize(
    "part", [None, [], {"trial": 1}, {"trial": None, "items": {}}, {"items": [1, {"task": "quiz"}, {"question": 3}]}]
)
def test_what_was_written_by_hand_gives_no_text(path: Path, part: object) -> None:
    knee = open_run(path).knee()
    if isinstance(part, dict) and part.get("trial", 0) in (None, 0):
        part = part | {"trial": knee}
    (path / "front.json").write_text(json.dumps({"flipped": part}))
    assert set(open_run(path).flipped_items(knee)["question"]) == {""}
    (path / "front.json").write_text("[")
    assert set(open_run(path).flipped_items(knee)["question"]) == {""}


def test_long_texts_and_lists_are_shortened_on_the_page_alone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flips_page, "MOST_SHOWN", 2)
    monkeypatch.setattr(flips_page, "LONGEST", 5)
    (quiz,) = (text for text in Details(report_html(open_run(path))).texts if text.startswith("quiz: "))
    assert "The first 2 of " in quiz
    assert "</sum…" in quiz
    assert "is 1" not in quiz
