"""mergekit documents made of slices, written as one made of whole models.

Read before `reader` reads a document. Slices that together are the base's layers, each from the same layers of all
models, say nothing but which numbers hold where: each number is resolved for each tensor and written as a filter that
fits this tensor alone. Layers in another order or number are a `stack`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from search_spaces.errors import SpaceError
from search_spaces.groups import group_of, layer_count, split_name
from search_spaces.mergekit.settings import Document, mapping, only, present_mapping, value_at

_SLICE_KEYS, _SOURCE_KEYS = ("sources", "parameters"), ("model", "layer_range", "parameters", "name")


@dataclass(frozen=True, slots=True)
class Source:
    """One model of a slice: layers `first` to `last` - 1, and its own parameters."""

    where: str
    model: object  # as the document names it
    first: int
    last: int
    parameters: Document


@dataclass(frozen=True, slots=True)
class Slice:
    """Layers of the output that come from the same places."""

    where: str
    sources: tuple[Source, ...]
    parameters: Document

    @property
    def layers(self) -> int:
        """Number of layers it adds."""
        return self.sources[0].last - self.sources[0].first


def read_slices(document: Document) -> tuple[Slice, ...]:
    """Read the slices of a document.

    Raises:
        SpaceError: a key no slice has, a range that is none, or sources of different lengths.
    """
    entries = document.get("slices")
    if "models" in document:
        raise SpaceError("a document has models or slices", given="both", where="slices")
    if not isinstance(entries, list) or not entries:
        raise SpaceError("slices is a list of sources and parameters", given=entries, where="slices")
    return tuple(_slice(entry, f"slices[{i}]") for i, entry in enumerate(entries))


def flattened(document: Document, groups: Mapping[str, tuple[str, ...]]) -> Document:
    """Write a document of slices as one of models; one without slices is returned as it is.

    Args:
        groups: the base checkpoint's tensors by group; they decide the filters.

    Raises:
        SpaceError: the slices are not the base's layers in order, or a model has no number in some slice.
    """
    if "slices" not in document:
        return document
    slices, shared = read_slices(document), mapping(document.get("parameters"), "parameters")
    _require_whole(slices, layer_count(groups))
    places = list(_places(slices, groups))
    models = {str(source.model): source.model for part in slices for source in part.sources}
    entries = [{"model": model, "parameters": _of_model(name, places)} for name, model in models.items()]
    names = dict.fromkeys([*shared, *(name for part in slices for name in part.parameters)])
    flat = {name: _filters(places, name, shared) for name in names}
    kept = {key: value for key, value in document.items() if key not in ("slices", "parameters")}
    return kept | {"models": entries} | ({"parameters": flat} if flat else {})


@dataclass(frozen=True, slots=True)
class _Place:
    """A tensor, the slice it is in, and how far along it: 0 is the first layer, 1 the last."""

    tensor: str
    part: Slice
    along: float


def _places(slices: Sequence[Slice], groups: Mapping[str, tuple[str, ...]]) -> Iterator[_Place]:
    """Yield the slices' places: embeddings belong to the first and the head to the last, both at its beginning."""
    ends = [part.sources[0].last for part in slices]
    for tensor in (name for names in groups.values() for name in names):
        layer = split_name(tensor)[1]
        if layer is None:
            yield _Place(tensor, slices[0 if group_of(tensor) == "embed" else -1], 0.0)
            continue
        part = slices[next(i for i, end in enumerate(ends) if layer < end)]
        steps = part.layers - 1
        yield _Place(tensor, part, (layer - part.sources[0].first) / steps if steps else 1.0)


def _of_model(name: str, places: Sequence[_Place]) -> dict[str, object]:
    """Give a model's parameters; where a slice leaves it out it has weight 0, which is what leaving out means."""
    given: dict[str, list[object]] = {}
    for place in places:
        source = next((source for source in place.part.sources if str(source.model) == name), None)
        if source is None:
            given.setdefault("weight", []).append({"filter": place.tensor, "value": 0.0})
            continue
        for key, setting in source.parameters.items():
            value = value_at(setting, place.tensor, place.along, f"{source.where}.parameters.{key}")
            if value is not None:
                given.setdefault(key, []).append({"filter": place.tensor, "value": value})
    return dict(given)


def _filters(places: Sequence[_Place], name: str, shared: Document) -> object:
    """Give a parameter of all models: the slice's, else the document's."""
    if isinstance(shared.get(name), bool | int | float) and all(name not in place.part.parameters for place in places):
        return shared[name]
    found: list[object] = []
    for place in places:
        for scope, where in ((place.part.parameters, f"{place.part.where}.parameters"), (shared, "parameters")):
            value = value_at(scope.get(name), place.tensor, place.along, f"{where}.{name}")
            if value is not None:
                found.append({"filter": place.tensor, "value": value})
                break
    return found


def _require_whole(slices: Sequence[Slice], layers: int) -> None:
    position = 0
    mend = "layers in another order or number are for merge_method: passthrough"
    for part in slices:
        ranges = {(source.first, source.last) for source in part.sources}
        if len(ranges) > 1:
            rule = "the models of a slice give the same layers"
            raise SpaceError(rule, given=sorted(ranges), where=part.where, mend=mend)
        if part.sources[0].first != position:
            rule = f"the slice goes on where the one before it ended, at layer {position}"
            raise SpaceError(rule, given=part.sources[0].first, where=part.where, mend=mend)
        position = part.sources[0].last
    if len(slices[-1].sources) > len(slices[0].sources):
        rule = "the last slice has no more models than the first: mergekit would leave the others out of the head"
        mend = "list the model in the first slice too, with weight 0"
        raise SpaceError(rule, given=len(slices[-1].sources), where=slices[-1].where, mend=mend)
    if position != layers:
        raise SpaceError(f"slices end with the base's {layers} layers", given=position, where="slices", mend=mend)


def _slice(entry: object, where: str) -> Slice:
    entry = present_mapping(entry, where)
    only(entry, _SLICE_KEYS, where)
    sources = entry.get("sources")
    if not isinstance(sources, list) or not sources:
        raise SpaceError("sources is a list of models", given=sources, where=where)
    read = tuple(_source(source, f"{where}.sources[{i}]") for i, source in enumerate(sources))
    names = [str(source.model) for source in read]
    if len(set(names)) < len(names):
        raise SpaceError("a slice lists a model once", given=", ".join(names), where=where)
    lengths = {source.last - source.first for source in read}
    if len(lengths) > 1:
        raise SpaceError("the models of a slice give as many layers", given=sorted(lengths), where=where)
    return Slice(where, read, mapping(entry.get("parameters"), f"{where}.parameters"))


def _source(entry: object, where: str) -> Source:
    entry = present_mapping(entry, where)
    only(entry, _SOURCE_KEYS, where)
    span = entry.get("layer_range")
    if not isinstance(span, list) or len(span) != 2 or any(type(end) is not int for end in span):
        raise SpaceError("layer_range is [first, last + 1]", given=span, where=where)
    if not 0 <= span[0] < span[1]:
        raise SpaceError("a layer_range runs from 0 or more to more than that", given=span, where=where)
    parameters = mapping(entry.get("parameters"), f"{where}.parameters")
    return Source(where, entry.get("model"), span[0], span[1], parameters)
