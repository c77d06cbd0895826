"""Kinds of modules finer than a group: `experts` and `router` of a mixture, or a study's own such as {qk: [q_proj, …]}.

A kind is parts of tensor names, as mergekit's filters are. Its tensors leave their groups for places of their own:
`layer.07.qk` in the layers, `embed.qk` and `head.qk` outside them. A recipe carries its kinds, so that a place still
follows from a tensor's name alone.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from search_spaces.errors import SpaceError
from search_spaces.groups import KINDS, PASSED, flow_order, group_of, group_tensors, layer_count, layer_of

Kinds = tuple[
    tuple[str, tuple[str, ...]], ...
]  # name and patterns; a tensor is of the first with a pattern in its name

NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
RESERVED = (*KINDS, "layer", "passed", "weight", "bias")

# As checkpoints of mixtures write them: `.gate.` scores the experts, `gate_proj` is a part of one; Granite fuses its
# experts into two tensors; what shares out the load stands beside the router.
KNOWN: dict[str, tuple[str, ...]] = {
    "experts": (".experts.", "moe.input_linear", "moe.output_linear"),
    "router": (".gate.", ".router.", "e_score_correction_bias", "expert_bias"),
    "shared_expert": ("shared_expert", "shared_mlp"),
}


@lru_cache(maxsize=1 << 16)
def place_of(tensor: str, kinds: Kinds = ()) -> str:
    """Name the place whose number a tensor has: its kind's, else its group."""
    group = group_of(tensor)
    if kinds and group != PASSED:
        for name, patterns in kinds:
            if any(pattern in tensor for pattern in patterns):
                layer = layer_of(group)
                return f"{group}.{name}" if layer is None else f"layer.{layer:02d}.{name}"
    return group


def place_tensors(names: Iterable[str], kinds: Kinds = ()) -> dict[str, tuple[str, ...]]:
    """Partition tensor names into places, in the order data flows.

    Raises:
        SpaceError: as `group_tensors`.
    """
    groups = group_tensors(names)
    if not kinds:
        return groups
    found: dict[str, list[str]] = {}
    for name in (name for tensors in groups.values() for name in tensors):
        found.setdefault(place_of(name, kinds), []).append(name)
    layer_count(groups)
    return {place: tuple(found[place]) for place in sorted(found, key=flow_order)}


def kind_name(pattern: str) -> str:
    """Name a kind after its only pattern: `.mlp.up_proj` is mlp_up_proj, and `mlp`, which a group has, mlp_only."""
    name = re.sub(r"[^a-z0-9]+", "_", pattern.lower()).strip("_")[:24].strip("_")
    name = name if name[:1].isalpha() else f"kind_{name}".strip("_")
    return f"{name}_only" if name in RESERVED else name


def checked_kinds(kinds: Iterable[tuple[str, Sequence[str]]]) -> Kinds:
    """Return kinds in plain tuples after a look at their names and patterns.

    Raises:
        SpaceError: a name that is taken or has other signs, or a pattern that is empty or there twice.
    """
    frozen = tuple((name, tuple(patterns)) for name, patterns in kinds)
    names = [name for name, _ in frozen]
    for name, patterns in frozen:
        where = f"the kind {name}"
        if not NAME.fullmatch(name) or name in RESERVED or names.count(name) > 1:
            rule = "a kind of modules has a name of its own, of small letters, digits and _"
            raise SpaceError(rule, given=repr(name), where="kinds", mend=f"{', '.join(RESERVED)} are taken")
        if not patterns or not all(patterns) or len(set(patterns)) < len(patterns):
            raise SpaceError("a kind has different parts of tensor names", given=list(patterns), where=where)
    return frozen


def kinds_for(modules: Sequence[str], own: Mapping[str, Sequence[str]], tensors: Iterable[str]) -> Kinds:
    """Give the kinds that a study's modules are, each with the patterns that are in this model.

    Args:
        modules: kinds in the study's order, those of groups (attn, mlp, embed, head) among them.
        own: patterns of the study's own kinds.

    Raises:
        SpaceError: a pattern that is in no tensor's name or takes none, or a known kind that the model lacks.
    """
    chosen = [(name, own.get(name) or KNOWN[name]) for name in modules if name in own or name in KNOWN]
    free = [name for name in tensors if group_of(name) != PASSED]
    everything, found = list(free), []
    for name, patterns in checked_kinds(chosen):
        where = f"space.modules.{name}"
        taken = {pattern: [tensor for tensor in free if pattern in tensor] for pattern in patterns}
        if name not in own:
            taken = {pattern: tensors for pattern, tensors in taken.items() if tensors}
            if not taken:
                rule = f"the model has no {name.replace('_', ' ')} that is known here"
                mend = f"give parts of its tensors' names, {{{name}: [...]}}"
                raise SpaceError(rule, given=name, where="space.modules", mend=mend)
        for pattern, tensors in taken.items():
            if not any(pattern in tensor for tensor in everything):
                raise SpaceError("a pattern is a part of some tensor's name", given=repr(pattern), where=where,
                                 mend=_near(pattern, everything))  # fmt: skip
            if not tensors:
                raise SpaceError("a pattern has tensors that no kind before it takes", given=repr(pattern), where=where)
        found.append((name, tuple(taken)))
        free = [tensor for tensor in free if not any(pattern in tensor for pattern in taken)]
    return tuple(found)


def _near(pattern: str, tensors: Sequence[str]) -> str:
    """Name the parts of tensor names that are most like a pattern, or the last layer's tensors."""
    parts = sorted({part for name in tensors for part in name.split(".") if not part.isdecimal()})
    near = difflib.get_close_matches(pattern, parts, n=3, cutoff=0.5)
    return f"near it are {', '.join(near)}" if near else f"there are {', '.join(parts[:12])}"
