"""docs/faults.md says of each fault which test holds what must happen: the tests are there."""

from __future__ import annotations

import re

from tests.conftest import ROOT

ROW = re.compile(r"^\| (\d+) \| (.+?) \| (.+?) \| (.+?) \|$", re.MULTILINE)
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
FAULTS = 57


def rows() -> list[tuple[str, ...]]:
    return ROW.findall((ROOT / "docs" / "faults.md").read_text(encoding="utf-8"))


def test_every_fault_has_its_row_in_order() -> None:
    assert [int(number) for number, *_ in rows()] == list(range(1, FAULTS + 1))


def test_every_fault_names_tests_that_exist_or_says_why_not() -> None:
    for number, _, _, held in rows():
        assert TEST.search(held) or held.startswith("not held: "), f"fault {number}"
        for file, name in TEST.findall(held):
            assert f"\ndef {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"fault {number}: {file}::{name}"
        assert held.count("tests/") == len(TEST.findall(held)), f"fault {number}"


def test_the_count_at_the_head_is_true() -> None:
    held = sum(not held.startswith("not held: ") for *_, held in rows())
    assert f"{held} of {FAULTS} are held" in (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
