"""Tasks and groups as lm-eval reads them, each with its metric and its items split in suites; needs no model.

The four modules named lm_* are the one door to lm-eval, which stays the definition of tasks and metrics; its runner,
its HFLM and its caches are not used. Order of use: `load_tasks`, `Harness.prepare` (a tokenizer), then `Harness.score`
(an engine) for every candidate.
"""

from __future__ import annotations

import difflib
import logging
import math
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import datasets
import lm_eval.utils
from lm_eval.api.registry import metric_registry
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind, TaskIndex
from lm_eval.tasks._yaml_loader import load_yaml

from evals.bank import LEAST_DRAWN
from evals.errors import TaskError, error_text
from evals.lm_asked import LoadedTask
from evals.lm_harness import Harness
from evals.lm_metric import (
    choose_judged,
    choose_metric,
    classes_of,
    metric_notes,
    require_measured,
    require_pooled,
    require_usable,
    require_written,
)
from evals.lm_split import Item, asked_certify_items, content_of, error_of_item, read_items, shots_of, split_items
from evals.outcomes import (
    ACCURACIES,
    CERTIFY,
    HOLDOUT,
    KL_TO_BASE,
    REST,
    SEARCH,
    SENTINEL,
    SPARE,
    SUITES,
    TASK,
    TEXT,
    Chat,
    TaskInfo,
    TaskKind,
    TaskSpec,
)
from evals.plain_text import read_pieces
from evals.rows import Row, Rows, read_rows
from evals.task_files import find_task_file, make_paths_absolute, names_a_file, require_sound, task_files_below
from evals.teachers import BYTES_PER_TOKEN
from evals.templates import Sandbox

TO_BASE = (
    "task {name}: forgetting is how far a merge's predictions lie from the base's (KL), as a share of the base's own "
    f"entropy; the base has 0 %, whatever it predicts. A worker keeps {BYTES_PER_TOKEN} bytes for each token"
)


