"""tasks.json of a run folder, read without trusting it: its format, its tasks and what its scores depend on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from evals.documents import DocumentError, read_json
from evals.outcomes import SENTINEL, TaskInfo
from optimizer.database.study_url import storage_label
from optimizer.errors import DamagedError, RunError, StudyFileError
from optimizer.masking import redacted
from optimizer.strict_yaml import read_yaml

FORMAT = 1
LONGEST_NAME = 4096  # of a task: it may be a path
ROLES = ("domain", "general", SENTINEL)
OPTIONAL = {field.name: field.default for field in fields(TaskInfo) if field.default is not MISSING}
KINDS = {str: "a text", float: "a number", bool: "true or false", int: "a whole number"}


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read what tasks.json holds: format, tasks (a list), fingerprint (a mapping), study and storage.

    The study is a name, which counts in a database outside the folder; the storage is that database's URL, without a
    password, or None for study.db. A file of an earlier version has neither; its study file tells them.

    Raises:
        RunError: the folder is not a run of this format.
        DamagedError: its tasks.json is damaged.
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
    manifest = {**_from_study_file(folder), **manifest} if "study" not in manifest else manifest
    for key, kinds in (("study", (str,)), ("storage", (str, type(None)))):
        if not isinstance(manifest.get(key, ...), kinds):
            _refuse(path, key, "must be a text", manifest.get(key))
    # An earlier version kept a password that has a slash.
    return manifest | {"storage": manifest["storage"] and redacted(manifest["storage"])}


def stored_study(folder: Path) -> dict[str, Any]:
    """Read what a run's study.yaml holds; nothing where it cannot be read."""
    try:
        return read_yaml(folder / "study.yaml")
    except StudyFileError:
        return {}


def _from_study_file(folder: Path) -> dict[str, Any]:
    """Name the study as its folder was, there and then; `home` is that folder, since the study does not say it."""
    study = stored_study(folder)
    search, runs, name = study.get("search"), study.get("runs"), str(study.get("name", folder.resolve().name))
    storage = search.get("storage") if isinstance(search, dict) else None
    return {
        "study": name,
        "storage": storage_label(storage) if isinstance(storage, str) else None,
        "home": str(Path(runs) / name) if isinstance(runs, str) else None,
    }


def task_entry(task: TaskInfo) -> dict[str, Any]:
    """Return a task as a manifest holds it; what is as it was before there was such a thing is left out."""
    return {name: value for name, value in asdict(task).items() if name not in OPTIONAL or value != OPTIONAL[name]}


def tasks_of(manifest: Mapping[str, Any], path: Path) -> tuple[TaskInfo, ...]:
    """Read the tasks of a manifest that was read from `path`."""
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
        if field.name == "weight" and value <= 0:
            _refuse(path, place, "must be above 0", value)
    if len(given["name"]) > LONGEST_NAME:
        _refuse(path, f"{key}.name", f"must be {LONGEST_NAME:,} characters at most", given["name"])
    if given["role"] not in ROLES:
        _refuse(path, f"{key}.role", f"must be {', '.join(ROLES[:-1])} or {ROLES[-1]}", given["role"])
    if given["role"] == SENTINEL and given["search_items"]:
        rule = "must be 0, since the search has no items of a sentinel task"
        _refuse(path, f"{key}.search_items", rule, given["search_items"])
    if given.get("drawn_items", 0) and given["drawn_items"] >= given["search_items"]:
        _refuse(path, f"{key}.drawn_items", "must be fewer than search_items", given["drawn_items"])
    return TaskInfo(**given)


def _refuse(path: Path, key: str, rule: str, given: object) -> NoReturn:
    raise DamagedError(f"{path}: {key} {rule}; given {_brief(given)}; restore the file, or name another run folder")


def _brief(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:79]}…"
