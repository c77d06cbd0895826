"""Derived experts: checkpoints that a closed form makes of base and expert over calibration items.

A worker makes them in its resident model. RegMean reads the items layer by layer, the base's on the base's weights and
the expert's on the expert's, so that only one layer's statistics are in memory; Fisher takes one backward pass a few
items at a time; K-FAC does both. Each share of the path becomes a folder that is found again by what it was made of.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evals.layerwise import layers_of
from evals.losses import Example, few_at_a_time, pairs_of, task_losses
from evals.memory import return_freed, where_float64_is
from optimizer.checkpoints.checkpoint import count_nonfinite
from optimizer.checkpoints.new_folder import new_folder
from optimizer.checkpoints.tensor_file import INDEX_FILE, write_tensors
from optimizer.errors import MergeError
from optimizer.export.model_folder import copy_files
from optimizer.merging.fisher import RowSquares, fisher_mean, odds_for, row_distances
from optimizer.merging.gradients import taking_gradients
from optimizer.merging.kfac import Directions, directions, kfac_mean
from optimizer.merging.regmean import Grams, regmean
from optimizer.workers.orders import Derivation
from search_spaces.groups import split_name

if TYPE_CHECKING:
    from evals.engine import Engine
    from optimizer.checkpoints.checkpoint import Checkpoint
    from optimizer.merging.merge import Sources

VERSION = 3  # a new number whenever the same sources and items come to give other tensors
BASE, EXPERT = "base", "expert"  # the two sides of a path
MANIFEST = "derivation.json"


@dataclass(frozen=True, slots=True)
class Deriver:
    """Makes derived experts in a resident model; what it leaves there is no merge.

    Args:
        engine: of the resident model.
        places: where each checkpoint tensor lies in it (`tensor_places`).
        sources: base and experts.
        general, domain: calibration items, read on the base's weights and on the expert's.
    """

    engine: Engine
    places: Mapping[str, Tensor]
    sources: Sources
    general: Sequence[Example]
    domain: Sequence[Example]

    def derive(self, path: Derivation) -> list[Path]:
        """Make what is not there yet, and return the folder of each share.

        Raises:
            MergeError: a folder cannot be written, or a tensor is not finite.
            ScoreError: a loss is not finite.
        """
        digest = self._digest(path)
        folders = {share: path.folder / f"{path.expert}-{path.form}-{share:g}-{digest}" for share in path.shares}
        missing = {share: folder for share, folder in folders.items() if not (folder / MANIFEST).is_file()}
        if missing:
            make = {"kfac": self._kfac, "regmean": self._regmean, "fisher": self._fisher}[path.form]
            with ExitStack() as stack:
                drafts = {share: stack.enter_context(new_folder(folder)) for share, folder in missing.items()}
                writer = _Writer(drafts, self.sources.base)
                for names, tensors_of in make(path.expert, list(missing)):
                    writer.write(names, tensors_of)
                    del tensors_of  # its layer's statistics end before the next layer's begin
                    return_freed()
                writer.finish({"form": path.form, "expert": path.expert, "digest": digest})
        return list(folders.values())

    def _digest(self, path: Derivation) -> str:
        items = [
            [e.task, e.item, [[p.context, p.continuation] for p in e.pairs]] for e in (*self.general, *self.domain)
        ]
        expert = self.sources.experts[path.expert]
        told = [
            VERSION,
            path.form,
            self.sources.base.fingerprint,
            expert.fingerprint,
            str(self.engine.model.dtype),
            items,
        ]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]

    def _regmean(self, expert: str, shares: Sequence[float]) -> Iterator[_Made]:
        base, other = self.sources.base, self.sources.experts[expert]
        for names, grams in self._inputs(expert):
            yield names, _regmean_tensors(base, other, grams)
        yield _by_layer(base.names)[None], _on_line(base, other)

    def _inputs(self, expert: str) -> Iterator[tuple[Sequence[str], dict[str, Grams]]]:
        """Read both sides' items a layer at a time; give its tensors' names, and the Gram matrices of its inputs."""
        base, other = self.sources.base, self.sources.experts[expert]
        layers, hidden = layers_of(self.engine.model), self.engine.model.config.get_text_config().hidden_size
        of_layer = _by_layer(base.names)
        sides = {BASE: (base, self.general), EXPERT: (other, self.domain)}
        pairs = {side: pairs_of(examples) for side, (_, examples) in sides.items()}
        with self.engine.layer_by_layer(pairs) as reading:
            for side, (checkpoint, _) in sides.items():
                self._load(checkpoint, of_layer[None])
                reading.advance(side)
            for i, layer in enumerate(layers):
                modules = self._linear(layer)
                grams = {}
                for side, (checkpoint, _) in sides.items():
                    self._load(checkpoint, of_layer[i])
                    grams[side] = Grams(hidden)
                    with grams[side].adding(modules):
                        reading.advance(side)
                yield of_layer[i], grams

    def _linear(self, layer: torch.nn.Module) -> dict[str, torch.nn.Module]:
        """Return the linear modules of a layer by the checkpoint's name of their weight, (out, in)."""
        at = {place.data_ptr(): name for name, place in self.places.items()}
        linear = [module for module in layer.modules() if isinstance(module, torch.nn.Linear)]
        return {at[m.weight.data_ptr()]: m for m in linear if m.weight.data_ptr() in at}

    def _fisher(self, expert: str, shares: Sequence[float]) -> Iterator[_Made]:
        tensors_of = _fisher_tensors(self._rows(expert, shares))
        for names in _by_layer(self.sources.base.names).values():
            yield names, tensors_of

    def _kfac(self, expert: str, shares: Sequence[float]) -> Iterator[_Made]:
        rows = self._rows(expert, shares, power=0.5)
        for names, grams in self._inputs(expert):
            yield names, _kfac_tensors(rows, grams)
        yield _by_layer(self.sources.base.names)[None], _fisher_tensors(rows)

    def _rows(self, expert: str, shares: Sequence[float], power: float = 1.0) -> _Rows:
        """Measure the rows' squared gradients, to a power, and find the odds at which rows go so far on average."""
        base, other = self.sources.base, self.sources.experts[expert]
        means = {}
        for side, checkpoint, examples in ((BASE, base, self.general), (EXPERT, other, self.domain)):
            self._load(checkpoint, base.names)
            squares = RowSquares()
            with taking_gradients(self.engine.model, self.places, squares.add):
                for batch in few_at_a_time(examples):
                    self.engine.backward(pairs_of(batch), partial(_loss, batch))
                    return_freed()
            means[side] = {name: rows**power for name, rows in squares.means().items()}
        for side, asked in ((BASE, means[EXPERT]), (EXPERT, means[BASE])):
            for name, rows in asked.items():  # of a mixture: an expert that no item of this side is sent to
                means[side].setdefault(name, torch.zeros_like(rows))
        distances = {name: row_distances(base.tensor(name), other.tensor(name)) for name in means[BASE]}
        odds = {share: odds_for(share, means[BASE], means[EXPERT], distances) for share in shares}
        return _Rows(base, other, means[BASE], means[EXPERT], odds)

    def _load(self, checkpoint: Checkpoint, names: Sequence[str]) -> None:
        for name in names:
            self.places[name].copy_(checkpoint.tensor(name))


