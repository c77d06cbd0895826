"""The house's plan, read off the imports: packages and rooms point one way, no circle, a door for each library."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("optimizer", "search_spaces", "evals")
# A room of optimizer may import those after it, and what stands beside the rooms at the top only from the last line.
ROOMS = ("demo", "views", "search", "study", "workers", "export", "merging", "checkpoints", "runs", "database")
# These import all rooms; of them only demo does so.
PROGRAMS = ("accept", "cli", "commands", "certify", "lost", "run_study", "learn", "run")
GROUND = ("errors", "exit_codes", "masking", "room", "strict_yaml", "words")  # all may import these
DOORS = {
    "lm_eval": {
        *("evals.lm_asked", "evals.lm_harness", "evals.lm_metric", "evals.lm_outcomes", "evals.lm_requests"),
        *("evals.lm_split", "evals.lm_tasks"),
    },
    "datasets": {"evals.lm_tasks", "evals.rows"},
    "jinja2": {"evals.lm_harness", "evals.templates"},
    "yaml": {"optimizer.strict_yaml", "evals.task_files"},
    "pydantic": {f"optimizer.study.{name}" for name in ("derived", "schema", "section", "task_entry")},
    "ray": {"optimizer.workers.ray_cluster", "optimizer.workers.ray_probe"},
    "numba": {"optimizer.merging.methods.kernels"},
    "peft": {"optimizer.checkpoints.peft_fold"},
    "huggingface_hub": {"optimizer.checkpoints.hub"},
    "fsspec": {"optimizer.checkpoints.urls"},
    "accelerate": {"optimizer.checkpoints.devices"},
    "pyarrow": {"optimizer.runs.outcome_files"},
    "plotly": {
        "optimizer.views.canvas",
        "optimizer.views.front_plot",
        "optimizer.views.plots",
        "optimizer.views.sensitivity_plot",
    },
    "matplotlib": {"optimizer.views.pictures"},
    "typer": {"optimizer.cli", "optimizer.commands", "optimizer.views.terminal"},
}


def modules() -> dict[str, ast.Module]:
    found = {}
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found[name] = ast.parse(file.read_text(encoding="utf-8"))
    return found


MODULES = modules()


def imported(name: str, *, types: bool = False) -> Iterator[str]:
    """What a module imports when it runs, late imports too; with types, also what it imports for its annotations."""
    for node in ast.walk(MODULES[name]) if types else statements(MODULES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield node
            yield from statements(node)


def room_of(name: str) -> str:
    parts = name.split(".")
    return parts[1] if parts[0] == "optimizer" and len(parts) > 1 else ""


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {
        name: {other for other in imported(name, types=True) if other in MODULES and other != name} for name in MODULES
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' <- '.join(error.args[1])}")


def test_packages_point_one_way() -> None:
    for name in MODULES:
        package = name.split(".")[0]
        for other in imported(name, types=True):
            of = other.split(".")[0]
            allowed = of not in PACKAGES or of == package or package == "optimizer"
            assert allowed, f"{name} imports {other}: only optimizer imports another package of ours"


def test_rooms_point_one_way() -> None:
    assert {room_of(name) for name in MODULES} <= {"", *ROOMS, *PROGRAMS, *GROUND}
    for name in MODULES:
        room = room_of(name)
        for other in filter(None, map(room_of, imported(name, types=True))):
            if room in GROUND:
                assert other in GROUND, f"{name} imports {other}: the ground imports no room"
            elif room in ROOMS and other in PROGRAMS:
                assert room == "demo", f"{name} imports {other}: only the demo is a program in a room"
            elif room in ROOMS and other in ROOMS:
                assert ROOMS.index(room) <= ROOMS.index(other), f"{name} imports {other}, which stands before {room}"


@pytest.mark.parametrize("library", DOORS)
def test_a_foreign_library_has_one_door(library: str) -> None:
    users = {name for name in MODULES if any(other.split(".")[0] == library for other in imported(name))}
    assert users == DOORS[library]
