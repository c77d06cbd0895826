"""Attention over a trie: a pass is one row of tokens to the model, and each token reads only its ancestors.

Registered with transformers as one more attention implementation. It cuts a layer's queries into blocks and gives each,
with the keys and values that it reads, to the implementation that the model had; so soft caps and sinks stay that
implementation's own. On a GPU, where each block costs kernels of its own, FlexAttention reads a pass as a whole. A
model that does not use transformers' attention interface ignores all this, which the engine's probe notices.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from evals.packing import Pass, Trie
from evals.products import many_small

NAME = "trie"


@dataclass(frozen=True, slots=True)
class Block:
    """L nodes of a pass and the S that they read; places count the carried nodes first, then those of the pass.

    Args:
        nodes: the L, counted from the pass's first.
        keys: the S places, a slice where they are one run, else (S,).
    """

    nodes: slice
    keys: slice | torch.Tensor


@dataclass(frozen=True)
class Plan:
    """What attention needs to know of a pass: who reads whom, the blocks in order, and what is carried.

    Args:
        order: (S,) which node is at each place, counted from the pass's first.
        ends: (S,) where the descendants of each end, counted alike.
        blocks: of all the pass's nodes, for attention that takes a dense mask.
        carried: how many nodes of earlier passes stand before this one's.
        carry: (C,) the places of the nodes that the next pass carries.
        elsewhere: the same plan on other devices, where layers of a model that is spread over several lie.
    """

    order: torch.Tensor
    ends: torch.Tensor
    blocks: list[Block]
    carried: int
    carry: torch.Tensor
    elsewhere: dict[torch.device, Plan] = field(default_factory=dict)

    @classmethod
    def of(cls, trie: Trie, this: Pass, following: Pass | None, device: torch.device) -> Plan:
        """Plan a pass, keeping what the following one carries."""

        def tensor(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.long, device=device)

        def place(node: int) -> int:
            return trie.depths[node] if node < this.start else len(this.carried) + node - this.start

        blocks = []
        for block in this.blocks:
            keys = [place(node) for node in (*block.above, *range(block.start, block.stop))]
            run = keys[-1] - keys[0] + 1 == len(keys)
            blocks.append(
                Block(
                    slice(block.start - this.start, block.stop - this.start),
                    slice(keys[0], keys[-1] + 1) if run else tensor(keys),
                )
            )
        read = [*this.carried, *range(this.start, this.stop)]
        return cls(
            tensor([node - this.start for node in read]),
            tensor([trie.ends[node] - this.start for node in read]),
            blocks,
            len(this.carried),
            tensor([place(node) for node in following.carried] if following else []),
        )

    def at(self, device: torch.device) -> Plan:
        """Return the same plan on a device; copied there once."""
        if device == self.order.device:
            return self
        if device not in self.elsewhere:
            blocks = [Block(b.nodes, b.keys if isinstance(b.keys, slice) else b.keys.to(device)) for b in self.blocks]
            order, ends, carry = (tensor.to(device) for tensor in (self.order, self.ends, self.carry))
            self.elsewhere[device] = Plan(order, ends, blocks, self.carried, carry)
        return self.elsewhere[device]

    def masks(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """Return 0 where a node reads another, its ancestor or itself, else the lowest number: (1, 1, L, S) a block."""
        return [self._mask(block, dtype) for block in self.blocks]

    def _mask(self, block: Block, dtype: torch.dtype) -> torch.Tensor:
        nodes = torch.arange(block.nodes.start, block.nodes.stop, device=self.order.device)[:, None]
        hidden = (self.order[block.keys] > nodes) | (self.ends[block.keys] <= nodes)
        mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        return mask.masked_fill_(hidden, torch.finfo(dtype).min)[None, None]

    @cached_property
    def tiles(self) -> BlockMask:
        """Which tiles of the whole pass hold anything that is read, for FlexAttention."""
        order, ends = self.order, self.ends

        def reads(_: torch.Tensor, __: torch.Tensor, node: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
            return (order[place] <= node) & (ends[place] > node)

        return create_block_mask(reads, None, None, len(order) - self.carried, len(order), device=order.device)


@dataclass(frozen=True, slots=True)
class Reading:
    """A pass under way, for the layers to share.

    Args:
        plan: of the pass.
        dtype: of the masks; None where FlexAttention reads the pass as a whole, without any.
        inner: the attention implementation that the model had.
        carried: keys and values (1, heads, C, width) of each layer, from the pass before; this one leaves its own.
        masks: by device, one for each of the plan's blocks, made where the first layer there asks for them.
    """

    plan: Plan
    dtype: torch.dtype | None
    inner: str
    carried: dict[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]]
    masks: dict[torch.device, list[torch.Tensor]] = field(default_factory=dict)

    def masks_at(self, device: torch.device) -> list[torch.Tensor]:
        """Return the masks for a layer on a device."""
        assert self.dtype is not None, "FlexAttention takes no masks"
        if device not in self.masks:
            self.masks[device] = self.plan.at(device).masks(self.dtype)
        return self.masks[device]


@contextmanager
def reads_tries(model: PreTrainedModel) -> Iterator[str]:
    """Let a model's layers attend over tries, and say which implementation they had.

    cuDNN stays out of it: it plans anew for blocks of every other length, and that takes ten times as long as reading.

    Raises:
        ValueError: the model does not use transformers' attention interface.
    """
    if not model._supports_attention_backend:
        raise ValueError(f"{type(model).__name__} does not use transformers' attention interface")
    before, planned = model.config._attn_implementation, torch.backends.cuda.cudnn_sdp_enabled()
    model.set_attn_implementation(NAME)
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield before
    finally:
        torch.backends.cuda.enable_cudnn_sdp(planned)
        model.set_attn_implementation(before)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    trie: Reading,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Compute one layer's attention, as transformers asks for it.

    Args:
        query: (1, heads, T, width).
        key, value: (1, key heads, T, width).
        attention_mask: not used.
        trie: the pass; handed on by the model as it came.

    Returns:
        (1, T, heads, width), and no weights.
    """
    plan = trie.plan.at(query.device)
    if plan.carried:
        before = trie.carried[module]
        key, value = (torch.cat(both, dim=2) for both in zip(before, (key, value), strict=True))
    if len(plan.carry):
        trie.carried[module] = key[:, :, plan.carry], value[:, :, plan.carry]
    if trie.dtype is None:
        return _flexibly(query, key, value, trie, **options), None
    inner = _inner(module, trie.inner, query.device)
    found = []
    for block, mask in zip(plan.blocks, trie.masks_at(query.device), strict=True):
        taken = query[:, :, block.nodes], key[:, :, block.keys], value[:, :, block.keys]
        found.append(inner(module, *taken, mask, **options)[0])
    return torch.cat(found, dim=1), None


