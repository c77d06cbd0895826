"""Tensor names to layer groups: the sets of tensors that share a weight.

First step of the flow: a checkpoint's names -> `embed`, `layer.07.attn`, `layer.07.mlp`, `head` -> space and recipe.
A group follows from the tensor's name alone, so driver, workers and exported files agree without seeing a checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from functools import lru_cache
from typing import NoReturn

from search_spaces.errors import SpaceError

KINDS = ("embed", "attn", "mlp", "head")
GROUP = re.compile(r"embed|head|layer\.(\d{2,})\.(attn|mlp)")
# Places of a recipe with kinds of modules of its own (search_spaces.kinds): `layer.07.qk`, `embed.qk`
_PLACE = re.compile(r"(?:embed|head|layer\.(\d{2,}))\.([a-z][a-z0-9_]*)")

PASSED = "passed"  # what the text path does not use: no group of a space or recipe, the base's own in every merge

# Matched against the first path component after the layer index, the feed-forward side first:
# `post_attention_layernorm` feeds the feed-forward in Llama and its kin, and OPT calls the same norm
# `final_layer_norm`. Gemma 2 and OLMo 2 put `post_attention_layernorm` on the attention's output; it goes by name too.
# What mixes tokens by a state or a convolution stands where attention does.
_MLP = re.compile(r"mlp|ffn|feed_?forward|_ff_|moe|expert|router|^fc\d|post_attention|(ln|norm)_?2$|final_layer_?norm")
_ATTN = re.compile(
    r"attn|attention|input_layer_?norm|(ln|norm)_?1$|mamba|mixer|conv|ssm|recurrent|temporal|operator_norm|^norm$"
)

# Matched against the whole name of a tensor outside the layers. GPT-NeoX calls its head `embed_out`, LFM2 its last norm
# `embedding_norm`.
_OUTPUT = re.compile(r"lm_head|embed_out|embedding_norm")
_INPUT = re.compile(r"emb|\bwte\b|\bwpe\b")
_LAST_NORM = re.compile(r"norm|\bln_f\b")

_STACK = re.compile(r"(^|[._])(layers?|h|blocks?)$")  # ends the path before a layer's number
_TOWER = re.compile(r"(^|[._])(vision|visual|audio|image|speech|multi_?modal)")


@lru_cache(maxsize=1 << 16)
def group_of(tensor: str) -> str:
    """Name the group a tensor belongs to.

    What a layer holds beside attention and feed-forward goes with the feed-forward, what stands outside layers beside
    embeddings goes with the head: `is_placed` tells these apart.

    Args:
        tensor: a checkpoint's tensor name such as `model.layers.7.mlp.up_proj.weight`.

    Returns:
        `embed`, `layer.07.attn`, `layer.07.mlp` (norms with the module they feed), `head` (last norm and lm_head), or
        PASSED for what reads images or sound.
    """
    if _TOWER.search(tensor):
        return PASSED
    stack, layer, rest = split_name(tensor)
    if layer is not None:
        return f"layer.{layer:02d}.{_layer_kind(rest) or 'mlp'}"
    return _outer_group(stack) or "head"


def is_placed(tensor: str) -> bool:
    """Tell whether a rule knows the module that a tensor belongs to."""
    stack, layer, rest = split_name(tensor)
    return bool(_TOWER.search(tensor) or (_outer_group(stack) if layer is None else _layer_kind(rest)))


def group_tensors(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Partition tensor names into groups, in the order data flows: embed, layers by depth (attn, mlp), head.

    Raises:
        SpaceError: there are two stacks of layers (an encoder), or a gap in the layers.
    """
    found: dict[str, list[str]] = {}
    stacks: dict[str, str] = {}
    for name in sorted(set(names)):
        if (group := group_of(name)) == PASSED:
            continue
        found.setdefault(group, []).append(name)
        stack, layer, _ = split_name(name)
        if layer is not None:
            stacks.setdefault(stack, name)
    if len(stacks) != 1:
        raise SpaceError(
            "a model has one stack of layers",
            given=f"{len(stacks)}: {', '.join(sorted(stacks.values())) or 'no tensor with a layer index'}",
            where="the checkpoint's tensor names",
        )
    groups = sorted(found, key=flow_order)
    layer_count(groups)
    return {group: tuple(found[group]) for group in groups}


def layer_count(groups: Iterable[str]) -> int:
    """Count the layers that groups name.

    Raises:
        SpaceError: there are none, or their indices are not 0, 1, 2, …
    """
    layers = {layer for group in groups if (layer := layer_of(group)) is not None}
    if not layers or layers != set(range(len(layers))):
        raise SpaceError(
            "layers are numbered from 0 without a gap",
            given=sorted(layers) or "no layer",
            where="the checkpoint's tensor names",
        )
    return len(layers)


def layer_of(group: str) -> int | None:
    """Give a group's layer index, None for embed and head."""
    index = _match(group)[1]
    return int(index) if index else None


def kind_of(group: str) -> str:
    """Give a group's kind: `embed`, `attn`, `mlp`, `head` or one of a recipe's own."""
    return _match(group)[2] or group


def group_at(place: str, kinds: Collection[str] = ()) -> str:
    """Give the group of a place, which is a group itself or the name of one of its tensors.

    Args:
        kinds: names of kinds of modules that have places of their own.

    Raises:
        SpaceError: it is neither.
    """
    found = _PLACE.fullmatch(place)
    if found is not None and found[2] in kinds:
        _match(place)
        return place
    if "." not in place or place.startswith("layer."):  # no checkpoint calls its stack of layers so
        if GROUP.fullmatch(place) is None:
            _refuse(place, kinds)
        _match(place)
        return place
    if (group := group_of(place)) == PASSED:
        raise SpaceError("what reads images or sound is passed through as the base has it", given=repr(place))
    return group


def flow_order(group: str) -> tuple[int, str]:
    """Sort key that puts groups in the order data flows through them."""
    layer = layer_of(group)
    if layer is None:
        return (-1, group) if group.startswith("embed") else (10**9, group)
    return (layer, kind_of(group))


def split_name(tensor: str) -> tuple[str, int | None, str]:
    """Split a tensor name at its first whole number: (path before, layer index, path after).

    Later numbers are a layer's own, such as `experts.3` of a mixture. Outside a stack of layers: (name, None, "").
    """
    parts = tensor.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if at is None or _TOWER.search(tensor):
        return tensor, None, ""
    stack, rest = ".".join(parts[:at]), ".".join(parts[at + 1 :])
    return (stack, int(parts[at]), rest) if _STACK.search(stack) or _layer_kind(rest) else (tensor, None, "")


def _layer_kind(rest: str) -> str:
    module = rest.split(".")[0]
    if _MLP.search(module):
        return "mlp"
    return "attn" if _ATTN.search(module) else ""


def _outer_group(name: str) -> str:
    if _OUTPUT.search(name):
        return "head"
    if _INPUT.search(name):
        return "embed"
    return "head" if _LAST_NORM.search(name) else ""


@lru_cache(maxsize=4096)
def _match(group: str) -> re.Match[str]:
    found = GROUP.fullmatch(group) or _PLACE.fullmatch(group)
    if found is None or (found[1] and group != f"layer.{int(found[1]):02d}.{found[2]}"):
        _refuse(group)
    return found


def _refuse(group: str, kinds: Collection[str] = ()) -> NoReturn:
    own = f" (or {', '.join(kinds)} for the last part)" if kinds else ""
    raise SpaceError(
        f"a group is embed, head, layer.NN.attn or layer.NN.mlp{own}", given=repr(group), mend="write layer.07.attn"
    )
