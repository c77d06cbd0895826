"""YAML is read without surprises, and what is written is read back by any reader."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from optimizer.errors import StudyFileError
from optimizer.strict_yaml import LARGEST_FILE, dump_scalar, dump_yaml, parse_yaml, read_yaml


def written(folder: Path, text: str) -> Path:
    path = folder / "study.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_anchors_of_mergekits_documents_are_read_where_they_are_asked_for(tmp_path: Path) -> None:
    text = "x-all: &all {weight: [0, 1], density: 0.5}\nmodels: [{<<: *all, density: 1}, *all]\nname: &n yes"
    assert read_yaml(written(tmp_path, text), anchors=True) == {
        "x-all": {"weight": [0, 1], "density": 0.5},
        "models": [{"weight": [0, 1], "density": 1}, {"weight": [0, 1], "density": 0.5}],
        "name": "yes",
    }
    with pytest.raises(StudyFileError, match="line 1: anchors and aliases are refused"):
        read_yaml(written(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [x, *a]", "line 1: an alias stands within what it stands for"),
        ("\n".join(f"k{i}: &k{i} [{', '.join([f'*k{i - 1}' if i else 'x'] * 9)}]" for i in range(9)),
         "with aliases written out, a document may hold 100,000"),
        ("a: &x {b: 1}\na: 2", "line 2: the key 'a' stands twice"),
        ("a: {<<: [1]}", "expected a mapping"),
        ("a: *x", "found undefined alias"),
    ],
)  # fmt: skip
def test_anchors_that_cannot_be_written_out_are_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(StudyFileError, match=message):
        read_yaml(written(tmp_path, text), anchors=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "line 2: the key 'a' stands twice"),
        ("a: &x 1", "line 1: anchors and aliases are refused"),
        ("a: [1]\nb: *a", "line 2: anchors and aliases are refused"),
        ("a: &a [x, x]\nb: &b [*a, *a]", "anchors and aliases"),
        ("no: 1\n1: x", "line 2: a key must be a word; given 1"),
        ("a: !!python/object/apply:os.system [ls]", "line 1: tags are refused; given !!python/object/apply:os.system"),
        ("a: 1\nb: !!binary aGk=", "line 2: tags are refused; given !!binary; write the plain value"),
        ("a: !!set {x}", "line 1: tags are refused; given !!set"),
        ("a: !!timestamp 2024-99-99", "line 1: tags are refused; given !!timestamp"),
        ("a: !!omap [x: 1]", "line 1: tags are refused; given !!omap"),
        ("a: !!bool maybe", "line 1: tags are refused; given !!bool"),
        ("a: !!int []", "line 1: tags are refused; given !!int"),
        ("!!merge x: {a: 1}", "line 1: tags are refused; given !!merge"),
        ("a: !own 1", "line 1: tags are refused; given !own"),
        ("a: 1\n--- \nb: 2", "not plain YAML"),
        ("a: [", "not plain YAML"),
        ("[" * 400, "line 1: lists and mappings may lie 64 deep"),
        ("a:\n  " + "- " * 100_000, "line 2: lists and mappings may lie 64 deep"),
        ("a: " + "[" * 100_000, "line 1: lists and mappings may lie 64 deep"),
        ("a: " + "9" * 5000, "line 1: a whole number may have 300 digits; given one of 5,000"),
        ("a: 1" + "0" * 400, "line 1: a whole number may have 300 digits; given one of 401"),
        ("\na: -1e400", "line 2: a number must fit 64 bits; given -1e400"),
        ('a: "\\ud800"', "line 1: a text holds half of a surrogate pair"),
        ('"\\ud800": 1', "line 1: a text holds half of a surrogate pair"),
        ("a: \0", "not plain YAML: unacceptable character #x0000"),
        ("- 1", "must hold keys and values"),
        ("", "must hold keys and values"),
    ],
)
def test_yaml_that_could_surprise_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(StudyFileError, match=message):
        read_yaml(written(tmp_path, text))


def test_files_that_are_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyFileError, match=r"none.yaml does not exist"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(StudyFileError, match="must be a regular file; given a folder"):
        read_yaml(tmp_path)
    (tmp_path / "b.yaml").write_bytes(b"a: \xff")
    with pytest.raises(StudyFileError, match="must be UTF-8 text; byte 3"):
        read_yaml(tmp_path / "b.yaml")
    (tmp_path / "c.yaml").write_text("#" * (LARGEST_FILE + 1))
    with pytest.raises(StudyFileError, match=r"may hold 1,000,000 bytes; given 1,000,001"):
        read_yaml(tmp_path / "c.yaml")


def test_a_yaml_document_has_so_many_values_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optimizer.strict_yaml.MOST_VALUES", 5)
    assert parse_yaml("a: [1, 2]", "here") == {"a": [1, 2]}
    with pytest.raises(StudyFileError, match="here: line 2: a document may hold 5 keys and values"):
        parse_yaml("a: [1, 2,\n3]", "here")


def test_numbers_are_those_of_yaml_1_2() -> None:
    read = parse_yaml("[1e-3, 1.0e-3, .5, -2, 0, 012, 1_000, 1:30, no, on, true, ~, 2024-01-01, .inf]", "here")
    assert read == [0.001, 0.001, 0.5, -2, 0, "012", "1_000", "1:30", "no", "on", True, None, "2024-01-01", math.inf]


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(st.text(), plain, max_size=4))
def test_what_is_written_is_read_back_by_us_and_by_others(document: dict[str, object]) -> None:
    text = dump_yaml(document)
    assert parse_yaml(text, "here") == document
    assert yaml.safe_load(text) == document


def test_a_word_that_looks_like_a_number_stays_a_word() -> None:
    words = {"name": "1e-3", "other": "no", "third": "012", "fourth": "1e5"}
    assert parse_yaml(dump_yaml(words), "here") == words


@given(st.text())
def test_a_scalar_stands_on_one_line(text: str) -> None:
    line = dump_scalar(text)
    assert parse_yaml(f"a: {line}  # a comment\n", "here") == {"a": text}
    assert len(line.splitlines()) == 1


def test_shared_values_are_written_out() -> None:
    shared = [1, 2]
    assert parse_yaml(dump_yaml({"a": shared, "b": shared}), "here") == {"a": [1, 2], "b": [1, 2]}