def _inner(module: torch.nn.Module, name: str, device: torch.device) -> Callable[..., tuple[torch.Tensor, Any]]:
    """Return the implementation of a name; on a CPU one that shares a key's head among queries without copying it."""
    if name == "sdpa" and device.type == "cpu":
        return _sdpa_on_cpu
    eager: Callable[..., tuple[torch.Tensor, Any]] = vars(sys.modules[type(module).__module__])[
        "eager_attention_forward"
    ]
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)


def _sdpa_on_cpu(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    if softcap is not None:
        raise ValueError("softcap")  # as transformers' own: such a model is read another way
    with many_small():
        found = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True)
    return found.transpose(1, 2), None


def _flexibly(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    trie: Reading,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: object,
) -> torch.Tensor:
    """Compute attention of the whole pass in one kernel, which skips the tiles that no node reads."""
    if trie.inner != "sdpa" or softcap is not None or s_aux is not None:
        raise ValueError("FlexAttention stands in for plain scaled dot products only")
    options = {"FORCE_USE_FLEX_ATTENTION": True}  # one kernel, however short the pass
    found = _flex_attention()(
        query, key, value, block_mask=trie.plan.at(query.device).tiles, scale=scaling, enable_gqa=True,
        kernel_options=options,
    )  # fmt: skip
    transposed: torch.Tensor = found.transpose(1, 2)
    return transposed


@cache
def _flex_attention() -> Callable[..., Any]:
    """Return FlexAttention, compiled once for passes of any length; torch gives up after 8 kinds of model otherwise."""
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=True)
    return compiled


AttentionInterface.register(NAME, attend)
