"""The fuzzer of benchmarks/: what is unclean is found."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
TRACE = 'File "/x/optimizer/run.py", line 7\nTypeError: x'
FUZZ = ROOT / "benchmarks/fuzz.py"


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
    assert fuzz._judged(*ending)[0] == finding
