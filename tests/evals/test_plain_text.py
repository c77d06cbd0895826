"""A plain text file is cut into items that hold all of it, and is a task like one with a task file."""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path

import pytest

from evals.engine import Engine
from evals.errors import TaskError
from evals.lm_harness import Harness
from evals.lm_tasks import load_tasks
from evals.outcomes import CERTIFY, HOLDOUT, SEARCH, TEXT, Chat, TaskSpec
from evals.plain_text import LEAST_ITEMS, LONGEST, SHORTEST, read_pieces
from tests.evals.conftest import words, write_task


def prose(paragraphs: int) -> str:
    """Paragraphs of sentences of unlike length, on several lines."""
    random_ = random.Random(paragraphs)
    parts = [
        ". ".join(
            f"{words(random_.randrange(99), random_.randrange(3, 20))}\n{i}" for i in range(random_.randrange(12))
        )
        for _ in range(paragraphs)
    ]
    return ".\n\n".join(parts)


def load_text(path: Path, **options: int) -> Harness:
    items = {"search_items": 5, "holdout_items": 5, "certify_items": 3} | options
    return load_tasks([TaskSpec(str(path), "general", kind=TEXT, **items)], seed=0, chat=Chat(), allow_task_code=False)


@pytest.mark.parametrize("text", [prose(40), "x" * 7000, "дом\n" * 4000, words(3, 4000), "。".join("木火水" * 2000)])
def test_the_items_are_all_of_the_text_in_its_order(tmp_path: Path, text: str) -> None:
    file = tmp_path / "a.txt"
    file.write_text("".join(f"{i} {text[i : i + 300]}" for i in range(0, len(text), 300)), encoding="utf-8")
    pieces = read_pieces(file)
    assert "".join("".join(piece.text.split()) for piece in pieces) == "".join(file.read_text("utf-8").split())
    assert all(len(piece.text) <= LONGEST for piece in pieces[:-1])
    assert SHORTEST <= len(pieces[-1].text) <= LONGEST + SHORTEST
    lines = file.read_text("utf-8").split("\n")
    assert all(piece.text.split("\n")[0] in lines[piece.line - 1] for piece in pieces)


def test_an_item_ends_where_the_text_pauses(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("\n\n".join(f"{i} {'word ' * 80}end." for i in range(12)))
    assert [piece.text.split()[0] for piece in read_pieces(file)] == [str(i) for i in range(12)]
    file.write_text(" ".join(f"{'word ' * (60 + i)}end." for i in range(12)))
    assert all(piece.text.endswith("end.") for piece in read_pieces(file))


def test_line_ends_and_a_byte_order_mark_are_no_part_of_it(tmp_path: Path) -> None:
    text = prose(30)
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert read_pieces(tmp_path / "a.txt") == read_pieces(tmp_path / "b.txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"a\.txt: holds no text; give a file of some 6,000 characters or more"),
        (b" \n\n \t", "holds no text"),
        (b"a few words", "must give 10 different items of at most 600 characters; this one gives 1; take more text"),
        (("the same again. " * 40 + "\n\n").encode() * 50, "different items"),
        ("naïve ".encode("latin-1") * 5000, r"a\.txt: must be UTF-8 text; byte 2 is not"),
        (b"a b " * 6_000_000, r"a\.txt: may hold 20,000,000 bytes; given 24,000,000"),
    ],
)
def test_what_cannot_be_a_text_is_said(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(TaskError, match=message):
        load_text(tmp_path / "a.txt")


def test_only_a_regular_file_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, message in ((tmp_path, "given a folder"), (tmp_path / "pipe", "given a pipe")):
        with pytest.raises(TaskError, match=message):
            load_text(path)
    with pytest.raises(TaskError, match=r"none\.txt does not exist"):
        load_text(tmp_path / "none.txt")


def test_its_items_are_shared_out_and_no_content_is_in_two_suites(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text(prose(80) + "\n\n" + prose(80), encoding="utf-8")  # every piece or so twice
    harness = load_text(tmp_path / "notes.txt", search_items=8, holdout_items=6, certify_items=4)
    (task,) = harness.tasks
    assert (task.info.name, task.info.metric, task.info.output_type) == (
        "notes",
        "bits_per_byte",
        "loglikelihood_rolling",
    )
    hashes = [item.hash for suite in (SEARCH, HOLDOUT, CERTIFY) for item in task.items[suite]]
    assert len(hashes) == len(set(hashes)) == 18


def test_it_scores_as_the_task_file_of_the_same_items(tmp_path: Path, engine: Engine) -> None:
    (tmp_path / "notes.txt").write_text(prose(60), encoding="utf-8")
    rows = [{"text": piece.text} for piece in read_pieces(tmp_path / "notes.txt")]
    settings = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "doc_to_choice": None,
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    folder = write_task(tmp_path / "notes", rows, **settings)
    given = load_text(tmp_path / "notes.txt")
    spec = TaskSpec(str(folder), "general", search_items=5, holdout_items=5, certify_items=3)
    other = load_tasks([spec], seed=0, chat=Chat(), allow_task_code=False)
    outcomes = given.score(engine, SEARCH)
    assert outcomes == other.score(engine, SEARCH)
    texts = {item.hash: item.doc["text"] for item in given.tasks[0].items[SEARCH]}
    assert [outcome.weight for outcome in outcomes] == [len(texts[o.item].encode()) for o in outcomes]
    assert all(math.isclose(o.value, -o.loglikelihoods[0] / math.log(2)) for o in outcomes)


def test_two_texts_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "notes.txt").write_text(json.dumps(prose(LEAST_ITEMS * 6)))
    specs = [
        TaskSpec(str(tmp_path / folder / "notes.txt"), "general", search_items=2, holdout_items=2, kind=TEXT)
        for folder in ("a", "b")
    ]
    with pytest.raises(TaskError, match="task names must differ: notes is there twice"):
        load_tasks(specs, seed=0, chat=Chat(), allow_task_code=False)
