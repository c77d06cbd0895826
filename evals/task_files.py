"""Task files on disk, read before lm-eval reads them: a task file is code unless shown to be plain data.

lm-eval resolves `!function` while it loads, downloads metrics it does not know, and renders templates without a
sandbox; here the first two are refused by name, and the third gets one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml

from evals.errors import TaskError

PLAIN_TAG = "tag:yaml.org,2002:"
CODE_KEYS = ("class", "custom_dataset", "use_prompt")
CODE_FLAGS = ("unsafe_code", "hf_evaluate", "trust_remote_code")


def find_task_file(source: Path) -> Path:
    """The YAML file of a task or group: the path itself, or the one in a folder that stands for it."""
    if not source.exists():
        raise TaskError(f"no task file or folder at {source}")
    if source.is_file():
        return source
    found = {path: _top_keys(path) for path in sorted(source.glob("*.y*ml"))}
    groups = [path for path, keys in found.items() if "group" in keys and "task" in keys]
    tasks = [path for path, keys in found.items() if "task" in keys and "group" not in keys]
    for candidates in (groups, tasks):
        if len(candidates) == 1:
            return candidates[0]
    names = ", ".join(path.name for path in groups or tasks) or "none"
    raise TaskError(f"a task folder holds one task, or one group of tasks: {source} has {names}; name the file")


def require_plain(path: Path, *, metrics: Iterator[str] | frozenset[str]) -> None:
    """Refuse a task file, or one it includes, that could run code.

    Args:
        metrics: names lm-eval itself knows; others it would look for as code on the hub.

    Raises:
        TaskError: naming file, line and key.
    """
    known = frozenset(metrics)
    waiting, seen = [path], set[Path]()
    while waiting:
        file = waiting.pop().resolve()
        if file in seen:
            continue
        seen.add(file)
        for key, node in _pairs(_compose(file)):
            if not node.tag.startswith(PLAIN_TAG):
                _refuse(file, node, f"{key or 'value'}: {node.tag} runs code")
            if key in CODE_KEYS or (key in CODE_FLAGS and _value(node) not in ("false", "False", "no")):
                _refuse(file, node, f"{key} runs code")
            if key == "metric" and _value(node) not in known:
                _refuse(file, node, f"metric {_value(node)!r} is not one of lm-eval's; it would be looked for as code")
            if key == "include":
                included = [_value(child) for child in node.value] if isinstance(node.value, list) else [_value(node)]
                if any(Path(name).is_absolute() for name in included):
                    _refuse(file, node, "include must be relative to the file")
                waiting += [file.parent / name for name in included]


def make_paths_absolute(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A copy of a task's or group's settings with relative data files taken from the folder of its YAML file."""
    config = dict(config)
    options = dict(config.get("dataset_kwargs") or {})
    if "data_files" in options:
        options["data_files"] = _absolute(options["data_files"], folder)
        config["dataset_kwargs"] = options
    if isinstance(config.get("task"), list):
        config["task"] = [
            make_paths_absolute(member, folder) if isinstance(member, dict) else member for member in config["task"]
        ]
    return config


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The items of a file of JSON lines, or of one JSON list.

    Raises:
        TaskError: naming the file and the line.
    """
    if not path.is_file():
        raise TaskError(f"no data file {path} (dataset_kwargs.data_files)")
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        rows = list(enumerate(_json(text, path, 1), 1))
    else:
        rows = [(n, _json(line, path, n)) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    for n, row in rows:
        if not isinstance(row, dict):
            raise TaskError(f"each item must be a JSON object: {path}, line {n}")
    if not rows:
        raise TaskError(f"no item in {path}")
    return [row for _, row in rows]


def _json(text: str, path: Path, line: int) -> Any:
    def refuse(constant: str) -> NoReturn:
        raise TaskError(f"numbers must be finite: {constant} in {path}, line {line}")

    try:
        return json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise TaskError(f"not JSON: {path}, line {line}: {error.msg}") from None


def _absolute(files: Any, folder: Path) -> Any:
    if isinstance(files, dict):
        return {split: _absolute(given, folder) for split, given in files.items()}
    if isinstance(files, list):
        return [_absolute(given, folder) for given in files]
    return files if "://" in str(files) else str(folder / files)


def _top_keys(path: Path) -> list[str]:
    node = _compose(path)
    return [_value(key) for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []


def _compose(path: Path) -> yaml.Node:
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"task file {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise TaskError(f"task file {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(node, yaml.MappingNode):
        raise TaskError(f"task file {path} must hold keys and values")
    return node


def _pairs(node: yaml.Node, key: str = "") -> Iterator[tuple[str, yaml.Node]]:
    """Every node below, with the key it stands under."""
    yield key, node
    if isinstance(node, yaml.MappingNode):
        for name, child in node.value:
            yield "", name
            yield from _pairs(child, _value(name))
    elif isinstance(node, yaml.SequenceNode):
        for child in node.value:
            yield from _pairs(child, key)


def _value(node: yaml.Node) -> str:
    return node.value if isinstance(node.value, str) else ""


def _refuse(path: Path, node: yaml.Node, what: str) -> NoReturn:
    line = node.start_mark.line + 1
    raise TaskError(f"{path}, line {line}: {what}; set evals.allow_task_code only if you trust the file as code")
