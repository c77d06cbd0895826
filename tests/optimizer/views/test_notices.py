"""Logs and warnings of libraries give the terminal no orders."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from optimizer.views.notices import make_notices_printable


def test_a_library_that_repeats_a_name_sends_no_control_character() -> None:
    code = (
        "import logging, warnings, sys; from typer.testing import CliRunner; from optimizer.cli import app; "
        "CliRunner().invoke(app, ['status', 'none']); "
        "logging.getLogger('transformers').warning('a model of type %s', '\\x1b[2Jx'); "
        "warnings.warn('of type \\x9b31m')"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr
    assert "a model of type \\x1b[2Jx" in said
    assert "of type \\x9b31m" in said
    assert not set(said) & set("\x1b\x9b")


def test_other_records_are_as_they_were(caplog: pytest.LogCaptureFixture) -> None:
    before = logging.getLogRecordFactory()
    make_notices_printable()
    try:
        logging.getLogger("any").error("%d of %s\n", 3, "ü")
    finally:
        logging.setLogRecordFactory(before)
    assert caplog.messages == ["3 of ü\n"]
