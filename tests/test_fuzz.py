"""The fuzzer of benchmarks/: a short, seeded run over every kind of file is clean, and what is not would be found."""

from __future__ import annotations

import importlib.util
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
TRACE = 'File "/x/optimizer/run.py", line 7\nTypeError: x'
FUZZ = ROOT / "benchmarks/fuzz.py"


def run(*words: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FUZZ), *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    sys.path.insert(0, str(FUZZ.parent))
    try:
        spec = importlib.util.spec_from_file_location("fuzz", FUZZ)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["fuzz"] = module  # dataclasses look there
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FUZZ.parent))
    return module


@pytest.mark.slow
def test_a_short_run_is_clean(tmp_path: Path) -> None:
    done = run("--examples", "160", "--seed", "0", "--out", tmp_path / "unclean", folder=tmp_path)
    kept = "\n".join(path.read_text() for path in sorted(tmp_path.glob("unclean/*")))
    assert done.returncode == 0, done.stdout + done.stderr + kept
    _, *targets, total = (line.split() for line in done.stdout.splitlines())
    assert len(targets) >= 15
    assert sum(int(line[1]) for line in targets) == int(total[1]) >= 160


def test_an_example_does_not_change_the_world(fuzz: ModuleType, tmp_path: Path) -> None:
    for folder in ("world/run", "a"):
        (tmp_path / folder).mkdir(parents=True)
    sqlite3.connect(tmp_path / "world/run/study.db").execute("CREATE TABLE t (x)")
    (tmp_path / "world/study.yaml").write_text("sound")
    before = (tmp_path / "world/run/study.db").read_bytes()
    case = {"files": {"made.yaml": {"link": "study.yaml"}}, "sql": [["INSERT INTO t VALUES (?)", [1]]]}
    fuzz.lay_out(tmp_path / "world", tmp_path / "a/place", case)
    (tmp_path / "a/place/made.yaml").write_text("changed")
    assert (tmp_path / "world/study.yaml").read_text() == "sound"
    assert (tmp_path / "world/run/study.db").read_bytes() == before


def test_what_is_unclean_is_kept_and_replayed(
    fuzz: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Torn:
        def run(self, cases: list[dict[str, object]]) -> list[tuple[object, object]]:
            ran.extend(cases)
            result = fuzz.Result("traceback: TypeError in x.py:1", "what it said", 0.5, 10**9)
            return [(case, result) for case in cases]

    ran: list[dict[str, object]] = []
    case = {"target": "study", "argv": ["check", "\x1b[2J"], "files": {"a": {"text": "\ud800"}}, "sql": []}
    session = fuzz.Session(Torn(), tmp_path / "unclean")
    session.take([case] * (fuzz.KEPT + 2))
    assert session.table().splitlines()[1].split()[:4] == ["study", "5", "0", "5"]
    kept = sorted((tmp_path / "unclean").iterdir())
    assert len(kept) == fuzz.KEPT
    ran.clear()
    assert fuzz.replay(Torn(), kept[0]) == 1
    assert {name: ran[0][name] for name in case} == case
    assert "mergefront 'check' '\\x1b[2J'\ntraceback: TypeError in x.py:1, 0.5 s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ending", "finding"),
    [
        ((0, "", b"fine\n", 0, 1.0, 10**9), ""),
        ((2, "", b"error: this\n", 0, 1.0, 10**9), ""),
        ((None, TRACE, b"", 0, 1.0, 0), "traceback: TypeError in optimizer/run.py:7"),
        ((1, "", b"Traceback (most recent call last)\n", 0, 1.0, 0), "traceback in the output"),
        ((7, "", b"error", 0, 1.0, 0), "exit code 7"),
        ((2, "", b" \n", 0, 1.0, 0), "exit code 2 without a word"),
        ((0, "", b"a\x1b[2J", 0, 1.0, 0), r"control character '\x1b' on the output"),
        ((0, "", b"\xc2\x9b", 0, 1.0, 0), r"control character '\x9b' on the output"),
        ((0, "", b"\xff", 0, 1.0, 0), r"control character '\udcff' on the output"),
        ((0, "", b"a" * 30_000, 0, 1.0, 0), "more than 20,000 characters on the output"),
        ((0, "", b"", 0, 11.0, 0), "more than 10 s"),
        ((0, "", b"", 0, 1.0, 3 * 10**9), "more than 2 GB"),
        ((None, "", b"", 9, 1.0, 0), "killed by SIGKILL"),
    ],
)  # fmt: skip
def test_what_is_unclean_is_found(fuzz: ModuleType, ending: tuple[object, ...], finding: str) -> None:
    assert fuzz.judged(*ending)[0] == finding
