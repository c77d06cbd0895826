"""A certificate of a study whose items share passages: it bets on passages, and says so before it looks."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from evals.outcomes import CERTIFY
from optimizer.certify import certify_run
from optimizer.run import open_run
from optimizer.run_study import run_study
from optimizer.runs.certificates import Question
from optimizer.runs.outcome_files import outcomes_path, read_outcomes
from optimizer.search.certifier import hypothesis_of
from optimizer.search.plan import count_tokens, make_plan
from optimizer.study.study_file import read_study
from optimizer.views.plan import print_plan
from tests.optimizer.small_study import write_study, write_task

pytestmark = pytest.mark.slow  # whole studies are run

PASSAGES, EACH = 30, 3


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    study = write_study(folder, items=12, trials=8)
    for name in ("skill", "manners"):
        shutil.rmtree(folder / name)
        write_task(folder, name, items=30)
    texts = [{"topic": p, "text": f"topic {p} part {i} is {p * i}"} for p in range(PASSAGES) for i in range(EACH)]
    (folder / "manners" / "manners.jsonl").write_text("\n".join(map(json.dumps, texts)))
    general = f"{{task: {folder}/manners/manners.yaml, group_by: topic, holdout_items: 24, certify_items: 42}}"
    study.write_text(study.read_text().replace("- ./manners/manners.yaml", f"- {general}"))
    assert "group_by" in study.read_text()
    return study


@pytest.fixture(scope="module")
def run(study: Path) -> Path:
    return run_study(study, [], Console(file=io.StringIO())).path


def test_check_tells_what_they_are_enough_for(study: Path) -> None:
    plan = make_plan(read_study(study))
    count_tokens(plan)
    console = Console(width=200, record=True, file=io.StringIO())
    print_plan(plan, console)
    text = console.export_text()
    assert plan.problems == []
    assert "42 of manners (up to 3 about one passage: they may tell no more than 14)" in text
    assert "task manners: its 78 items are about 26 passages" in text


def test_intervals_are_of_passages(run: Path) -> None:
    opened = open_run(run)
    rows = opened.outcomes("holdout")
    assert set(rows.loc[rows["task"] == "manners"].groupby("cluster")["item"].nunique()) == {3}
    forgetting = opened.points("holdout").loc[1, "forgetting_stderr"]
    opened = open_run(run)
    opened._stored["holdout"][0]["cluster"] = ""
    assert opened.points("holdout").loc[1, "forgetting_stderr"] != forgetting


def test_passages_are_bet_on_whole(run: Path) -> None:
    certificate = certify_run(run, Question(0.04, None, False, 0.1), say=lambda _: None)
    ledger, (tested, *_) = certificate["ledger"], certificate["tested"]
    hypothesis = hypothesis_of(ledger["candidates"][0]["hypotheses"][0])
    (part,) = hypothesis.parts
    assert (part.items, part.sizes) == (42, (3,) * 14)
    assert hypothesis.rounds == 14
    used = certificate["spent"]["manners"]["used"]
    assert used % EACH == 0
    items = ledger["items"]["manners"]
    frames = [read_outcomes(outcomes_path(run, trial, CERTIFY)).set_index("item") for trial in (0, tested["trial"])]
    rounds = tested["tests"][0]["rounds"]
    base, merge = (frame.loc[items[: EACH * rounds]] for frame in frames)
    clusters = base["cluster"].to_numpy().reshape(rounds, EACH)
    assert (clusters == clusters[:, :1]).all()
    assert len(set(clusters[:, 0])) == rounds
    losses = (part.base * base["value"] + part.candidate * merge["value"]).clip(upper=part.most)
    assert losses.to_numpy().reshape(rounds, EACH).mean(axis=1) == pytest.approx(tested["tests"][0]["losses"])
