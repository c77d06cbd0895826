"""A study of plain texts: from two files to a front, without a task file and without labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from optimizer.cli import app
from optimizer.run import Run, open_run
from optimizer.run_study import run_study
from optimizer.study.study_file import dump_study, read_study
from tests.pico import pico_expert, pico_llama


def call(*words: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": "100", "CI": "1"}).invoke(app, [str(word) for word in words])


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Path, Path]:
    """A short one, and one with items enough for every default."""
    short, long = tmp_path / "notes, mine.txt", tmp_path / "wiki.txt"
    short.write_text("".join(f"On day {i} the {i * i} patients of ward {i % 7} were well.\n\n" for i in range(200)))
    long.write_text("".join(f"The number {i} has the square {i * i}, and its double is {2 * i}. " for i in range(3000)))
    return short, long


def test_init_writes_texts_with_items_as_they_have_them(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    out = tmp_path / "study.yaml"
    made = call("init", "org/base", "a=org/expert", "--domain-text", texts[0], "--general-text", texts[1], "--out", out)
    assert made.exit_code == 0, made.output
    study = read_study(out)
    (short,), (long,) = study.evals.domain, study.evals.general
    assert (short.kind, short.source, long.source) == ("text", str(texts[0]), str(texts[1]))
    assert short.items == short.holdout_items == 7
    assert long.items is None
    assert "{text: './notes, mine.txt', items: 7, holdout_items: 7}" in out.read_text()
    judged = read_study(out, ["evals.general.0={task: x, judge: [python, judge.py]}", "evals.allow_task_code=true"])
    assert judged.evals.general[0].judge == ("python", "judge.py")
    (tmp_path / "again.yaml").write_text(dump_study(judged))
    assert read_study(tmp_path / "again.yaml") == judged
    (tmp_path / "again.yaml").write_text(dump_study(study))
    assert read_study(tmp_path / "again.yaml") == study


def test_init_takes_texts_beside_tasks(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    words = ["--domain", "pubmedqa", "--domain-text", texts[1], "--out", tmp_path / "study.yaml"]
    assert call("init", "org/base", "org/expert", *words).exit_code == 0
    study = read_study(tmp_path / "study.yaml")
    assert [entry.kind for entry in study.evals.domain] == ["task", "text"]
    assert [entry.source for entry in study.evals.general] == ["arc_easy", "hellaswag"]


def test_init_says_what_is_wrong_with_a_text(tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("a few words")
    for given, message in (("few.txt", "must give 10 different items"), ("none.txt", "none.txt does not exist")):
        words = ["--general-text", tmp_path / given, "--out", tmp_path / "study.yaml"]
        told = call("init", "org/base", "org/expert", *words)
        assert told.exit_code == 2
        assert message in told.stderr
        assert not (tmp_path / "study.yaml").exists()


@pytest.mark.slow  # whole studies are run
@pytest.mark.parametrize("general", ["--general-text", "--kl-to-base"])
def test_one_command_goes_from_two_texts_to_a_front(
    tmp_path: Path, texts: tuple[Path, Path], general: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_small(study: Path, overrides: Sequence[str], console: Console) -> Run:
        small = ["search.trials=9", "search.learned=0", "anchors.derived=none", "workers={count: 0, threads: 1}"]
        return run_study(study, [*overrides, *small], console)

    monkeypatch.setattr("optimizer.run_study.run_study", run_small)
    monkeypatch.chdir(tmp_path)
    texts[1].write_text(texts[1].read_text()[:7000])
    base = pico_llama(tmp_path / "base", layers=4)
    pico_expert(base, tmp_path / "expert", scale=0.1)
    told = call("init", "base", "expert", "--domain-text", texts[0].name, general, texts[1].name, "--search")
    assert told.exit_code == 0, told.output
    assert "Front of expert (+) with its knee (*)" in told.stdout
    run = open_run(tmp_path / "runs" / "expert")
    assert (run.trials()["state"] == "complete").sum() == 9
    assert run.judging_suite == "holdout"
    points = run.points("holdout").dropna(subset=["forgetting"])
    assert points["forgetting"][0] == 0.0
    if general == "--kl-to-base":
        assert (points["forgetting"][1:] > 0).all()
        (sentence,) = (line for line in run.findings() if "KL(base || merge)" in line)
        for place in (told.stdout, (run.path / "report.html").read_text(), call("status", run.path).stdout):
            assert sentence[:40] in " ".join(place.split())
    again = call("init", "base", "expert", "--domain-text", texts[0].name, "--search")
    assert again.exit_code == 2
    assert "study.yaml exists; go on with it by `mergefront search study.yaml`" in again.stderr