def load_tasks(specs: Sequence[TaskSpec], *, seed: int, chat: Chat, allow_task_code: bool) -> Harness:
    """Read tasks and split their items; loads no model.

    Args:
        seed: chooses which items are search and which holdout items, and the shots of each.
        chat: how prompts are wrapped.
        allow_task_code: trust task files as Python code is trusted.

    Raises:
        TaskError: a task cannot be read, measured or split as asked.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    if not isinstance(lm_eval.utils.env, Sandbox):
        lm_eval.utils.env = Sandbox(lm_eval.utils.env)
    tasks: list[LoadedTask] = []
    for spec in specs:
        task = _load(spec, seed=seed, allow_task_code=allow_task_code)
        if task.info.name in {other.info.name for other in tasks}:
            raise TaskError(f"task names must differ: {task.info.name} is there twice")
        tasks.append(task)
    return Harness(tasks, seed=seed, chat=chat)


def _load(spec: TaskSpec, *, seed: int, allow_task_code: bool) -> LoadedTask:
    if spec.role == SENTINEL and spec.search_items:
        raise TaskError(f"the search has no items of a sentinel task: task {spec.name} has {spec.search_items}")
    least = 0 if spec.role == SENTINEL else 1
    if spec.search_items < least or (spec.holdout_items <= 0 and spec.holdout_items != REST):
        raise TaskError(f"each suite needs items: task {spec.name} has {spec.search_items} and {spec.holdout_items}")
    try:
        if spec.kind == TASK:
            name, loaded = _lm_eval_tasks(spec.name, allow_task_code=allow_task_code)
        else:
            name, loaded = _of_text(Path(spec.name), spec.kind)
    except Exception as error:  # lm-eval and datasets raise whatever their libraries do
        member = _half_built(error)
        if member is None and isinstance(error, TaskError):
            raise
        raise TaskError(f"task {spec.name} cannot be read: {_why(error, member)}") from error
    try:
        return _measured(spec, name, loaded, seed=seed, allow_task_code=allow_task_code)
    except TaskError:
        raise
    except Exception as error:  # settings of another kind than lm-eval expects
        raise TaskError(f"task {spec.name} cannot be used: {error_text(error)}") from error


def _measured(spec: TaskSpec, name: str, loaded: Any, *, seed: int, allow_task_code: bool) -> LoadedTask:
    members = tuple(loaded["tasks"].values())
    for member in members:
        require_usable(member, spec, allow_task_code=allow_task_code)
    if spec.judge:
        require_written(spec, members, allow_task_code=allow_task_code)
    measured = choose_judged(name, members, spec.metric) if spec.judge else choose_metric(name, members, spec.metric)
    metric = KL_TO_BASE if spec.kind == KL_TO_BASE else measured.metric
    if len(members) > 1:
        require_pooled(name, loaded.get("groups", {}).values())
    items, choices = read_items(name, members, spec.group_by)
    if not spec.judge:
        require_measured(name, members, metric, items)
    shots = tuple(shots_of(member, spec) for member in members)
    bank = spec.bank_items if spec.search_items >= LEAST_DRAWN and not measured.statistic else 0
    suites = split_items(name, items, members, replace(spec, bank_items=bank), shots, seed)
    has_bank = bank > 0 and len(suites[SEARCH]) > spec.search_items
    chosen = [choices[item.member, item.hash] for suite in SUITES for item in suites[suite]]
    accuracy = metric in ACCURACIES and members[0].OUTPUT_TYPE == "multiple_choice"
    info = TaskInfo(
        name=name,
        role=spec.role,
        expert=spec.expert,
        output_type=members[0].OUTPUT_TYPE,
        metric=metric,
        higher_is_better=measured.higher_is_better,
        chance=math.fsum(chosen) / len(chosen) if accuracy else 0.0,
        search_items=len(suites[SEARCH]),
        holdout_items=len(suites[HOLDOUT]),
        drawn_items=spec.search_items if has_bank else 0,
        statistic=measured.statistic,
        weight=spec.weight,
    )
    classes = classes_of(name, measured.statistic, members, [item for found in items.values() for item in found])
    shots_from = ("task" if any(shots) else "") if spec.shots is None else "study"
    notes = metric_notes(name, members[0], metric, spec.metric)
    notes += (TO_BASE.format(name=name),) if spec.kind == KL_TO_BASE else ()
    notes += _cluster_notes(name, suites)
    notes += _certify_notes(name, spec, len(suites[CERTIFY]), len(items))
    if measured.statistic:
        notes += (
            f"task {name}: its score, {metric}, is no mean over items, so it has intervals and no certificate; for one "
            "name another metric",
        )
    if spec.bank_items and not has_bank:
        notes += (
            f"task {name} has no bank: a bank needs {LEAST_DRAWN} items for each candidate and more for the anchors, "
            f"and a score that is a mean over items; every candidate is scored on all {len(suites[SEARCH])}",
        )
    return LoadedTask(info, members, measured.filter, shots, shots_from, suites, notes, spec.judge, classes)


def _cluster_notes(name: str, suites: Mapping[str, Sequence[Item]]) -> tuple[str, ...]:
    """Say where items share what they are about, and how many different such things there are."""
    found = [item.cluster or item.hash for items in suites.values() for item in items]
    if len(set(found)) == len(found):
        return ()
    return (
        f"task {name}: its {len(found)} items are about {len(set(found))} passages or documents; those that share one "
        "are resampled and certified together",
    )


def _certify_notes(name: str, spec: TaskSpec, found: int, contents: int) -> tuple[str, ...]:
    """Say where fewer items are left for certificates than a study asks for."""
    asked = asked_certify_items(spec, contents)
    if found >= asked:
        return ()
    mend = "lower items or holdout_items"
    if spec.certify_items == SPARE and spec.shots != 0:
        mend += ", or say certify_items: 0.2, which also keeps them from being worked examples"
    left = f"{found} are" if found else "none is"
    return (f"task {name}: {left} left of {asked} items for certificates; for more, {mend}",)


def _half_built(error: BaseException) -> ConfigurableTask | None:
    """Find the task that lm-eval was making when it failed, and which no exception names."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code is ConfigurableTask.__init__.__code__:
            return cast(ConfigurableTask, frame.f_locals["self"])
    return None


def _why(error: Exception, member: ConfigurableTask | None) -> str:
    """Say what stood in the way of a task; lm-eval tries the first item while it makes one, without saying so."""
    unreachable = isinstance(error, ConnectionError) or str(error).startswith("Couldn't find cache")
    if unreachable and member is not None:
        names = [member.DATASET_PATH, *([member.DATASET_NAME] if member.DATASET_NAME else [])]
        given = ", ".join(map(repr, names))
        return (
            f"its data ({given}) is not on this machine and the hub cannot be reached; on a machine with a network set "
            f'HF_DATASETS_CACHE to a new folder and run `python -c "import datasets; datasets.load_dataset({given})"`, '
            "copy the folder here, and set HF_DATASETS_CACHE to it and HF_HUB_OFFLINE=1; or make a task of a local "
            "file of JSON lines"
        )
    docs = getattr(member, "task_docs", None)
    if docs is not None and member is not None and hasattr(member, "multiple_input"):
        if not len(docs):
            return "no item is left of its data"
        try:
            content_of(member, docs[0])
        except TaskError as own:
            return str(error_of_item(member, 0, own))
    return error_text(error)


@lru_cache(maxsize=1)
def _built_in() -> TaskManager:
    return TaskManager()  # reads some 14,000 files: once per process


