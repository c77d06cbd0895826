"""A stack: a model put together from whole layers of others, in any order and number.

It is what mergekit makes of passthrough with slices, for a merge of a given document only: a search keeps the base's
depth. Like a recipe it is a frozen value of plain types that JSON carries, and its digest is its name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby

from search_spaces.errors import SpaceError
from search_spaces.groups import group_of, split_name
from search_spaces.recipe import EXPERT_NAME
from search_spaces.slices import Document, Slice, only, read_slices, resolved

METHOD = "passthrough"
_TOP_KEYS = ("merge_method", "slices", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source")
_KEYS = ("method", "models", "layers", "scales")


@dataclass(frozen=True, slots=True)
class Stack:
    """Layers of models, first to last. Embeddings come with the first layer's model, norm and head with the last's.

    Args:
        models: (name, source) of each model.
        layers: (model's name, its layer) of each layer of the stack.
        scales: (tensor of the stack, factor) where a tensor is not taken as it is.

    Raises:
        SpaceError: a name or a layer that is none, or nothing to stack.
    """

    models: tuple[tuple[str, str], ...]
    layers: tuple[tuple[str, int], ...]
    scales: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        names = [name for name, _ in self.models]
        if not self.layers or len(set(names)) < len(names) or not all(map(EXPERT_NAME.fullmatch, names)):
            raise SpaceError("a stack has layers, and models of different names", given=", ".join(names))
        for name, layer in self.layers:
            if name not in names or layer < 0:
                raise SpaceError(f"a layer is one of {', '.join(names)}", given=f"{name}, {layer}", where="layers")

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
        return dict(self.scales).get(tensor, 1.0)

    @property
    def digest(self) -> str:
        """Name the stack: 12 hex digits over all but the models' sources."""
        text = json.dumps([METHOD, [name for name, _ in self.models], self.layers, self.scales])
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def to_json(self) -> str:
        """Write the stack on one line."""
        document = {"method": METHOD, "models": self.models, "layers": self.layers, "scales": self.scales}
        return json.dumps(document, separators=(",", ":"), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Stack:
        """Read what `to_json` wrote.

        Raises:
            SpaceError: not such a text.
        """
        try:
            document = json.loads(text)
            if set(document) != set(_KEYS) or document["method"] != METHOD:
                raise ValueError(f"given: {', '.join(sorted(document))}")
            models = tuple((str(name), str(source)) for name, source in document["models"])
            layers = tuple((str(name), int(layer)) for name, layer in document["layers"])
            scales = tuple((str(name), float(scale)) for name, scale in document["scales"])
        except (ValueError, TypeError, KeyError) as error:
            raise SpaceError(
                f"a stack has the keys {', '.join(_KEYS)}", given=error, where="the stack's text"
            ) from error
        return cls(models, layers, scales)

    def to_mergekit(self, names: Iterable[str], *, dtype: str) -> dict[str, object]:
        """Write the stack as a mergekit document.

        Args:
            names: the tensors of any of its models.
        """
        scaled, sources, places = dict(self.scales), dict(self.models), self.tensors(names)
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
        return {"merge_method": METHOD, "slices": slices, "dtype": dtype}

    def _layer_of(self, tensor: str) -> int:
        layer = split_name(tensor)[1]
        if layer is None:
            return 0 if group_of(tensor) == "embed" else len(self.layers) - 1
        return layer


def is_stack_text(text: str) -> bool:
    """Tell whether a JSON text is meant to be a stack, and not a recipe."""
    try:
        document = json.loads(text)
    except ValueError:
        return False
    return isinstance(document, dict) and "layers" in document


def is_stack(document: Document) -> bool:
    """Tell whether a mergekit document asks for a stack."""
    return document.get("merge_method") == METHOD and "slices" in document


def stack_of(document: Document, names: Mapping[str, Iterable[str]]) -> Stack:
    """Read a passthrough document made of slices.

    Args:
        names: the tensors of each model, by its source; they decide which factors the filters give.

    Raises:
        SpaceError: the document asks for something a stack cannot hold.
    """
    only(document, _TOP_KEYS, "the document")
    slices = read_slices(document)
    sources = stack_sources(document)
    named = {source: f"m{i}" for i, source in enumerate(dict.fromkeys(sources))}
    layers, at = [], []
    for part, source in zip(slices, sources, strict=True):
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
    return Stack(stack.models, stack.layers, tuple(sorted(scales.items())))


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
    shared = document.get("parameters") or {}
    if not isinstance(shared, Mapping):
        raise SpaceError("a mapping of keys stands here", given=shared, where="parameters")
    source = part.sources[0]
    scopes = ((source.parameters, source.where), (part.parameters, part.where), (shared, "the document"))
    for scope, where in scopes:
        only(scope, ("scale",), f"{where}, parameters")
        value = resolved(scope.get("scale"), tensor, along, f"{where}, scale")
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise SpaceError("scale is a number", given=value, where=where)
        return float(value)
    return 1.0


def _joined(path: str, layer: int, rest: str) -> str:
    return ".".join(filter(None, [path, str(layer), rest]))
