"""The study file: read with a person's overrides, checked, its paths made absolute; and written out in full.

`read_study` is the first step of every command. Nothing is repaired here: a wrong key or value is an error that says
where it stands, what was given and what would be right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from evals.documents import resolved_path
from evals.errors import TaskError
from evals.outcomes import TASK
from evals.task_files import tasks_by_name
from optimizer.checkpoints.urls import is_url
from optimizer.errors import StudyFileError
from optimizer.masking import redacted
from optimizer.strict_yaml import dump_yaml, parse_yaml, read_yaml, shortened, shown
from optimizer.study.derived import DerivedEntry
from optimizer.study.messages import contradictions, schema_problems, text_problems
from optimizer.study.schema import Study, validate
from optimizer.study.task_entry import TaskEntry
from optimizer.words import count

MOST_PROBLEMS = 20  # told at once
MOST_PARTS = 16  # of a key given to --set


def read_study(path: Path | str, overrides: Sequence[str] = ()) -> Study:
    """Read the study in a file, with relative paths made absolute from the file's folder.

    Args:
        path: the YAML file.
        overrides: values set by hand, such as "search.trials=40".

    Raises:
        StudyFileError: names every key that is wrong.
    """
    path = Path(path)
    document = read_yaml(path)
    for override in overrides:
        _apply_override(document, override)
    study = _validate(document, path, overrides)
    return _with_absolute_paths(study, path)


def dump_study(study: Study) -> str:
    """Write the resolved study file, every default in it; user and password of the storage's URL are left out."""
    document = study.model_dump(mode="json", by_alias=True)
    if study.space.from_ is not None:  # what the recipe decides stays open
        document["space"] = study.space.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return redacted(dump_yaml(document))


def stored_storage(run: Path) -> str | None:
    """Return the storage URL in a run folder's study file; None where the study is in the folder itself.

    Raises:
        StudyFileError: the URL has a password, which is not kept in the folder.
    """
    search = read_yaml(run / "study.yaml").get("search") if (run / "study.yaml").is_file() else None
    storage = search.get("storage") if isinstance(search, dict) else None
    if storage is not None and not isinstance(storage, str):
        raise StudyFileError(f"{run / 'study.yaml'}: search.storage must be a text; given {shown(storage)}")
    if storage and "***" in storage:
        raise StudyFileError(
            f"{run}: the study is at {storage}; give its whole URL in MERGEFRONT_STORAGE or by --storage"
        )
    return storage or None


