"""The forms in which a study file may write shape, method and modules: their JSON Schema, and what breaks them."""

from __future__ import annotations

import difflib
from typing import Any

from search_spaces.groups import KINDS
from search_spaces.kinds import KNOWN, NAME, RESERVED
from search_spaces.parameters import METHODS
from search_spaces.shape import LEAST, WORDS

MOST_POINTS = 64  # of a curve, blocks of a shape
SHAPES = "uniform, slope, layers, {curve: points} or {blocks: count}"
SHAPE_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"enum": list(WORDS)},
        *(
            {
                "type": "object",
                "properties": {word: {"type": "integer", "minimum": least, "maximum": MOST_POINTS}},
                "required": [word],
                "additionalProperties": False,
            }
            for word, least in LEAST.items()
        ),
    ],
    "default": {"curve": 4},
    "description": "How the weight may vary with depth: " + SHAPES + ".",
}

METHODS_SCHEMA = {
    "anyOf": [
        {"enum": list(METHODS)},
        {"type": "array", "items": {"enum": list(METHODS)}, "minItems": 1, "uniqueItems": True},
    ],
    "default": "task_arithmetic",
    "description": "The merge method, or a list from which each trial chooses; the first of it gives the anchors.",
}


def read_methods(value: object) -> object:
    """Refuse what is no merge method, nor a list of different ones."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names:
        raise ValueError("must be a merge method or a list of them")
    for name in names:
        if name not in METHODS:
            close = difflib.get_close_matches(str(name), METHODS, n=1)
            mend = f'did you mean "{close[0]}"?' if close else f"they are {', '.join(METHODS)}"
            raise ValueError(f"there is no merge method {name!r}; {mend}")
    if len(set(names)) < len(names):
        raise ValueError("must not name a method twice")
    return tuple(names) if isinstance(value, list) else value


MODULES = (*KINDS, *KNOWN)
MODULES_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "array", "items": {"enum": list(MODULES)}},
        {
            "type": "object",
            "properties": {word: {"type": "null"} for word in KINDS},
            "additionalProperties": {
                "anyOf": [
                    {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1, "uniqueItems": True},
                    {"type": "null"},
                ]
            },
        },
    ],
    "default": ["attn", "mlp"],
    "description": "Module kinds with weights of their own; the others follow the layers. A list of words, or kinds of "
    "your own by parts of tensor names, {qk: [q_proj, k_proj], mlp: , experts: }: the first that fits a tensor counts.",
}


TAGS = ("a list", "kinds of its own")  # of the forms of space.modules, in the place of an error


def form_of_modules(value: object) -> str:
    """Tell which form a value has: a list of words, or kinds with patterns."""
    return TAGS[isinstance(value, dict)]


def read_kinds(value: object) -> object:
    """Refuse kinds of modules that no place of a recipe could be named after."""
    for name, patterns in value.items() if isinstance(value, dict) else ():
        if patterns is None and name not in MODULES:
            raise ValueError(f"the kind {name!r} must have parts of tensor names, {{{name}: [q_proj, k_proj]}}")
        if patterns is not None and (name in RESERVED or not NAME.fullmatch(name)):
            rule = "a kind must have a name of its own, of small letters, digits and _"
            raise ValueError(f"{rule}; {', '.join(RESERVED)} are taken; this one is {name!r}")
        if isinstance(patterns, list) and len({str(pattern) for pattern in patterns}) < max(1, len(patterns)):
            raise ValueError(f"the kind {name!r} must have different parts of tensor names")
    if not isinstance(value, dict):
        return value
    return {name: tuple(given) if isinstance(given, list) else given for name, given in value.items()}
