"""The door for files a person hands over: what is no plain, small, readable document is refused, at once, by name."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evals.documents import DocumentError, checked_path, parse_json, read_bytes, read_json, read_text, resolved_path
from evals.errors import TaskError
from evals.task_files import find_task_file


def _make_socket(path: Path) -> None:
    there, here = os.getcwd(), socket.socket(socket.AF_UNIX)
    os.chdir(path.parent)  # a socket's path may have 108 bytes only
    here.bind(path.name)
    here.close()
    os.chdir(there)


@pytest.mark.parametrize(
    ("kind", "make"),
    [("a pipe", os.mkfifo), ("a folder", os.mkdir), ("a socket", _make_socket)],
    ids=["pipe", "folder", "socket"],
)
def test_only_a_regular_file_is_read(tmp_path: Path, kind: str, make: Callable[[Path], Any]) -> None:
    make(tmp_path / "given")
    started = time.monotonic()
    with pytest.raises(DocumentError, match=f"given: must be a regular file; given {kind}"):
        read_bytes(tmp_path / "given")
    assert time.monotonic() - started < 1


def test_a_device_without_an_end_is_not_read() -> None:
    with pytest.raises(DocumentError, match="/dev/zero: must be a regular file; given a device"):
        read_bytes("/dev/zero")


def test_a_link_to_a_regular_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("there")
    (tmp_path / "link").symlink_to("file")
    assert read_text(tmp_path / "link") == "there"


def test_the_size_is_limited(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert read_bytes(tmp_path / "file", limit=5) == b"12345"
    with pytest.raises(DocumentError, match="file: may hold 4 bytes; given 5"):
        read_bytes(tmp_path / "file", limit=4)
    with pytest.raises(DocumentError, match="file: may hold 2 bytes; given 5"):
        read_bytes(tmp_path / "file", limit=2)


def test_a_size_that_is_untrue_is_limited_too() -> None:
    assert os.stat("/proc/self/maps").st_size == 0
    with pytest.raises(DocumentError, match="may hold 10 bytes; given 11"):
        read_bytes("/proc/self/maps", limit=10)


def test_text_is_utf8(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"ab\xff")
    with pytest.raises(DocumentError, match="file: must be UTF-8 text; byte 2 is not"):
        read_text(tmp_path / "file")


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ("a\0b", "must not hold a NUL character; given 'a.x00b'"),
        ("~nobody-by-this-name/x", "no user of this machine has the home folder '~nobody-by-this-name/x'"),
        ("x" * 256, "255 bytes in each name"),
        ("x/" * 2100, "4,095 in all"),
        ("\ud800", "must be text that can be written in UTF-8"),
    ],
    ids=["nul", "nobody", "long name", "long path", "surrogate"],
)
def test_a_path_is_one_that_the_file_system_can_hold(given: str, rule: str) -> None:
    with pytest.raises(DocumentError, match=f"^study.yaml: runs: .*{rule}"):
        checked_path(given, where="study.yaml: runs")
    with pytest.raises(DocumentError):
        read_bytes(given)


def test_a_path_of_a_file_starts_at_the_files_folder(tmp_path: Path) -> None:
    assert resolved_path("../x", tmp_path / "a") == tmp_path / "x"
    assert resolved_path("~/x", tmp_path) == Path.home().resolve() / "x"
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(TaskError, match=r"^s.yaml: runs: .*/loop/x leads nowhere"):
        resolved_path("loop/x", tmp_path, where="s.yaml: runs", error=TaskError)
    with pytest.raises(TaskError, match="4,095 in all"):
        resolved_path("x/" * 2000, Path("/" + "y/" * 100), error=TaskError)


def test_a_task_behind_a_loop_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(TaskError, match="loop leads nowhere"):
        find_task_file(str(tmp_path / "loop"))


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="none does not exist"):
        read_bytes(tmp_path / "none")


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("[" * 100_000, "lists and objects may lie 64 deep"),
        ("[" * 65 + "]" * 65, "lists and objects may lie 64 deep"),
        ('{"a":' * 65 + "1" + "}" * 65, "lists and objects may lie 64 deep"),
        ("1" * 5000, "a whole number may have 300 digits; given one of 5,000"),
        ("1" + "0" * 400, "a whole number may have 300 digits; given one of 401"),
        ("1e400", "a number must fit 64 bits; given '1e400'"),
        ("-1e400", "a number must fit 64 bits; given '-1e400'"),
        ('["\\ud800"]', "half of a surrogate pair"),
        ('{"a": 1,\n "a" 2}', "not JSON: line 2, column 6: Expecting ':' delimiter"),
        ("", "not JSON: line 1, column 1"),
    ],
)
def test_json_is_refused_where_it_would_surprise(text: str, rule: str) -> None:
    with pytest.raises(DocumentError, match=f"^x.json: .*{rule}"):
        parse_json(text, "x.json")


def test_json_that_is_plain_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": [1, -2.5e3, null, true, "\\ud83d\\ude00"], "b": {"a": NaN}}')
    read = read_json(tmp_path / "x.json")
    assert read["a"] == [1, -2500.0, None, True, "\U0001f600"]
    assert read["b"]["a"] != read["b"]["a"]
    assert parse_json("-Infinity", "x") == float("-inf")
    assert parse_json("[" * 64 + "]" * 64, "x") is not None


def test_keys_are_unique_and_numbers_finite_where_that_is_asked() -> None:
    assert parse_json('{"a": 1, "a": 2}', "x") == {"a": 2}
    with pytest.raises(DocumentError, match="x: the key 'a' stands twice in one object; remove one"):
        parse_json('[{"a": 1, "a": 2}]', "x", unique=True)
    for word in ("NaN", "Infinity", "-Infinity"):
        with pytest.raises(DocumentError, match=f"x: numbers must be finite; given {word}"):
            parse_json(f"[{word}]", "x", finite=True)


def test_the_caller_names_the_kind_of_error(tmp_path: Path) -> None:
    for call in (
        lambda: read_json(tmp_path / "none", error=TaskError),
        lambda: parse_json("[", "x", error=TaskError),
        lambda: parse_json("1e999", "x", error=TaskError),
        lambda: checked_path("\0", error=TaskError),
    ):
        with pytest.raises(TaskError):
            call()
