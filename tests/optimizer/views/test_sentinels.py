"""What is shown of sentinel tasks: a table of their own and one sentence, and nothing where a study has none."""

from __future__ import annotations

import html
import io
import json
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from optimizer.run import Run, open_run
from optimizer.run_study import finish
from optimizer.views.front_rows import sentinel_rows
from optimizer.views.report import report_html
from optimizer.views.tables import front_document, print_front
from optimizer.words import Change
from tests.toy_run import toy_run

pytestmark = pytest.mark.slow  # whole studies are run

TITLE = "Sentinel tasks"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return open_run(toy_run(tmp_path_factory.mktemp("runs") / "toy", trials=12, sentinel=True))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return open_run(toy_run(tmp_path_factory.mktemp("runs") / "toy", trials=12))


def shown(run: Run, width: int = 200) -> str:
    sink = io.StringIO()
    print_front(run, Console(file=sink, width=width))
    return sink.getvalue()


def test_rows_are_front_and_anchors_in_the_order_of_the_front(run: Run) -> None:
    rows = sentinel_rows(run)
    assert {row.trial for row in rows} == {*run.front().index, *run.anchors().index}
    forgetting = [run.points()["forgetting"][row.trial] for row in rows]
    assert forgetting == sorted(forgetting)
    frame = run.sentinels().set_index(["trial", "task"])
    for row in rows:
        for task, change in row.changes.items():
            stored = frame.loc[(row.trial, task)]
            unit = "points" if task == "minimal_pairs" else "bits_per_byte"
            assert change == Change(stored["change"], stored["low"], stored["high"], unit)


def test_the_front_has_a_table_and_a_sentence_of_them(run: Run) -> None:
    text, (sentence,) = shown(run), run.sentinel_words(run.knee())
    table = text[text.index(TITLE) :]
    assert "minimal_pairs" in table
    assert "bits_per_byte" in table
    assert sentence in " ".join(text.split())
    frame = run.sentinels()
    row = frame[(frame["trial"] == 1) & (frame["task"] == "minimal_pairs")].iloc[0]
    assert Change(row["change"], row["low"], row["high"], "points").text() in table
    assert max(map(len, shown(run, 80).splitlines())) <= 80


def test_front_json_and_report_have_them(run: Run, tmp_path: Path) -> None:
    document = json.loads(json.dumps(front_document(run), allow_nan=False))
    assert len(document["sentinels"]) == len(run.sentinels())
    first = document["sentinels"][0]
    assert set(first) == {"trial", "task", "metric", "base_score", "score", "change", "low", "high"}
    page = report_html(run)
    assert f"<h2>{TITLE}" in page
    assert html.escape(run.sentinel_words(run.knee())[0]) in page
    assert "Sentinel tasks: minimal_pairs, letters." in page


def test_without_sentinels_nothing_is_said_of_them(plain: Run) -> None:
    assert TITLE not in shown(plain)
    assert TITLE not in report_html(plain)
    assert front_document(plain)["sentinels"] == []
    assert plain.sentinel_words(plain.knee()) == []


def test_the_sentence_tells_ability_from_form(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    knee = run.knee()

    def said(change: tuple[float, float, float], forgetting: tuple[float, float, float]) -> str:
        row = {"trial": knee, "task": "minimal_pairs", "metric": "acc", "base_score": 0.8, "score": 0.8}
        frame = pd.DataFrame([row | dict(zip(("change", "low", "high"), change, strict=True))])
        points = run.points("holdout")
        points.loc[knee, ["forgetting", "forgetting_low", "forgetting_high"]] = forgetting
        monkeypatch.setattr(Run, "sentinels", lambda _: frame)
        monkeypatch.setattr(Run, "points", lambda *_: points)
        (sentence,) = run.sentinel_words(knee)
        return sentence

    head = f"Sentinel tasks, which neither search nor learning has seen: trial {knee} is "
    kept, better = (0.05, 0.02, 0.08), (-0.06, -0.09, -0.03)
    assert said((-0.012, -0.03, 0.006), kept) == (
        f"{head}1.2 points below the base [-3.0, 0.6] on minimal_pairs; that shows no loss."
    )
    assert said((-0.02, -0.03, -0.01), better).endswith("on minimal_pairs; there it lost ability.")
    assert said((0.01, -0.03, 0.05), better).endswith(
        "on minimal_pairs; what it won on the general tasks may be their form."
    )
    assert said((0.03, 0.01, 0.05), better).endswith("on minimal_pairs; there it won ability too.")


def test_finish_writes_them(run: Run) -> None:
    finish(run)
    assert json.loads((run.path / "front.json").read_text())["sentinels"]
