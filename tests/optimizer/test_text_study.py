"""A study of plain texts: from two files to a front, without a task file and without labels."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from optimizer.cli import app
from optimizer.study.study_file import dump_study, read_study


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
