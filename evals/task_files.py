"""Task files on disk, read before lm-eval reads them: a task file is code unless shown to be plain data.

lm-eval resolves `!function` while it loads, downloads metrics it does not know, and reads every file below a task's
folder however large; here the first two are refused by name, and only what is needed is read, within bounds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml

from evals.documents import checked_path, read_text, resolved_path
from evals.errors import TaskError

LARGEST_TASK_FILE = 1_000_000  # bytes
MOST_EXPANDED = 5_000_000  # characters and parts of a task file, with every alias written out
MOST_TASK_FILES, MOST_FILES = 2_000, 100_000  # below a group's folder: YAML files, files of any kind
PLAIN_TAG = "tag:yaml.org,2002:"
CODE_KEYS = ("class", "custom_dataset", "use_prompt")
FILE_FORMATS = ("arrow", "csv", "json", "parquet", "text", "xml")  # what datasets reads from files, not by a name
CODE_FLAGS = ("unsafe_code", "hf_evaluate", "trust_remote_code")


def names_a_file(given: str) -> bool:
    """Tell whether a task is given by a path, and not by its name in lm-eval."""
    return "/" in given or "\\" in given or given.endswith((".yaml", ".yml")) or Path(given).is_dir()


def files_of(given: str, *, code: bool) -> list[Path]:
    """List what is read for a task or group that is given by a path: task files, what they include, data files.

    Args:
        given: its YAML file, or the folder that holds it.
        code: list the Python files beside the task files too.

    Raises:
        TaskError: a task file cannot be read.
    """
    first = Path(os.path.normpath(find_task_file(given)))
    is_group = "group" in _top_keys(first)
    waiting = [first, *(task_files_below(first.parent) if is_group else ())]
    found: dict[Path, None] = {}
    while waiting:
        file = waiting.pop(0)
        if file in found or not file.is_file():
            continue
        found[file] = None
        if file.suffix not in (".yaml", ".yml"):
            continue
        tree = _compose(file)
        names = [name for key in ("include", "data_files") for name in _scalars_under(key, tree) if "://" not in name]
        waiting += [Path(os.path.normpath(file.parent / name)) for name in names]
        waiting += sorted(file.parent.glob("*.py")) if code else []
    return list(found)


def _scalars_under(key: str, node: yaml.Node) -> Iterator[str]:
    """Yield every text that stands anywhere under a key."""
    for name, child in _children(node):
        if name == key:
            yield from (
                _value(leaf) for _, leaf in [(name, child), *_pairs(child)] if isinstance(leaf, yaml.ScalarNode)
            )
        else:
            yield from _scalars_under(key, child)


def _children(node: yaml.Node) -> Iterator[tuple[str, yaml.Node]]:
    if isinstance(node, yaml.MappingNode):
        yield from ((_value(name), child) for name, child in node.value)
    elif isinstance(node, yaml.SequenceNode):
        yield from (("", child) for child in node.value)


def find_task_file(given: str) -> Path:
    """Find the YAML file of a task or group: the path itself, or the one in a folder that stands for it."""
    source = resolved_path(given, Path(), error=TaskError)
    if not source.exists():
        raise TaskError(f"no task file or folder at {source}")
    if not source.is_dir():
        return source
    found = {path: _top_keys(path) for path in sorted(source.glob("*.y*ml"))}
    groups = [path for path, keys in found.items() if "group" in keys and "task" in keys]
    tasks = [path for path, keys in found.items() if "task" in keys and "group" not in keys]
    for candidates in (groups, tasks):
        if len(candidates) == 1:
            return candidates[0]
    names = ", ".join(path.name for path in groups or tasks) or "none"
    raise TaskError(f"a task folder holds one task, or one group of tasks: {source} has {names}; name the file")


def tasks_by_name(folder: Path) -> dict[str, Path]:
    """Find the task files below a folder by the task or group that they name; what names none is passed over.

    Raises:
        TaskError: it is no folder, holds too much, or two of its files name the same.
    """
    if not folder.is_dir():
        raise TaskError(f"a folder of tasks is a folder: there is none at {folder}")
    found: dict[str, Path] = {}
    for path in task_files_below(folder):
        try:
            values = {_value(key): value for key, value in _compose(path).value}
        except TaskError:  # what it is, is asked where it is used
            continue
        node = values.get("group") or values.get("task")
        name = _value(node) if isinstance(node, yaml.ScalarNode) else ""
        if name in found:
            raise TaskError(f"tasks below {folder} have different names: {found[name]} and {path} are both {name}")
        if name:
            found[name] = path
    return found


def task_files_below(folder: Path) -> list[Path]:
    """List the YAML files among which a group's tasks are looked for by name, in lm-eval's order."""
    found, seen = [], 0
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in ("__pycache__", ".ipynb_checkpoints")]
        found += [Path(parent, name) for name in files if name.endswith(".yaml")]
        seen += len(files) + len(folders)
        if len(found) > MOST_TASK_FILES or seen > MOST_FILES:
            raise TaskError(
                f"a group's tasks are looked for in all of its folder, which may hold {MOST_TASK_FILES:,} task files "
                f"and {MOST_FILES:,} files: {folder} holds more; give the group a folder of its own"
            )
    return sorted(found)


def require_sound(path: Path, *, metrics: frozenset[str], allow_code: bool) -> None:
    """Refuse a task file, or one it includes, that cannot be read within bounds or, without leave, could run code.

    Args:
        metrics: names lm-eval itself knows; others it would look for as code on the hub.

    Raises:
        TaskError: naming file, line and key.
    """
    waiting, seen = [path.resolve()], {path.resolve()}
    while waiting:
        file = waiting.pop()
        for key, node in _pairs(_compose(file)):
            if not allow_code:
                _require_plain(file, key, node, metrics)
            if key == "include":
                for name in [_value(child) for child in node.value] if isinstance(node.value, list) else [_value(node)]:
                    included = (file.parent / name).resolve()
                    if included in seen:
                        _refuse(file, node, f"include: {included} is included twice", "include a file once")
                    seen.add(included)
                    waiting.append(included)


def _require_plain(file: Path, key: str, node: yaml.Node, metrics: frozenset[str]) -> None:
    if not node.tag.startswith(PLAIN_TAG):
        _refuse(file, node, f"{key or 'value'}: {node.tag} runs code")
    if key in CODE_KEYS or (key in CODE_FLAGS and _value(node) not in ("false", "False", "no")):
        _refuse(file, node, f"{key} runs code")
    if key == "metric" and _value(node) not in metrics:
        _refuse(file, node, f"metric {_value(node)!r} is not one of lm-eval's; it would be looked for as code")
    if key == "include":
        included = [_value(child) for child in node.value] if isinstance(node.value, list) else [_value(node)]
        if any(Path(name).is_absolute() for name in included):
            _refuse(file, node, "include must be relative to the file")


def make_paths_absolute(config: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return a copy of a task's or group's settings with relative data files taken from the folder of its YAML file."""
    config = dict(config)
    options = config.get("dataset_kwargs") or {}
    if not isinstance(options, dict):
        raise TaskError(f"{file}: dataset_kwargs must hold keys and values; given {options!r}")
    if config.get("dataset_path") in FILE_FORMATS and not options.get("data_files") and "data_dir" not in options:
        raise TaskError(
            f"{file}: dataset_path: {config['dataset_path']} is a format of files, and datasets would take every such "
            "file below the current folder; name yours: dataset_kwargs: {data_files: {test: items.jsonl}}"
        )
    if "data_files" in options:
        config["dataset_kwargs"] = {**options, "data_files": _absolute(options["data_files"], file)}
    if isinstance(config.get("task"), list):
        config["task"] = [
            make_paths_absolute(member, file) if isinstance(member, dict) else member for member in config["task"]
        ]
    return config


