"""A study's database that somebody changed: its trials are as `search` writes them, or the run is damaged."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from optimizer.errors import DamagedError
from optimizer.run import open_run
from tests.toy_run import toy_run


def changed(folder: Path, *statements: str) -> Path:
    run = toy_run(folder / "toy", trials=3, learned=(0.6,))
    with closing(sqlite3.connect(run / "study.db")) as connection:
        for statement in statements:
            assert connection.execute(statement).rowcount, statement
        connection.commit()
    return run


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("DELETE FROM trial_user_attributes WHERE key = 'recipe'", "trial 0 is finished without a recipe"),
        ("UPDATE trial_user_attributes SET key = 'x' WHERE key = 'recipe'", "trial 0 is finished without a recipe"),
        ("UPDATE trial_user_attributes SET value_json = '3' WHERE key = 'kind'", "trial 0 has the kind '3', which is"),
        (
            "UPDATE trial_user_attributes SET value_json = '[1]' WHERE key = 'lesson'",
            r"has the lesson '\[1\]', which is a",
        ),
        ("UPDATE trial_user_attributes SET value_json = 'NaN' WHERE key = 'seconds'", "trial 0 took nan seconds"),
        ("DELETE FROM trial_values", r"trial 0 has the objectives \[\]"),
    ],
)
def test_a_trial_that_no_search_wrote_is_damage(tmp_path: Path, statement: str, message: str) -> None:
    run = changed(tmp_path, statement)
    with pytest.raises(DamagedError, match=message):
        open_run(run).front()


def test_a_failed_trial_needs_no_recipe(tmp_path: Path) -> None:
    failed = "SELECT trial_id FROM trials WHERE state = 'FAIL'"
    run = changed(tmp_path, f"DELETE FROM trial_user_attributes WHERE key = 'recipe' AND trial_id IN ({failed})")
    assert not open_run(run).front().empty
