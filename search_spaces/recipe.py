"""A recipe: checkpoints, merge method and numbers; enough to rebuild a merge.

A frozen value of plain types: a space makes it, JSON carries it to a worker, its digest is its name.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from search_spaces.dtypes import STORED_DTYPES
from search_spaces.errors import SpaceError
from search_spaces.groups import group_at
from search_spaces.kinds import Kinds, checked_kinds, place_of
from search_spaces.parameters import DOMAINS, METHODS, MethodSpec, Parameter, to_float

EXPERT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
SEED = re.compile(r"[A-Za-z0-9_-]{0,64}")
_KEYS = ("method", "base", "experts", "settings")
_EXTRA_KEYS = ("dtype", "seed", "kinds")  # written where they are not empty


@dataclass(frozen=True, slots=True, order=True)
class Setting:
    """One number. An empty expert means every expert, an empty group every group.

    `group` may be a place of one of the recipe's kinds, `layer.07.qk`; where a group's tensors differ, it is the name
    of a tensor, as its checkpoint writes it.
    """

    parameter: str
    expert: str
    group: str
    value: float

    @property
    def where(self) -> str:
        """Say in words what the number is for."""
        return f"{self.parameter} of {self.expert or 'every expert'} in {self.group or 'every group'}"


@dataclass(frozen=True, slots=True)
class Recipe:
    """A merge in numbers. Experts are held sorted by name, settings by (parameter, expert, group).

    Args:
        method: a key of METHODS.
        base: source of the base checkpoint.
        experts: (name, source) of each expert; names are letters, digits, `_` and `-`.
        settings: at most one for each (parameter, expert, group or tensor).
        dtype: what the merge is stored in; empty is the base's.
        seed: of a random method's masks: letters, digits, `_` and `-`; empty is the digest of the numbers.
        kinds: kinds of modules whose tensors have places of their own: name and parts of tensor names.

    Raises:
        SpaceError: an unknown method, parameter, expert or group, a value outside the parameter's domain, a duplicate,
            another dtype, or a seed where nothing is random.
    """

    method: str
    base: str
    experts: tuple[tuple[str, str], ...]
    settings: tuple[Setting, ...]
    dtype: str = ""
    seed: str = ""
    kinds: Kinds = ()
    _values: dict[tuple[str, str, str], float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        spec = method_spec(self.method)
        check_experts(spec, self.experts)
        object.__setattr__(self, "experts", tuple(sorted(self.experts)))
        object.__setattr__(self, "kinds", checked_kinds(self.kinds))
        kinds, experts = [name for name, _ in self.kinds], dict(self.experts)
        settings = tuple(sorted((_checked(setting, spec, experts, kinds) for setting in self.settings), key=_row))
        object.__setattr__(self, "settings", settings)
        values = {_key(setting): setting.value for setting in settings}
        object.__setattr__(self, "_values", values)
        for one, other in pairwise(settings) if len(values) < len(settings) else ():
            if _key(one) == _key(other):
                raise SpaceError("a recipe sets a number once", given=f"{one.value} and {other.value}", where=one.where)
        if self.dtype not in ("", *STORED_DTYPES):
            rule = f"a merge is stored in {', '.join(STORED_DTYPES)}"
            raise SpaceError(rule, given=repr(self.dtype), where="dtype", mend="leave it out for the base's")
        if not SEED.fullmatch(self.seed):
            raise SpaceError("a seed is at most 64 letters, digits, _ and -", given=repr(self.seed), where="seed")
        if self.seed and not spec.random:
            rule = f"{self.method} draws no random masks"
            raise SpaceError(rule, given=f"the seed {self.seed}", where="seed", mend="leave the seed out")

    def value(self, parameter: str, *, expert: str = "", group: str = "") -> float:
        """Give a number: the most specific setting wins, then the method's default.

        Args:
            parameter: one of the method's parameters.
            expert: an expert's name; empty for a parameter that has no value per expert.
            group: a place of the recipe or the name of a tensor; empty for a parameter of the whole recipe.
        """
        known = _parameter(self.method, parameter)
        places = dict.fromkeys([group, self.place_of(group), ""] if group else [""])
        if expert and all(expert != name for name, _ in self.experts):
            names = ", ".join(name for name, _ in self.experts)
            raise SpaceError(f"the recipe's experts are {names}", given=repr(expert), where=parameter)
        for owner in dict.fromkeys([expert, ""]):
            for place in places:
                if (parameter, owner, place) in self._values:
                    return self._values[parameter, owner, place]
        return known.default

    def place_of(self, place: str) -> str:
        """Give the place of a tensor: its kind's, else its group; a place itself is returned as it is.

        Raises:
            SpaceError: it is neither, or a tensor that no recipe changes.
        """
        found = group_at(place, [name for name, _ in self.kinds])
        return found if found == place else place_of(place, self.kinds)

    @property
    def tensors(self) -> frozenset[str]:
        """The tensors that have numbers of their own."""
        return frozenset(place for _, _, place in self._values if place and self.place_of(place) != place)

    def require_places(self, tensors: Iterable[str]) -> None:
        """Raise SpaceError for a number of a group or tensor that the base does not have.

        Args:
            tensors: the base's tensor names.
        """
        known = set(tensors)
        groups = {place_of(name, self.kinds) for name in known}
        for setting in self.settings:
            if setting.group and setting.group not in groups and setting.group not in known:
                layers = sorted(group for group in groups if group.startswith("layer."))
                mend = f"remove the number, or write one of embed, head, {layers[0]} to {layers[-1]}" if layers else ""
                raise SpaceError("a number is for a part of the base", given=setting.group, where=setting.where,
                                 mend=mend)  # fmt: skip

    @property
    def digest(self) -> str:
        """Name what is made: 12 hex digits over method, expert names and settings, whatever the checkpoints' paths.

        A dtype other than the base's, a seed of its own and kinds count too.
        """
        extra = self._extra()
        return self._hash(*([extra] if extra else []))

    @property
    def mask_seed(self) -> str:
        """What random masks hang on: the seed, or else the numbers."""
        return self.seed or self._hash()

    def _extra(self) -> dict[str, object]:
        return {key: getattr(self, key) for key in _EXTRA_KEYS if getattr(self, key)}

    def _hash(self, *extra: object) -> str:
        names = [name for name, _ in self.experts]
        text = _canonical([self.method, names, [_row(setting) for setting in self.settings], *extra])
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def to_json(self) -> str:
        """Write the recipe on one line; a setting is [parameter, expert, group, value]."""
        settings = [_row(setting) for setting in self.settings]
        document = {"method": self.method, "base": self.base, "experts": self.experts, "settings": settings}
        return _canonical(document | self._extra())

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Read what `to_json` wrote.

        Raises:
            SpaceError: not such a text, or not a valid recipe.
        """
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SpaceError("a recipe is JSON", given=str(error), where="the recipe's text") from error
        return cls.from_document(document)

    @classmethod
    def from_document(cls, document: object) -> Recipe:
        """Read what the JSON of a recipe holds.

        Raises:
            SpaceError: not a valid recipe.
        """
        if not isinstance(document, dict) or not set(_KEYS) <= set(document) <= {*_KEYS, *_EXTRA_KEYS}:
            given = sorted(document) if isinstance(document, dict) else type(document).__name__
            mend = f"there may be {' and '.join(_EXTRA_KEYS)} besides"
            rule = f"a recipe has the keys {', '.join(_KEYS)}"
            raise SpaceError(rule, given=given, where="the recipe's text", mend=mend)
        experts = [_strings(row, count=2, where="experts") for row in _rows(document, "experts")]
        settings = [_setting(row) for row in _rows(document, "settings")]
        method, base = _strings([document["method"], document["base"]], count=2, where="method and base")
        dtype, seed = _strings([document.get(key, "") for key in ("dtype", "seed")], count=2, where="dtype and seed")
        kinds = _kinds(document.get("kinds", []))
        return cls(method, base, tuple((name, source) for name, source in experts), tuple(settings), dtype, seed, kinds)

    def short(self) -> str:
        """Describe the recipe on one line for people."""
        words = [f"{self.method} {self.digest}", *([f"stored in {self.dtype}"] if self.dtype else [])]
        for parameter in METHODS[self.method].parameters:
            experts = [name for name, _ in self.experts] if parameter.scope == "expert" else [""]
            words += [text for expert in experts if (text := self._span(parameter.name, expert))]
        return ", ".join(words)

    def _span(self, parameter: str, expert: str) -> str:
        values = [s.value for s in self.settings if s.parameter == parameter and s.expert in ("", expert)]
        if not values:
            return ""
        low, high = f"{min(values):.2f}", f"{max(values):.2f}"
        return " ".join(filter(None, [expert, parameter, low if low == high else f"{low} to {high}"]))


