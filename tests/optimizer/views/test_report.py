"""The report: self-contained, says the main thing first, and a name in it is never markup."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from optimizer.run import Run, open_run
from optimizer.runs.run_folder import RunFolder
from optimizer.views.report import report_html, write_report
from tests.toy_run import toy_run

pytestmark = pytest.mark.slow  # whole studies are run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return open_run(toy_run(tmp_path_factory.mktemp("runs") / "toy", trials=12))


@pytest.fixture(scope="module")
def page(run: Run) -> str:
    return report_html(run)


class Page(HTMLParser):
    """Every element and attribute of a page, and the text of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script" and data.strip():
            self.scripts.append(data)


def without_library(page: str) -> str:
    return re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)


def test_says_the_main_thing_first(run: Run, page: str) -> None:
    text = without_library(page)
    order = (run.describe(run.knee()), "for a limit on forgetting", 'id="front"', "The front, from", "The study file")
    places = [text.index(words) for words in order]
    assert places == sorted(places)
    for sentence in run.verdict():
        assert html.escape(sentence) in text
    assert "reference point" in text


def test_fetches_nothing(page: str) -> None:
    parsed = Page(page)
    for tag, attributes in parsed.tags:
        assert tag not in ("link", "img", "iframe", "object", "base")
        assert not {"src", "href", "onclick", "onload", "onerror"} & set(attributes), (tag, attributes)


def test_only_its_own_two_scripts_may_run(page: str) -> None:
    policy = next(a["content"] for tag, a in Page(page).tags if "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    scripts = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert policy.split("script-src ")[1] == " ".join(f"'sha256-{digest}'" for digest in hashes)
    assert len(scripts) == 2


def test_holds_the_figures_of_every_front_point(run: Run, page: str) -> None:
    data = json.loads(re.findall(r'id="figures">(.*?)</script>', page, flags=re.DOTALL)[0])
    assert set(data["weights"]) == set(data["retention"]) == {str(trial) for trial in run.front().index}
    assert data["front"]["data"]


def test_names_are_inert(tmp_path: Path) -> None:
    evil = "</script><img src=x onerror=alert(1)>`|"
    path = toy_run(tmp_path / evil.replace("/", ""), trials=12)
    manifest = path / "tasks.json"
    manifest.write_text(manifest.read_text().replace('"metric": "acc"', f'"metric": {json.dumps(evil)}'))
    (path / "study.yaml").write_text(f"name: {evil}\n# hf_{'a' * 30}\n")
    page = report_html(open_run(path))
    assert "img" not in {tag for tag, _ in Page(page).tags}
    assert "hf_aaa" not in page
    figures = json.loads(re.findall(r'id="figures">(.*?)</script>', page, flags=re.DOTALL)[0])
    shown = [metric for trace in figures["retention"]["0"]["data"] for metric, *_ in trace["customdata"]]
    assert html.escape(evil) in shown


def test_learned_trials_have_a_table_of_their_price_and_losses(run: Run, tmp_path: Path) -> None:
    made = open_run(toy_run(tmp_path / "toy", trials=12, learned=(0.6,)))
    text = without_library(report_html(made))
    table = text[text.index("What was learned, and its price") : text.index("The front, from")]
    for cell in ("learned p=0.60", "0.60", "18.2", "0.512 → 0.401", "0.508 → 0.433"):
        assert cell in table
    assert "hypervolume that learned points add" in text
    assert "What was learned" not in without_library(report_html(run))


def test_a_run_without_a_finished_trial_still_has_a_report(tmp_path: Path) -> None:
    folder = RunFolder.create_or_resume(tmp_path / "toy", "name: toy\n", {}, tasks=())
    target = write_report(open_run(folder.path))
    assert target == folder.path / "report.html"
    text = without_library(target.read_text(encoding="utf-8"))
    assert "No finished trial yet" in text
    assert "<table>" not in text