def _apply_override(document: dict[str, Any], override: str) -> None:
    """Put one `a.b=value` into a document that has just been read."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip(". "):
        raise StudyFileError(f'--set: must be key=value, such as "search.trials=40"; given {shown(override)}')
    try:
        override.encode("utf-8")
    except UnicodeEncodeError:
        raise StudyFileError(f"--set: must be UTF-8 text; given {shown(override)}") from None
    *parents, last = key.strip().split(".")
    if len(parents) >= MOST_PARTS:
        raise StudyFileError(f"--set: a key may have {MOST_PARTS} parts; given {len(parents) + 1}")
    place: Any = document
    for depth, part in enumerate(parents):
        if isinstance(place, dict):
            place = place.setdefault(part, {})
            if place is None:
                empty = ".".join(parents[: depth + 1])
                raise StudyFileError(f"{_override_label(override)}: {shortened(empty)} is empty in the study file")
        else:
            place = place[_list_index(place, part, override)]
    value = parse_yaml(text, _override_label(override))
    place[last if isinstance(place, dict) else _list_index(place, last, override)] = value


def _list_index(place: Any, part: str, override: str) -> int:
    """Return the index that a part of a key is in a list."""
    if isinstance(place, list) and part.isdecimal() and len(part) < 10 and int(part) < len(place):
        return int(part)
    rule = f"has {len(place)} entries, counted from 0" if isinstance(place, list) else f"is the value {shown(place)}"
    raise StudyFileError(f"{_override_label(override)}: {shown(part)} cannot be set there: the key before it {rule}")


def _override_label(override: str) -> str:
    return f"--set {redacted(shortened(override))}"


def _validate(document: dict[str, Any], path: Path, overrides: Sequence[str]) -> Study:
    found = validate(document)
    problems = list(contradictions(found)) if isinstance(found, Study) else schema_problems(found)
    problems = list(text_problems(document)) or problems
    if isinstance(found, Study) and not problems:
        return found
    shown_ones = problems[:MOST_PROBLEMS]
    lines = [f"{_origin_of(key, path, overrides)}: {shortened(key) or 'the file'}: {said}" for key, said in shown_ones]
    if more := len(problems) - len(shown_ones):
        lines.append(f"{path}: {count(more, 'more problem')}; mend these first")
    raise StudyFileError("\n".join(lines))


def _origin_of(key: str, path: Path, overrides: Sequence[str]) -> str:
    """Tell where the value at a key comes from: the override that set it or made its section, or the file."""
    for override in reversed(overrides):
        target = override.partition("=")[0].strip()
        if f"{key}.".startswith(f"{target}.") or (target.startswith(f"{key}.") and key not in read_yaml(path)):
            return _override_label(override)
    return str(path)


def _with_absolute_paths(study: Study, path: Path) -> Study:
    """Make every path absolute from the folder of the study's file; a database's from here, as in any URL."""
    paths, models, evals = _Paths(path).including(study.evals.folders), study.models, study.evals
    derived = {name: paths.derived(f"models.derived.{name}", entry) for name, entry in models.derived.items()}
    sources = {
        "base": paths.model("models.base", models.base),
        "experts": {name: paths.model(f"models.experts.{name}", source) for name, source in models.experts.items()},
        "derived": derived,
    }
    tasks = {
        role: tuple(paths.task(f"evals.{role}.{i}.{entry.kind}", entry) for i, entry in enumerate(entries))
        for role, entries in evals.roles.items()
    }
    start = study.space.from_ and paths.absolute("space.from", study.space.from_)
    return study.model_copy(
        update={
            "models": models.model_copy(update=sources),
            "evals": evals.model_copy(update={**tasks, "include": ()}),  # what was found by name is a path now
            "space": study.space.model_copy(update={"from_": start} if start else {}),
            "runs": paths.absolute("runs", study.runs),
            "search": study.search.model_copy(update={"storage": _absolute_url(study.search.storage)}),
        }
    )


@dataclass(frozen=True, slots=True)
class _Paths:
    """The paths in a study file, which start at its folder, and tasks known by name."""

    file: Path
    named: Mapping[str, Path] = field(default_factory=dict)

    def including(self, folders: Sequence[str]) -> _Paths:
        """Return the same with the tasks of some folders known by name.

        Raises:
            StudyFileError: a folder is missing, or two of them name the same task.
        """
        named: dict[str, Path] = {}
        for given in folders:
            try:
                found = tasks_by_name(Path(self.absolute("evals.include", given)))
            except TaskError as error:
                raise StudyFileError(f"{self.file}: evals.include: {error}") from None
            for name in sorted(set(named) & set(found)):
                both = f"{named[name]} and {found[name]}"
                raise StudyFileError(f"{self.file}: evals.include: tasks have different names; {name} is in {both}")
            named |= found
        return replace(self, named=named)

    def absolute(self, key: str, given: str) -> str:
        folder = self.file.resolve().parent
        return str(resolved_path(given, folder, where=f"{self.file}: {key}", error=StudyFileError))

    def model(self, key: str, given: str) -> str:
        """Return a folder's absolute path; a URL, or a hub id (`name/model`, without such a folder), as it stands."""
        if is_url(given):
            return given
        looks_like_path = given.startswith((".", "/", "~")) or given.count("/") > 1
        found = self.absolute(key, given)
        is_there = Path(found).is_dir() or (given.endswith(".gguf") and Path(found).is_file())
        return found if looks_like_path or is_there else given

    def program(self, words: Sequence[str]) -> tuple[str, ...]:
        """Return a program's words, those that are files beside the study file by their whole path."""
        folder = self.file.resolve().parent
        return tuple(str(folder / word) if (folder / word).is_file() else word for word in words)

    def derived(self, key: str, entry: DerivedEntry) -> DerivedEntry:
        """Return a derived expert with its texts' paths made absolute."""
        if entry.calibration is None:
            return entry
        given = {side: getattr(entry.calibration, side) for side in ("domain", "general")}
        texts = {side: self.absolute(f"{key}.calibration.{side}", path) for side, path in given.items()}
        return entry.model_copy(update={"calibration": entry.calibration.model_copy(update=texts)})

    def task(self, key: str, entry: TaskEntry) -> TaskEntry:
        """Return a task with its path made absolute; one of lm-eval's, which has neither slash nor .yaml, as it is."""
        entry = entry.model_copy(update={"judge": self.program(entry.judge)} if entry.judge else {})
        if entry.kind == TASK and entry.source in self.named:
            return entry.model_copy(update={TASK: str(self.named[entry.source])})
        is_path = entry.kind != TASK or "/" in entry.source or entry.source.endswith((".yaml", ".yml"))
        return entry.model_copy(update={entry.kind: self.absolute(key, entry.source)}) if is_path else entry


def _absolute_url(url: str | None) -> str | None:
    if url is None:
        return None
    from optimizer.database.study_url import absolute_url

    return absolute_url(url)
