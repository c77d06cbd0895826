"""A study file to start from, with a comment on each thing a person may want to change."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from evals.documents import checked_path, resolved_path
from evals.outcomes import TaskKind
from evals.plain_text import read_pieces
from optimizer.errors import StudyFileError
from optimizer.strict_yaml import dump_line, dump_scalar, shown
from optimizer.study.messages import EXPERT_RULE
from optimizer.study.schema import EXPERT_NAME, NAME

GENERAL = ("arc_easy", "hellaswag")  # tasks to start with
DRAWN, BANK = 30, 200  # items of a task that every merge is scored on, and those that anchors are
JUDGING = 100  # items that judge the front
SUITE_SHARE = 0.4  # of a text with fewer items than both and certificates take: for each of the two
Entry = str | Mapping[str, str | int]  # a task's name or path, or the keys of an entry


def new_study(
    out: Path,
    base: str,
    experts: Sequence[str],
    *,
    domain: Sequence[str] = (),
    general: Sequence[str] = (),
    texts: Sequence[tuple[str, TaskKind, Path]] = (),
) -> str:
    """Write the text of a study file at `out` from a command line's words; existing paths are written from its folder.

    Args:
        experts: each a checkpoint, or NAME=checkpoint.
        texts: plain text files, each a task of its own, with its role ("domain" or "general") and what is measured.

    Raises:
        StudyFileError: a name cannot be used.
        TaskError: a text file cannot be used.
    """
    folder = out.resolve().parent
    named: dict[str, str] = {}
    for given in experts:
        name, source = _named(given)
        if name in named:
            raise StudyFileError(f"experts have different names; given {name!r} twice: write NAME=PATH for one of them")
        named[name] = source_from(source, folder)
    tasks: dict[str, list[Entry]] = {}
    for role, chosen in (("domain", domain), ("general", general)):
        entries = [
            *(source_from(task, folder) for task in chosen),
            *(text_entry(path, kind, folder) for its_role, kind, path in texts if its_role == role),
        ]
        tasks |= {role: entries} if entries else {}
    return commented_study(source_from(base, folder), named, name=run_name(out, list(named)), **tasks)


def text_entry(path: Path, kind: TaskKind, folder: Path) -> Entry:
    """Write the entry of a plain text file, with as many items as it has where that is few; errors as `read_pieces`."""
    found = resolved_path(path, Path.cwd(), error=StudyFileError)
    pieces = len({piece.text for piece in read_pieces(found)})
    items = int(pieces * SUITE_SHARE)
    number = {"items": min(items, DRAWN), "holdout_items": items} if items < JUDGING else {}
    return {kind: source_from(str(found), folder), **number}


def run_name(out: Path, experts: Sequence[str]) -> str:
    """Name the run after the study's file or, where that says nothing or is no name, after the experts."""
    says = out.stem != "study" and re.fullmatch(NAME, out.stem) and not out.stem.endswith(".")
    return out.stem if says else "-".join(experts)[:64]


def _named(given: str) -> tuple[str, str]:
    name, equals, source = given.partition("=")
    if equals and source and "/" not in name:
        if not re.fullmatch(EXPERT_NAME, name):
            raise StudyFileError(f"{EXPERT_RULE}; given {shown(name)}")
        return name, source
    return expert_name(given), given


def expert_name(source: str) -> str:
    """Name an expert after its folder."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(source).name).strip("-_")[:32]
    if not stem:
        raise StudyFileError(f"an expert without a name of its own needs one: write NAME=PATH; given {shown(source)}")
    return stem


def source_from(source: str, folder: Path, where: str = "") -> str:
    """Write a path that exists from a folder; anything else as it stands.

    Raises:
        StudyFileError: no file can have that path; `where` says where it was given.
    """
    path = checked_path(source, where=where, error=StudyFileError)
    if not os.path.exists(path):  # False also where it may not be looked at
        return source
    relative = os.path.relpath(path.resolve(), folder)
    return relative if relative.startswith("..") else f"./{relative}"


def _entry_line(entry: Entry) -> str:
    return dump_scalar(entry) if isinstance(entry, str) else dump_line(entry)


def commented_study(
    base: str,
    experts: Mapping[str, str],
    *,
    name: str,
    domain: Sequence[Entry] = ("path/to/domain_task.yaml",),
    general: Sequence[Entry] = GENERAL,
) -> str:
    """Write the text of a study file with a comment on each thing a person may want to change."""
    experts_text = "\n".join(f"    {dump_scalar(key)}: {dump_scalar(source)}" for key, source in experts.items())
    domain_text = "\n".join(f"    - {_entry_line(task)}" for task in domain)
    general_text = "\n".join(f"    - {_entry_line(task)}" for task in general)
    return f"""\
# A mergefront study. Look at it with `mergefront check FILE`, run it with `mergefront search FILE`.
# Relative paths start at this file's folder.
name: {dump_scalar(name)}

models:
  base: {dump_scalar(base)}  # the checkpoint all experts were trained from: a folder or a hub id
  experts:  # a full checkpoint, or a LoRA adapter on the base
{experts_text}
  # derived: {{NAME: {{from: EXPERT, form: regmean, lambda: 0.4}}}}  # an expert to make of base and expert first

space:
  method: task_arithmetic  # linear, slerp, ties, dare_ties, …; or several: [task_arithmetic, ties]
  shape: {{curve: 4}}  # weight over depth: uniform, slope, layers, {{curve: points}} or {{blocks: count}}
  modules: [attn, mlp]  # kinds with weights of their own; add embed and head to let them differ
  weight: [0, 1]  # must hold 0 (the base) and 1 (the expert)
  # from: recipe.yaml  # start from a recipe.json or a mergekit document; the keys above may then be left out

evals:
  domain:  # what the expert should have learned: an lm-eval task, a task's YAML file, or {{text: FILE}}
{domain_text}
  general:  # what it may have forgotten
{general_text}
  # sentinel: [path/to/other_task.yaml]  # of another form, and never searched on: was ability kept, or a form learned?
  items: {DRAWN}  # of each task, that every merge is scored on at first
  bank: {BANK}  # that base, experts and other anchors are scored on, to estimate others from; left out: no bank
  holdout_items: {JUDGING}  # other items, which judge the front: a number, a share of all such as 0.3, or rest
  certify_items: 0.2  # others, untouched until `mergefront certify` asks for them: a number, a share, or spare
  seed: 0  # chooses the items

anchors:
  derived: [kfac]  # closed forms that make experts of base and expert, at three shares: also regmean, fisher; or none

search:
  trials: 40  # the base, the experts and other anchors are among them
  racing: true  # a merge that is surely beaten stops after its first items, one near the front gets more
  learned: 5  # anchors whose weights are learned by gradients; each costs about as much as 5 other anchors; 0: none
  sampler: auto  # auto, tpe, gp, front, nsga2, nsga3, cmaes, random, qmc
  seed: 0

workers:
  count: 1  # processes, each with its own model in memory; 0: in this process, without Ray
  threads: auto
"""
