"""Settings of a mergekit document: a scalar, a gradient over the layers, a filter by part of a name, a list of filters.

The slices, the reader and the stack evaluate them with this module, and refuse with it what does not belong.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import PurePath

from search_spaces.errors import SpaceError
from search_spaces.parameters import to_float

Document = Mapping[str, object]
# mergekit's YAML is of version 1.1, where these words are true and false
SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
REMARKS = ("name", "description", "metadata")
OWN_KEY = "mergefront"  # of a document: what only we read


def value_at(setting: object, tensor: str, along: float, where: str) -> object:
    """Evaluate a setting at one tensor; None where no filter fits.

    Args:
        along: place in [0, 1] between a gradient's first number and its last.
    """
    found = matching(setting, tensor, where)
    if found is None:
        return None
    value, there = found
    if not isinstance(value, list):
        return value
    if not value or any(isinstance(entry, bool) or not isinstance(entry, int | float) for entry in value):
        raise SpaceError("a gradient is a list of numbers", given=value, where=there)
    return interpolate([to_float(entry) for entry in value], along)


def matching(setting: object, tensor: str, where: str) -> tuple[object, str] | None:
    """Choose the scalar or the gradient that holds at a tensor, and say where it stands; None where no filter fits."""
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list) or not setting or not all(isinstance(entry, Mapping) for entry in setting):
        return setting, where
    for i, entry in enumerate(setting):
        only(entry, ("filter", "value"), f"{where}[{i}]")
        word = entry.get("filter")
        if word is None or word == "*" or text(word, f"{where}[{i}].filter") in tensor:
            return matching(entry.get("value"), tensor, f"{where}[{i}].value")
    return None


def interpolate(gradient: Sequence[float], along: float) -> float:
    """Read a gradient at a place in [0, 1], on the line between two of its numbers."""
    place = along * (len(gradient) - 1)
    left = min(int(place), len(gradient) - 1)
    right = min(left + 1, len(gradient) - 1)
    return (1 - (place - left)) * gradient[left] + (place - left) * gradient[right]


def only(value: Document, known: Collection[str], where: str, *, rule: str = "there is no such key here") -> None:
    """Refuse keys that are not known."""
    for key in value:
        if key not in known:
            mend = f"only {', '.join(known)} are read here" if known else "nothing is read here"
            raise SpaceError(rule, given=repr(key), where=where, mend=mend)


def without_remarks(document: Document) -> Document:
    """Leave out what a document says to people, and what it holds for its anchors: `name`, `metadata`, `x-...`."""
    return {key: value for key, value in document.items() if key not in REMARKS and not str(key).startswith("x-")}


def mapping(value: object, where: str) -> Document:
    """Require a mapping; None is an empty one."""
    return {} if value is None else present_mapping(value, where)


def present_mapping(value: object, where: str) -> Document:
    """Require a mapping, which must be there."""
    if not isinstance(value, Mapping):
        raise SpaceError("a mapping of keys stands here", given=value, where=where)
    return value


def text(value: object, where: str) -> str:
    """Require a text."""
    if not isinstance(value, str):
        raise SpaceError("a word stands here", given=value, where=where)
    return value


def folder_name(source: str) -> str:
    """Name an expert after the folder it comes from."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", PurePath(source).name).strip("-_") or "expert"