TensorsOf = Callable[[str, float], Tensor]  # (name, share) -> a tensor, in float32 or as the base has it
_Made = tuple[Sequence[str], TensorsOf]


class _Writer:
    """Writes the folders of a path side by side, a shard for each layer."""

    def __init__(self, folders: Mapping[float, Path], base: Checkpoint) -> None:
        self._folders, self._base = folders, base
        self._count = len(_by_layer(base.names))
        self._map: dict[str, str] = {}

    def write(self, names: Sequence[str], tensors_of: TensorsOf) -> None:
        """Write the next shard of every folder, rounded once to the base's dtype."""
        shard = f"model-{len(set(self._map.values())) + 1:05d}-of-{self._count:05d}.safetensors"
        kinds = {name: self._base.kind(name) for name in names}
        for share, folder in self._folders.items():
            write_tensors(folder / shard, kinds, partial(self._rounded, tensors_of, share))
        self._map |= dict.fromkeys(names, shard)

    def _rounded(self, tensors_of: TensorsOf, share: float, name: str) -> Tensor:
        tensor = tensors_of(name, share).to(self._base.dtype(name)).cpu()
        if bad := count_nonfinite(tensor):
            raise MergeError(f"a derived expert must be finite: {name} has {bad} NaN or infinite values at {share:g}")
        return tensor

    def finish(self, about: Mapping[str, str]) -> None:
        """Write index, config, tokenizer and manifest: a folder is whole from then on."""
        index = {"metadata": {"total_size": self._base.bytes}, "weight_map": self._map}
        for share, folder in self._folders.items():
            (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            copy_files(self._base.folder, folder)
            (folder / MANIFEST).write_text(json.dumps({**about, "share": share}, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """What Fisher and K-FAC know of base and expert: by tensor what its rows count (rows,), by share the odds."""

    base: Checkpoint
    expert: Checkpoint
    of_base: Mapping[str, Tensor]
    of_expert: Mapping[str, Tensor]
    odds: Mapping[float, float]

    def of(self, name: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Give a tensor's base, expert, and rows of either, on a device."""
        whole = self.base.tensor(name), self.expert.tensor(name), self.of_base[name], self.of_expert[name]
        base, expert, of_base, of_expert = (tensor.to(device) for tensor in whole)
        return base, expert, of_base, of_expert


def _fisher_tensors(rows: _Rows) -> TensorsOf:
    def tensors_of(name: str, share: float) -> Tensor:
        if name not in rows.of_base:
            return rows.base.tensor(name)
        return fisher_mean(*rows.of(name, rows.of_base[name].device), rows.odds[share])

    return tensors_of


def _kfac_tensors(rows: _Rows, grams: Mapping[str, Grams]) -> TensorsOf:
    """Find the directions of a layer's inputs, modules with one input having them together; Gram matrices end here."""
    plain = _fisher_tensors(rows)
    found: dict[int, list[Directions]] = {}
    along = {}
    for name in grams[BASE].sums.keys() & grams[EXPERT].sums.keys() & rows.of_base.keys():
        shared = id(grams[BASE].sums[name])
        if shared not in found:
            means = ([*map(where_float64_is, grams[side].mean(name))] for side in (BASE, EXPERT))
            found[shared] = directions(*means)
        along[name] = found[shared]
        for side in (BASE, EXPERT):
            del grams[side].sums[name]
    for side in (BASE, EXPERT):  # what only one side read
        grams[side].sums.clear()

    def tensors_of(name: str, share: float) -> Tensor:
        if name not in along:
            return plain(name, share)
        base, expert, of_base, of_expert = rows.of(name, along[name][0].into.device)
        return kfac_mean(base, expert, along[name], of_base, of_expert, rows.odds[share])

    return tensors_of


def _regmean_tensors(base: Checkpoint, expert: Checkpoint, grams: Mapping[str, Grams]) -> TensorsOf:
    line = _on_line(base, expert)

    def tensors_of(name: str, share: float) -> Tensor:
        if name not in grams[BASE].sums or name not in grams[EXPERT].sums:
            return line(name, share)
        of_base, of_expert = grams[BASE].mean(name), grams[EXPERT].mean(name)
        device = of_base[0].device
        return regmean(base.tensor(name).to(device), expert.tensor(name).to(device), of_base, of_expert, share)

    return tensors_of


def _on_line(base: Checkpoint, expert: Checkpoint) -> TensorsOf:
    def tensors_of(name: str, share: float) -> Tensor:
        ours = base.tensor(name)
        return torch.lerp(ours.float(), expert.tensor(name).float(), share) if ours.is_floating_point() else ours

    return tensors_of


def _by_layer(names: Sequence[str]) -> dict[int | None, list[str]]:
    """Return tensor names by layer, those outside the layers by None; in the order of the model."""
    found: dict[int | None, list[str]] = {None: []}
    for name in names:
        found.setdefault(split_name(name)[1], []).append(name)
    return found


def _loss(batch: Sequence[Example], loglikelihoods: Tensor) -> Tensor:
    return torch.stack([*task_losses(batch, loglikelihoods).values()]).sum()
