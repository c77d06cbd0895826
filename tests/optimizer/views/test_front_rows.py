"""The rows of a run's tables hold what its frames hold, as values."""

from __future__ import annotations

import pytest

from optimizer.run import Run, open_run
from optimizer.views.front_rows import front_rows, limit_rows
from optimizer.words import Interval
from tests.toy_run import toy_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return open_run(toy_run(tmp_path_factory.mktemp("runs") / "toy", trials=12))


def test_front_rows_are_the_front_in_its_order(run: Run) -> None:
    rows, front = front_rows(run), run.front()
    assert [row.trial for row in rows] == front.index.tolist()
    assert [row.trial for row in rows if row.is_knee] == [run.knee()]
    assert all(row.on_front for row in rows)
    for row in rows:
        stored = front.loc[row.trial]
        assert row.kind.stored == stored["kind"]
        for suite, prefix in (("search", ""), ("holdout", "holdout_")):
            low, value, high = (stored[f"{prefix}forgetting{end}"] for end in ("_low", "", "_high"))
            assert row.figures[suite]["forgetting"] == Interval(value, low, high)


def test_front_rows_may_have_the_anchors_among_them(run: Run) -> None:
    rows = front_rows(run, anchors=True)
    assert {row.trial for row in rows} == {*run.front().index, *run.anchors().index}
    forgetting = [row.figures["search"]["forgetting"].value for row in rows]
    assert forgetting == sorted(forgetting)
    assert {row.trial for row in rows if row.on_front} == set(run.front().index)


def test_limit_rows_are_the_answers_by_limit(run: Run) -> None:
    rows, answers = limit_rows(run), run.by_limit()
    assert [(row.limit, row.trial, row.kept) for row in rows] == [
        *answers[["limit", "trial", "kept"]].itertuples(index=False, name=None)
    ]
    assert [row.domain.low for row in rows] == answers["domain_low"].tolist()
