"""A program as a metric: it reads written answers as JSON lines and writes a number for each, such as an LLM's verdict.

It is run once for each candidate and suite, by the worker that wrote the answers, and only where task code is allowed.
"""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from evals.errors import ScoreError, TaskError, shortened

METRIC = "judge"
SECONDS = 3600.0  # that a program may take for all answers of a suite


def judged(task: str, words: Sequence[str], answers: Sequence[Mapping[str, Any]]) -> list[float]:
    """Have a program judge answers.

    Args:
        task: whose answers these are, for messages.
        words: the program and its arguments; no shell reads them.
        answers: one object for each, written to the program's input on a line of its own.

    Raises:
        TaskError: the program cannot be run, fails, takes too long, or gives other than a finite number for each line.
    """
    text = "".join(json.dumps(answer, ensure_ascii=False, default=str) + "\n" for answer in answers)
    try:
        done = subprocess.run([*words], input=text, capture_output=True, encoding="utf-8", timeout=SECONDS, check=False)
    except (OSError, UnicodeError) as error:
        raise TaskError(f"task {task}: judge {words[0]} cannot be run: {error}") from error
    except subprocess.TimeoutExpired:
        raise TaskError(f"task {task}: judge {words[0]} took longer than {SECONDS:g} s") from None
    if done.returncode:
        told = shortened(done.stderr[-2000:]) or "nothing on its standard error"
        raise TaskError(f"task {task}: judge {words[0]} ended with {done.returncode}: {told}")
    lines = done.stdout.splitlines()
    if len(lines) != len(answers):
        rule = f"must write a number for each answer, {len(answers)} lines"
        raise TaskError(f"task {task}: judge {words[0]} {rule}; it wrote {len(lines)}")
    return [_number(task, words[0], n, line) for n, line in enumerate(lines, start=1)]


def _number(task: str, program: str, n: int, line: str) -> float:
    try:
        value = float(line)
    except ValueError:
        raise TaskError(
            f"task {task}: judge {program}, line {n}: must be a number; it wrote {shortened(line)!r}"
        ) from None
    if not math.isfinite(value):
        raise ScoreError(f"task {task}: judge {program}, line {n}: must be finite; it wrote {line.strip()}")
    return value
