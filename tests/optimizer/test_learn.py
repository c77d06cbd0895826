"""`learn` and `derive` on the command line: what they write is what `merge` and a study take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from optimizer.checkpoints.opening import open_checkpoint
from optimizer.cli import app
from search_spaces import Recipe
from tests.optimizer.small_study import write_study

pytestmark = pytest.mark.slow  # weights are learned


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return write_study(tmp_path, items=6)


def mergefront(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(word) for word in words])
    return done.exit_code, done.output


def test_a_learned_recipe_merges(study: Path, tmp_path: Path) -> None:
    out = tmp_path / "recipe.json"
    code, said = mergefront("learn", study, out, "--steps", 4, "--preference", 0.7)
    assert code == 0, said
    assert "items kept apart" in said
    assert len(Recipe.from_json(out.read_text()).tensors) > 10
    code, said = mergefront("merge", out, tmp_path / "model")
    assert code == 0, said
    assert open_checkpoint(tmp_path / "model").names


def test_teachers_teach_without_labels(study: Path, tmp_path: Path) -> None:
    code, said = mergefront("learn", study, tmp_path / "labels.json", "--steps", 2)
    code, said = mergefront("learn", study, tmp_path / "teachers.json", "--steps", 2, "--loss", "teachers")
    assert code == 0, said
    learned = [Recipe.from_json((tmp_path / f"{loss}.json").read_text()).digest for loss in ("labels", "teachers")]
    assert learned[0] != learned[1]


def test_a_recipe_that_is_there_is_not_replaced(study: Path, tmp_path: Path) -> None:
    out = tmp_path / "recipe.json"
    out.write_text("mine")
    code, said = mergefront("learn", study, out, "--steps", 1)
    assert code == 1
    assert "name another one" in said
    assert out.read_text() == "mine"


def test_a_derived_expert_is_a_model_and_is_found_again(study: Path, tmp_path: Path) -> None:
    code, said = mergefront("derive", study, tmp_path / "derived", "--share", 0.5)
    assert code == 0, said
    (folder,) = (tmp_path / "derived").iterdir()
    assert str(folder) in said.replace("\n", "")
    assert json.loads((folder / "derivation.json").read_text())["share"] == 0.5
    assert open_checkpoint(folder, base=open_checkpoint(tmp_path / "base")).names
    assert mergefront("derive", study, tmp_path / "derived", "--share", 0.5)[0] == 0
    assert list((tmp_path / "derived").iterdir()) == [folder]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("derive", "--share", 1.5), "between 0 (the base) and 1"),
        (("derive", "--form", "mean"), "--form': Value error, 'mean' is not one of 'kfac', 'regmean', 'fisher'"),
        (("derive", "--expert", "nobody"), "the study's experts are clinical"),
        (("learn", "--by", "layer"), "--by': Value error, 'layer' is not one of 'tensor', 'group'"),
        (("learn", "--loss", "both"), "--loss': Value error, 'both' is not one of 'labels', 'teachers'"),
    ],
)
def test_what_cannot_be_meant_is_refused(words: tuple[object, ...], told: str, study: Path, tmp_path: Path) -> None:
    verb, *options = words
    code, said = mergefront(verb, study, tmp_path / "out", *options)
    assert code == 2
    assert told in " ".join(said.split())
    assert not (tmp_path / "out").exists()