def method_spec(method: str) -> MethodSpec:
    """Find a merge method, or say which there are."""
    if method not in METHODS:
        raise SpaceError("the merge method is not known", given=repr(method), mend=f"one of {', '.join(METHODS)}")
    return METHODS[method]


def check_experts(spec: MethodSpec, experts: Sequence[tuple[str, str]]) -> None:
    """Refuse expert names that repeat or cannot stand in a parameter's name, and too few or too many experts."""
    names = [name for name, _ in experts]
    for name in names:
        if not EXPERT_NAME.fullmatch(name):
            raise SpaceError("an expert's name is made of letters, digits, _ and -", given=repr(name), where="experts")
    if len(set(names)) != len(names):
        raise SpaceError("experts have different names", given=", ".join(names), where="experts")
    least, most = spec.min_experts, spec.max_experts
    if not least <= len(names) or (most is not None and len(names) > most):
        end = "" if most == least else " or more" if most is None else f" to {most}"
        rule = f"{spec.name} merges {least}{end} expert{'' if most == 1 else 's'}"
        raise SpaceError(rule, given=f"{len(names)}: {', '.join(names)}", where="experts")


def _checked(setting: Setting, spec: MethodSpec, experts: dict[str, str], kinds: Sequence[str]) -> Setting:
    parameter = _parameter(spec.name, setting.parameter)
    if setting.expert and (setting.expert not in experts or parameter.scope != "expert"):
        given = repr(setting.expert)
        if parameter.scope != "expert":
            raise SpaceError(f"{parameter.name} has one value for all experts", given=given, where=setting.where)
        raise SpaceError(f"the recipe's experts are {', '.join(experts)}", given=given, where=setting.where)
    if setting.group:
        group_at(setting.group, kinds)  # raises where the group is misspelt
        if parameter.scope == "recipe":
            raise SpaceError(f"{parameter.name} has one value for all groups", given=setting.group, where=setting.where)
    value = to_float(setting.value)
    if value == 0.0:
        value = 0.0  # no -0.0: it equals 0.0 and would print, and hash, as another recipe
    if not parameter.allows(value):
        raise SpaceError(f"{parameter.name} is {DOMAINS[parameter.domain]}", given=value, where=setting.where)
    if value is setting.value:
        return setting
    return Setting(setting.parameter, setting.expert, setting.group, value)


