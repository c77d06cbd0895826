"""Docstrings of functions are in one mood: they begin with what to do, as a verb in the imperative."""

from __future__ import annotations

import ast
import re

import pytest

from tests.test_imports import MODULES

VERBS = set(
    re.findall(
        r"\w+",
        """
    Accept Account Add Append Arrange Average Become Begin Bet Blend Build Call Certify Check Choose Collect Compare
    Compute Copy Count Cut Describe Die Draw Drop End Enter Estimate Evaluate Examine Fill Find Foretell Free Give
    Go Hash Have Hold Iterate Join Keep Learn Leave Let List Load Look Make Mark Measure Merge Mix Move Name Negate Open
    Overwrite Owe Parse Partition Plan Print Prune Put Raise Read Refuse Regress Remove Render Reopen Replace
    Require Resolve Return Round Run Say Scale Score Search Select Set Show Simulate Sort Split Start Store Sum Take
    Tell Title Turn Walk Weigh Write Yield Zero
    """,
    )
)


def described(module: ast.Module) -> list[tuple[str, str]]:
    """Each function's name with its docstring; a property may be a noun."""
    return [
        (node.name, text)
        for node in ast.walk(module)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and not any("property" in ast.unparse(decorator) for decorator in node.decorator_list)
        and (text := ast.get_docstring(node)) is not None
    ]


@pytest.mark.parametrize("name", MODULES)
def test_a_function_says_what_to_do(name: str) -> None:
    for function, text in described(MODULES[name]):
        first = text.split()[0].rstrip(",;:")
        assert first in VERBS, f"{name}.{function} begins with {first!r}: say what to do (new verbs go in VERBS)"
