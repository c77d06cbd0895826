"""What differs between two studies that want the same run folder, in words: models by path, tasks by name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from optimizer.words import count

ABSENT = object()
CHAT = ("chat_template", "system_instruction", "fewshot_as_multiturn")
CHOOSE_ITEMS = ("seed", "items", "holdout_items", "certify_items")  # settings of evals that other items follow from
LONGEST_SHOWN = 300  # characters: a path has to be whole


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], *, old_study: Mapping[str, Any], new_study: Mapping[str, Any]
) -> list[str]:
    """Write a line for each thing that changed between two manifests; empty where none did.

    Args:
        old, new: tasks.json as it is stored and as it would be written.
        old_study, new_study: the study files that belong to them; they name what a manifest has only digests of.
    """
    before, after = _flat(old), _flat(new)
    changed = [key for key in dict.fromkeys([*before, *after]) if before.get(key, ABSENT) != after.get(key, ABSENT)]
    if not changed:
        return []
    settings = _Settings(_joined(old_study), _joined(new_study))
    names, stored = ({task["name"] for task in manifest["tasks"]} for manifest in (new, old))
    came, went = names - stored, stored - names
    lines = [f"task {name}: is in this study only" for name in sorted(came - went)]
    lines += [f"task {name}: is in the stored study only" for name in sorted(went - came)]
    for key in changed:
        if not (came | went).intersection(key):
            lines += _lines_of(key, before.get(key, ABSENT), after.get(key, ABSENT), settings)
    return list(dict.fromkeys(lines))


class _Settings:
    """Two study files side by side, flat."""

    def __init__(self, old: Mapping[tuple[str, ...], Any], new: Mapping[tuple[str, ...], Any]) -> None:
        self.old, self.new = old, new

    def changed(self, *start: str) -> list[str]:
        """Write a line for each setting below a key that is not the same."""
        keys = [key for key in dict.fromkeys([*self.old, *self.new]) if key[: len(start)] == start]
        return [_arrow(".".join(key), *self.pair(key)) for key in keys if self.pair(key)[0] != self.pair(key)[1]]

    def pair(self, key: tuple[str, ...]) -> tuple[Any, Any]:
        return self.old.get(key, ABSENT), self.new.get(key, ABSENT)


def _lines_of(key: tuple[str, ...], old: Any, new: Any, settings: _Settings) -> Iterator[str]:
    match key:
        case ("base",) | ("experts", *_):
            yield _model(("models", *key[:2]), old, new, settings)
        case ("space", *rest):
            yield from settings.changed("space") or [_arrow(f"search space: {'.'.join(rest)}", old, new)]
        case ("items", suite, task):
            chosen = [line for name in CHOOSE_ITEMS for line in settings.changed("evals", name)]
            yield from chosen or [f"task {task}: other items in the {suite} suite ({_counts(old, new)})"]
        case ("requests", suite, task):
            chosen = [line for name in (*CHOOSE_ITEMS, *CHAT) for line in settings.changed("evals", name)]
            yield from chosen or [f"task {task}: other prompts in the {suite} suite: its files or its items changed"]
        case ("tasks", task, field):
            yield _arrow(f"task {task}: {field.replace('_', ' ')}", old, new)
        case ("shots", task):
            yield _arrow(f"task {task}: shots", old, new)
        case ("versions", name):
            yield _arrow(f"version of {name}", old, new)
        case ("storage",):
            yield _arrow("search.storage", old or "study.db in the folder", new or "study.db in the folder")
        case _:
            yield _arrow(".".join(key), old, new)


def _model(key: tuple[str, ...], old: Any, new: Any, settings: _Settings) -> str:
    before, after = settings.pair(key)
    name = ".".join(key)
    if before is not ABSENT and before == after:
        return f"{name}: the files of {after} have changed"
    if before is ABSENT and after is ABSENT:
        return f"{name}: another model"
    words = "" if ABSENT in (old, new) else ", another model"
    return f"{_arrow(name, before, after)}{words}"


def _counts(old: Any, new: Any) -> str:
    sizes = [len(value) if isinstance(value, list) else 0 for value in (old, new)]
    return f"{count(sizes[0], 'item')}, as before" if sizes[0] == sizes[1] else f"{sizes[0]} -> {sizes[1]}"


def _arrow(name: str, old: Any, new: Any) -> str:
    return f"{name}: {_brief(old)} -> {_brief(new)}"


def _brief(value: Any) -> str:
    if value is ABSENT:
        return "(absent)"
    if isinstance(value, list) and len(value) > 5:
        return f"{len(value)} entries"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 1]}…"


def _flat(manifest: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    """Return the comparable part of a manifest by path, tasks by name."""
    tasks = {task["name"]: task for task in manifest["tasks"]}
    return _joined({**manifest["fingerprint"], "tasks": tasks, "storage": manifest["storage"]})


def _joined(tree: Mapping[str, Any], start: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    flat: dict[tuple[str, ...], Any] = {}
    for key, value in tree.items():
        flat.update(_joined(value, (*start, key)) if isinstance(value, dict) and value else {(*start, key): value})
    return flat