def _lm_eval_tasks(source: str, *, allow_task_code: bool) -> tuple[str, Any]:
    """Return a task's name and what lm-eval makes of it: its members, and its groups."""
    if not names_a_file(source):
        manager = _built_in()
        if source not in manager.task_index:
            close = difflib.get_close_matches(source, manager.task_index, n=3)
            mend = f"did you mean {' or '.join(close)}? A" if close else "a"
            raise TaskError(f"no task, group or tag {source!r} in lm-eval; {mend} path needs a slash: ./{source}")
        return source, manager.load([source])
    path = find_task_file(source)
    require_sound(path, metrics=frozenset(metric_registry), allow_code=allow_task_code)
    config = load_yaml(path, resolve_func=False)
    name = config.get("group") or config.get("task")
    if not isinstance(name, str):
        raise TaskError(f"{path}: a task file names a task or a group")
    manager = TaskManager(include_defaults=False)
    index = _tasks_of(path, config)
    manager.task_index.update(index)
    for member in _needed(index, name, path):
        _settle(index[member], allow_task_code=allow_task_code)
    return name, manager.load([name])


def _of_text(path: Path, kind: TaskKind) -> tuple[str, Any]:
    """Return a plain text's name, made of its file's, and lm-eval's task of its items."""
    name = path.stem if kind == TEXT else f"{kind}_{path.stem}"
    rows = [Row({"text": piece.text}, path, piece.line) for piece in read_pieces(path)]
    settings = {
        "task": name,
        "custom_dataset": Rows({"items": rows}),
        "test_split": "items",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    return name, {"tasks": {name: ConfigurableTask(config=settings)}}


def _tasks_of(path: Path, config: dict[str, Any]) -> dict[str, Entry]:
    """Return the task or group of a file, and for a group all tasks below its folder, by name."""
    index: dict[str, Entry] = {}
    TaskIndex.process_cfg(config, path, index)
    for other in task_files_below(path.parent) if isinstance(config.get("task"), list) else ():
        if other.resolve() == path:
            continue
        try:
            require_sound(other, metrics=frozenset(), allow_code=True)  # whether it is plain is asked where it is used
            TaskIndex.process_cfg(load_yaml(other, resolve_func=False), other, index)
        except Exception:  # no task: missed, if it is needed, by its name
            continue
    return index


def _needed(index: Mapping[str, Entry], name: str, path: Path) -> list[str]:
    """List a task or group and all it is made of."""
    needed, waiting = list[str](), [name]
    while waiting:
        found = waiting.pop()
        if found in needed:
            continue
        needed.append(found)
        config = index[found].cfg or {}
        members = [*index[found].tags] if index[found].kind is Kind.TAG else config.get("task")
        for member in members if isinstance(members, list) else ():
            if isinstance(member, str) and member not in index:
                raise TaskError(
                    f"{path}: task: no readable task file below {path.parent} is of a task, group or tag {member!r}, "
                    f"which {found} names"
                )
            own = str(member.get("task") or member.get("group")) if isinstance(member, dict) else str(member)
            waiting += [own] if own in index else []
    return needed


def _settle(entry: Entry, *, allow_task_code: bool) -> None:
    """Check one task file, and give lm-eval its settings with data files found and read."""
    if entry.yaml_path is None:
        return
    require_sound(entry.yaml_path, metrics=frozenset(metric_registry), allow_code=allow_task_code)
    config = load_yaml(entry.yaml_path, resolve_func=allow_task_code)
    entry.cfg = _with_rows(make_paths_absolute(config, entry.yaml_path))
    entry.yaml_path = None


def _with_rows(config: dict[str, Any]) -> dict[str, Any]:
    """Return settings whose JSON files we read: exact messages, and no Arrow cache for workers to share and lock."""
    if isinstance(config.get("task"), list):
        members = [_with_rows(member) if isinstance(member, dict) else member for member in config["task"]]
        return {**config, "task": members}
    options = config.get("dataset_kwargs") or {}
    if config.get("dataset_path") != "json" or set(options) != {"data_files"}:
        return config
    files = options["data_files"]
    splits = files if isinstance(files, dict) else {"train": files}
    named = {config.get(key) for key in ("training_split", "validation_split", "test_split", "fewshot_split")}
    examples = config.get("fewshot_config")
    named = (named | {examples.get("split") if isinstance(examples, dict) else None}) - {None}
    if not named <= set(splits):
        missing = ", ".join(sorted(map(str, named - set(splits))))
        raise TaskError(f"task {config.get('task')}: no split {missing} in data_files, which has {', '.join(splits)}")
    rows = {
        split: [row for path in ([given] if isinstance(given, str) else given) for row in read_rows(Path(path))]
        for split, given in splits.items()
    }
    kept = {key: value for key, value in config.items() if key not in ("dataset_path", "dataset_kwargs")}
    return {**kept, "custom_dataset": Rows(rows)}
