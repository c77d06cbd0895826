"""A stack: a model put together from whole layers of others, in any order and number.

It is what mergekit makes of passthrough with slices, for a merge of a given document only: a search keeps the base's
depth. Like a recipe it is a frozen value of plain types that JSON carries, and its digest is its name.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

from search_spaces.dtypes import STORED_DTYPES, stored_dtype
from search_spaces.errors import SpaceError
from search_spaces.groups import group_of, split_name
from search_spaces.mergekit.settings import Document, mapping, only, value_at, without_remarks
from search_spaces.mergekit.slices import Slice, read_slices
from search_spaces.parameters import to_float
from search_spaces.recipe import EXPERT_NAME

METHOD = "passthrough"
MOST_LAYERS = 10_000  # of a stack: more is a slip of the pen, and would fill memory before it is one
_TOP_KEYS = ("merge_method", "slices", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source")
_KEYS = ("method", "models", "layers", "scales")
_TEXT = "the stack's text"


@dataclass(frozen=True)
class Stack:
    """Layers of models, first to last. Embeddings come with the first layer's model, norm and head with the last's.

    Args:
        models: (name, source) of each model.
        layers: (model's name, its layer) of each layer of the stack.
        scales: (tensor of the stack, factor) where a tensor is not taken as it is; a tensor stands there once.
        dtype: what it is stored in; empty is the dtype of the first layer's model.

    Raises:
        SpaceError: a name, a layer, a factor or a dtype that is none, nothing to stack, or too much.
    """

    models: tuple[tuple[str, str], ...]
    layers: tuple[tuple[str, int], ...]
    scales: tuple[tuple[str, float], ...] = ()
    dtype: str = ""

    def __post_init__(self) -> None:
        names = [name for name, _ in self.models]
        if not self.layers or len(set(names)) < len(names) or not all(map(EXPERT_NAME.fullmatch, names)):
            raise SpaceError("a stack has layers, and models of different names", given=", ".join(names))
        for name, layer in self.layers:
            if name not in names or layer < 0:
                raise SpaceError(f"a layer is one of {', '.join(names)}", given=f"{name}, {layer}", where="layers")
        if len(self.layers) > MOST_LAYERS:
            raise SpaceError(f"a stack has at most {MOST_LAYERS:,} layers", given=len(self.layers), where="layers")
        if len(self._factors) < len(self.scales):
            raise SpaceError("a tensor has one factor", given=len(self.scales), where="scales")
        for tensor, scale in self.scales:
            if not math.isfinite(scale):
                raise SpaceError("a factor is a finite number", given=scale, where=f"scales, {tensor}")
        if self.dtype not in ("", *STORED_DTYPES):
            raise SpaceError(f"a stack is stored in {', '.join(STORED_DTYPES)}", given=self.dtype, where="dtype")

    def source_of(self, tensor: str) -> tuple[str, str]:
        """Give the model and the name there of one of the stack's tensors."""
        path, layer, rest = split_name(tensor)
        if layer is None:
            return self.layers[0 if group_of(tensor) == "embed" else -1][0], tensor
        model, there = self.layers[layer]
        return model, f"{path}.{there}.{rest}" if path else f"{there}.{rest}"

    def tensors(self, names: Iterable[str]) -> tuple[str, ...]:
        """Name the stack's tensors, sorted.

        Args:
            names: the tensors of any of its models.
        """
        parts = {split_name(name)[::2] for name in names if split_name(name)[1] is not None}
        outer = [name for name in names if split_name(name)[1] is None]
        inner = [_joined(path, i, rest) for path, rest in parts for i in range(len(self.layers))]
        return tuple(sorted([*outer, *inner]))

    def scale(self, tensor: str) -> float:
        """Give the factor of a tensor."""
        return self._factors.get(tensor, 1.0)

    @cached_property
    def _factors(self) -> dict[str, float]:
        return dict(self.scales)

    def require_scaled(self, tensors: Iterable[str]) -> None:
        """Raise SpaceError for a factor of a tensor that is not one of the stack's."""
        unknown = sorted(set(self._factors) - set(tensors))
        if unknown:
            rule = f"a factor is for a tensor of the stack, which has {len(self.layers)} layers"
            raise SpaceError(rule, given=unknown[0], where="scales", mend="remove it")

    @property
    def digest(self) -> str:
        """Name the stack: 12 hex digits over all but the models' sources."""
        extra = [self.dtype] if self.dtype else []
        text = json.dumps([METHOD, [name for name, _ in self.models], self.layers, self.scales, *extra])
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def to_json(self) -> str:
        """Write the stack on one line."""
        document: dict[str, object] = {"method": METHOD, "models": self.models, "layers": self.layers}
        document |= {"scales": self.scales} | ({"dtype": self.dtype} if self.dtype else {})
        return json.dumps(document, separators=(",", ":"), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Stack:
        """Read what `to_json` wrote.

        Raises:
            SpaceError: not such a text.
        """
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SpaceError("a stack is JSON", given=str(error), where=_TEXT) from error
        return cls.from_document(document)

    @classmethod
    def from_document(cls, document: object) -> Stack:
        """Read what the JSON of a stack holds.

        Raises:
            SpaceError: not a valid stack.
        """
        if not isinstance(document, dict) or not set(_KEYS) <= set(document) <= {*_KEYS, "dtype"}:
            given = sorted(document) if isinstance(document, dict) else type(document).__name__
            raise SpaceError(f"a stack has the keys {', '.join(_KEYS)}", given=given, where=_TEXT)
        if document["method"] != METHOD:
            raise SpaceError(f"the method of a stack is {METHOD}", given=document["method"], where=_TEXT)
        dtype = document.get("dtype", "")
        if not isinstance(dtype, str):
            raise SpaceError("dtype is a word", given=dtype, where=_TEXT)
        models = tuple((name, str(source)) for name, source in _pairs(document["models"], "models", str))
        layers = tuple((name, int(layer)) for name, layer in _pairs(document["layers"], "layers", int))
        scales = tuple((name, to_float(scale)) for name, scale in _pairs(document["scales"], "scales", int, float))
        return cls(models, layers, scales, dtype)

    def to_mergekit(self, names: Iterable[str], *, dtype: str) -> dict[str, object]:
        """Write the stack as a mergekit document.

        Args:
            names: the tensors of any of its models.
            dtype: what it is stored in; empty where its tensors differ, and keep what they have.
        """
        scaled, sources, places = self._factors, dict(self.models), self.tensors(names)
        own: dict[int, list[str]] = {i: [] for i in range(len(self.layers))}
        for name in places:
            if name in scaled:
                own[self._layer_of(name)].append(name)

        def run(item: tuple[int, tuple[str, int]]) -> object:
            i, (model, layer) = item
            return i if own[i] else (model, layer - i)

        slices = []
        for _, items in groupby(enumerate(self.layers), key=run):
            (i, (model, first)), *rest = items
            source: dict[str, object] = {"model": sources[model], "layer_range": [first, first + 1 + len(rest)]}
            if own[i]:
                rules: list[dict[str, object]] = [{"filter": self.source_of(t)[1], "value": scaled[t]} for t in own[i]]
                source["parameters"] = {"scale": [*rules, {"value": 1.0}]}
            slices.append({"sources": [source]})
        document: dict[str, object] = {"merge_method": METHOD, "slices": slices}
        return document | ({"dtype": dtype} if dtype else {})

    def _layer_of(self, tensor: str) -> int:
        layer = split_name(tensor)[1]
        if layer is None:
            return 0 if group_of(tensor) == "embed" else len(self.layers) - 1
        return layer


def is_stack(document: Document) -> bool:
    """Tell whether a mergekit document asks for a stack."""
    return document.get("merge_method") == METHOD and "slices" in document


def stack_of(document: Document, names: Mapping[str, Iterable[str]], *, base_dtype: str) -> Stack:
    """Read a passthrough document made of slices.

    Args:
        names: the tensors of each model, by its source; they decide which factors the filters give.
        base_dtype: dtype of all floating tensors of the first slice's model; empty where they differ.

    Raises:
        SpaceError: the document asks for something a stack cannot hold.
    """
    document = without_remarks(document)
    only(document, _TOP_KEYS, "the document")
    slices = read_slices(document)
    sources = stack_sources(document)
    named = {source: f"m{i}" for i, source in enumerate(dict.fromkeys(sources))}
    depths = {source: _depth(tensors) for source, tensors in names.items()}
    layers: list[tuple[str, int]] = []
    at: list[tuple[Slice, float]] = []
    for part, source in zip(slices, sources, strict=True):
        _require_layers(part.sources[0].first, part.sources[0].last, depths[source], part.sources[0].where)
        if len(layers) + part.layers > MOST_LAYERS:
            raise SpaceError(f"a stack has at most {MOST_LAYERS:,} layers", given="more", where=part.where)
        steps = part.layers - 1
        for i in range(part.layers):
            layers.append((named[source], part.sources[0].first + i))
            at.append((part, i / steps if steps else 1.0))
    stack = Stack(tuple((name, source) for source, name in named.items()), tuple(layers))
    scales = {}
    for tensor in stack.tensors(next(iter(names.values()))):
        layer = split_name(tensor)[1]
        place = at[0 if group_of(tensor) == "embed" else -1] if layer is None else at[layer]
        part, along = place[0], 0.0 if layer is None else place[1]
        scale = _scale(document, part, stack.source_of(tensor)[1], along)
        if scale != 1.0:
            scales[tensor] = scale
    return Stack(stack.models, stack.layers, tuple(sorted(scales.items())), stored_dtype(document, base_dtype))


def stack_sources(document: Document) -> list[str]:
    """Name the folder or hub id of each slice's only model."""
    found = []
    for part in read_slices(document):
        (first, *others) = part.sources
        if others:
            raise SpaceError(f"a slice of {METHOD} has one model", given=len(part.sources), where=part.where)
        model = first.model
        if isinstance(model, Mapping) and set(model) == {"model"}:
            inner = model["model"]
            model = inner.get("path") if isinstance(inner, Mapping) and set(inner) == {"path"} else inner
        if not isinstance(model, str) or not model or (isinstance(first.model, str) and set(model) & {"@", "+"}):
            mend = "merge an adapter or a revision into a folder first"
            raise SpaceError("a model is a folder or hub id", given=first.model, where=first.where, mend=mend)
        found.append(model)
    return found


def _scale(document: Document, part: Slice, tensor: str, along: float) -> float:
    shared = mapping(document.get("parameters"), "parameters")
    source = part.sources[0]
    scopes = ((source.parameters, source.where), (part.parameters, part.where), (shared, "the document"))
    for scope, where in scopes:
        only(scope, ("scale",), f"{where}, parameters")
        value = value_at(scope.get("scale"), tensor, along, f"{where}, scale")
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise SpaceError("scale is a number", given=value, where=where)
        if not math.isfinite(to_float(value)):
            raise SpaceError("scale is a finite number", given=value, where=where)
        return float(value)
    return 1.0


def _depth(tensors: Iterable[str]) -> int:
    """Count a model's layers."""
    return 1 + max((layer for name in tensors if (layer := split_name(name)[1]) is not None), default=-1)


def _require_layers(first: int, last: int, depth: int, where: str) -> None:
    if last > depth:
        mend = f"write numbers from 0 to {depth}"
        raise SpaceError(f"the model has {depth} layers", given=f"[{first}, {last}]", where=f"{where}.layer_range",
                         mend=mend)  # fmt: skip


def _pairs(rows: object, where: str, *kinds: type) -> list[tuple[str, Any]]:
    """Read a list of [name, value], the value being of just one of these types."""
    listed: list[Any] = rows if isinstance(rows, list) else [rows]
    for row in listed:
        if not isinstance(row, list) or len(row) != 2 or type(row[0]) is not str or type(row[1]) not in kinds:
            words = {str: "text", int: "whole number", float: "number"}
            raise SpaceError(f"{where} is a list of [name, {words[kinds[-1]]}]", given=row, where=_TEXT)
    return [(row[0], row[1]) for row in listed]


def _joined(path: str, layer: int, rest: str) -> str:
    return ".".join(filter(None, [path, str(layer), rest]))
