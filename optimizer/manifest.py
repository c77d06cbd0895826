"""tasks.json of a run folder, read without trusting it: its format, its tasks and what its scores depend on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from evals.documents import DocumentError, read_json
from evals.outcomes import TaskInfo
from optimizer.errors import DamagedError, RunError

FORMAT = 1
ROLES = ("domain", "general")
KINDS = {str: "a text", float: "a number", bool: "true or false", int: "a whole number"}


def read_manifest(folder: Path) -> dict[str, Any]:
    """What tasks.json holds: format, tasks (a list) and fingerprint (a mapping).

    Raises:
        RunError: the folder is not a run of this format, or its tasks.json is damaged.
    """
    path = folder / "tasks.json"
    try:
        manifest = read_json(path, finite=True)
    except DocumentError as error:
        raise RunError(f"{folder} is not a run folder: its tasks.json cannot be read: {error}") from None
    if not isinstance(manifest, dict) or not {"format", "tasks", "fingerprint"} <= set(manifest):
        given = ", ".join(map(str, manifest)) if isinstance(manifest, dict) else f"a {type(manifest).__name__}"
        rule = "its tasks.json must hold format, tasks and fingerprint"
        raise RunError(f"{folder} is not a run folder: {rule}; given {given or 'nothing'}")
    if type(manifest["format"]) is not int or manifest["format"] != FORMAT:
        made_by = _brief(manifest["format"])
        raise RunError(f"{path} has format {made_by}, this version reads format {FORMAT}; use the version that made it")
    if not isinstance(manifest["fingerprint"], dict):
        _refuse(path, "fingerprint", "must hold keys and values", manifest["fingerprint"])
    if not isinstance(manifest["tasks"], list):
        _refuse(path, "tasks", "must be a list of tasks", manifest["tasks"])
    tasks_of(manifest, path)
    return manifest


def tasks_of(manifest: Mapping[str, Any], path: Path) -> tuple[TaskInfo, ...]:
    """The tasks of a manifest that was read from `path`."""
    tasks: dict[str, TaskInfo] = {}
    for i, given in enumerate(manifest["tasks"]):
        task = _task(given, path, f"tasks.{i}")
        if task.name in tasks:
            _refuse(path, f"tasks.{i}.name", "must be another than those before it", task.name)
        tasks[task.name] = task
    return tuple(tasks.values())


def _task(given: object, path: Path, key: str) -> TaskInfo:
    if not isinstance(given, dict):
        _refuse(path, key, "must hold keys and values", given)
    kinds = get_type_hints(TaskInfo)
    for name in given:
        if name not in kinds:
            _refuse(path, f"{key}.{name}", f"is not known; the keys here are {', '.join(kinds)}", given[name])
    for field in fields(TaskInfo):
        place = f"{key}.{field.name}"
        if field.name not in given:
            if field.default is MISSING:
                raise DamagedError(f"{path}: {place} must be given")
            continue
        value, kind = given[field.name], kinds[field.name]
        if type(value) is not kind and not (kind is float and type(value) is int):
            _refuse(path, place, f"must be {KINDS[kind]}", value)
        if kind is int and value < 0:
            _refuse(path, place, "must be a whole number", value)
    if given["role"] not in ROLES:
        _refuse(path, f"{key}.role", f"must be {' or '.join(ROLES)}", given["role"])
    return TaskInfo(**given)


def _refuse(path: Path, key: str, rule: str, given: object) -> NoReturn:
    raise DamagedError(f"{path}: {key} {rule}; given {_brief(given)}; restore the file, or name another run folder")


def _brief(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:79]}…"
