"""Tables for a terminal: an interval stays whole, and machines get the same figures as plain values."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest

from optimizer.run import Run, open_run
from optimizer.views.front_rows import front_rows
from optimizer.views.plain_table import table
from optimizer.views.tables import front_document, print_front
from optimizer.views.terminal import Terminal
from tests.toy_run import toy_run

pytestmark = pytest.mark.slow  # whole studies are run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    path = tmp_path_factory.mktemp("runs") / "toy"
    return open_run(toy_run(path, trials=12, derived=("regmean 0.2", "fisher 0.4"), learned=(0.3, 0.6)))


def printed(run: Run, width: int) -> str:
    sink = io.StringIO()
    print_front(run, Terminal(file=sink, width=width))
    return sink.getvalue()


@pytest.mark.parametrize("width", [74, 76, 80, 88, 100, 140])
def test_no_interval_is_broken_at_any_width(run: Run, width: int) -> None:
    text = printed(run, width)
    tables = text[: text.index("Trial ")]
    assert "[" in tables
    assert re.findall(r"\[[^\]]*\n", tables) == []
    assert max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize("width", [80, 100, 140])
def test_no_word_of_a_kind_is_broken(run: Run, width: int) -> None:
    front = printed(run, width).partition("For a limit")[0]
    shown = front.partition("learned: ")[0].split()  # the table, without the sentences that explain it
    labels = [row.kind.label for row in front_rows(run, anchors=True)]
    assert any(label.startswith("derived regmean") for label in labels)
    assert {word for label in labels for word in label.split()} <= set(shown)


def test_words_give_way_to_numbers_where_there_is_little_room() -> None:
    sink = io.StringIO()
    made = table("", ["what", "share"], [("one two three", "107 % [86, 210]")], right=["share"])
    Terminal(file=sink, width=24).print(made)
    assert "107 % [86, 210]" in sink.getvalue()


def test_values_share_a_line_with_their_intervals_where_there_is_room(run: Run) -> None:
    assert re.search(r"\d % \[", printed(run, 140))
    limits = printed(run, 80)
    limits = limits[limits.index("For a limit") : limits.index("Tasks of")]
    assert not re.search(r"\d % \[", limits)


def test_machines_get_what_pays_and_the_lessons(run: Run, tmp_path: Path) -> None:
    document = json.loads(json.dumps(front_document(run), allow_nan=False))
    assert [row["set"] for row in document["what_pays"]] == run.what_pays()["set"].tolist()
    assert [row["trial"] for row in document["lessons"]] == run.lessons().index.tolist()
    assert {"learned p=0.60"} <= {point["kind"] for point in document["points"]}
    plain = front_document(open_run(toy_run(tmp_path / "plain", trials=12)))
    assert plain["lessons"] == []