def _absolute(files: Any, file: Path) -> Any:
    where = f"{file}: dataset_kwargs.data_files"
    if isinstance(files, dict):
        return {split: _absolute(given, file) for split, given in files.items()}
    if isinstance(files, list):
        return [_absolute(given, file) for given in files]
    if not isinstance(files, str):
        raise TaskError(f"{where} must be a file's path, or paths by split; given {files!r}")
    if "://" in files:
        return files
    path = file.parent / checked_path(files, where=where, error=TaskError)
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise TaskError(f"{where}: {path} must be a regular file")
    return str(path)


def _top_keys(path: Path) -> list[str]:
    return [_value(key) for key, _ in _compose(path).value]


def _compose(path: Path) -> yaml.MappingNode:
    text = read_text(path, limit=LARGEST_TASK_FILE, error=TaskError)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(node, yaml.MappingNode):
            raise TaskError(f"task file {path} must hold keys and values")
        _require_bounded(path, node, {})
    except yaml.YAMLError as error:
        raise TaskError(f"task file {path} is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise TaskError(f"task file {path}: its lists and mappings lie too deep in each other") from None
    return node


def _require_bounded(path: Path, node: yaml.Node, sizes: dict[int, int]) -> int:
    """Count a node's size with every alias written out; a few lines of aliases of aliases may stand for any size."""
    open_, size = -1, sizes.get(id(node))
    if size == open_:
        _refuse(path, node, "an alias stands within what it stands for", "write the value out")
    if size is None:
        sizes[id(node)] = open_
        parts = node.value if isinstance(node.value, list) else []
        children = [child for part in parts for child in (part if isinstance(part, tuple) else (part,))]
        size = 1 + len(_value(node)) + sum(_require_bounded(path, child, sizes) for child in children)
        if size > MOST_EXPANDED:
            _refuse(
                path,
                node,
                f"with every alias written out, a task file may have {MOST_EXPANDED:,} characters; this one has more",
                "write its values out",
            )
        sizes[id(node)] = size
    return size


def _pairs(node: yaml.Node, key: str = "", seen: set[tuple[str, int]] | None = None) -> Iterator[tuple[str, yaml.Node]]:
    """Yield every node below, with each key it stands under."""
    seen = set() if seen is None else seen
    if (key, id(node)) in seen:
        return
    seen.add((key, id(node)))
    yield key, node
    if isinstance(node, yaml.MappingNode):
        for name, child in node.value:
            yield "", name
            yield from _pairs(child, _value(name), seen)
    elif isinstance(node, yaml.SequenceNode):
        for child in node.value:
            yield from _pairs(child, key, seen)


def _value(node: yaml.Node) -> str:
    return node.value if isinstance(node.value, str) else ""


TRUST = "set evals.allow_task_code only if you trust the file as code"


def _refuse(path: Path, node: yaml.Node, what: str, mend: str = TRUST) -> NoReturn:
    raise TaskError(f"{path}, line {node.start_mark.line + 1}: {what}; {mend}")