def _parameter(method: str, name: str) -> Parameter:
    spec = METHODS[method]
    found = spec.parameter(name)
    if found is None:
        known = ", ".join(parameter.name for parameter in spec.parameters)
        raise SpaceError(f"{method} has no such parameter", given=repr(name), mend=f"one of {known}")
    return found


def _key(setting: Setting) -> tuple[str, str, str]:
    return setting.parameter, setting.expert, setting.group


def _row(setting: Setting) -> list[str | float]:
    return [setting.parameter, setting.expert, setting.group, setting.value]


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _rows(document: dict[str, object], key: str) -> list[object]:
    rows = document[key]
    if not isinstance(rows, list):
        raise SpaceError(f"{key} is a list", given=type(rows).__name__, where="the recipe's text")
    return rows


def _strings(row: object, *, count: int, where: str) -> list[str]:
    if not isinstance(row, list) or len(row) != count or not all(isinstance(word, str) for word in row):
        raise SpaceError(f"{where} are strings, {count} in a row", given=row, where="the recipe's text")
    return row


def _kinds(rows: object) -> Kinds:
    if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) == 2 for row in rows):
        raise SpaceError("kinds are rows of a name and its patterns", given=rows, where="the recipe's text")
    named = [(_strings([name], count=1, where="a kind's name")[0], patterns) for name, patterns in rows]
    for _, patterns in named:
        if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
            raise SpaceError("a kind's patterns are texts", given=patterns, where="the recipe's text")
    return tuple((name, tuple(patterns)) for name, patterns in named)


def _setting(row: object) -> Setting:
    value = row[-1] if isinstance(row, list) and len(row) == 4 else None
    if not isinstance(row, list) or isinstance(value, bool) or not isinstance(value, int | float):
        raise SpaceError("a setting is [parameter, expert, group, number]", given=row, where="settings")
    parameter, expert, group, _ = row
    if not (isinstance(parameter, str) and isinstance(expert, str) and isinstance(group, str)):
        _strings(row[:3], count=3, where="a setting's words")
    return Setting(parameter, expert, group, value)
