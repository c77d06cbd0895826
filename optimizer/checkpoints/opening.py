"""From a folder or a hub id to a checkpoint: opened by its headers and mapped, never copied.

A checkpoint is a folder of safetensors with its config, or an adapter on the base: plain LoRA, or folded by peft.
Nothing of a folder is executed and nothing is downloaded.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path, PurePath
from typing import Any

import torch

from evals.documents import checked_path
from optimizer.checkpoints.checkpoint import EMBEDDINGS, HEADS, TOKEN_ROWS, Checkpoint, Gather
from optimizer.checkpoints.configs import LAYER_COUNT_KEYS, checked_config, listed, shown
from optimizer.checkpoints.contents import Content, content_of
from optimizer.checkpoints.gguf import dequantised, gguf_in
from optimizer.checkpoints.headers import Entry, Header, read_header, read_json
from optimizer.checkpoints.hub import HUB_ID, cached
from optimizer.checkpoints.lora import CONFIG_FILE as ADAPTER_CONFIG_FILE
from optimizer.checkpoints.lora import WEIGHTS_FILE as ADAPTER_WEIGHTS_FILE
from optimizer.checkpoints.lora import is_plain, read_adapter
from optimizer.checkpoints.peft_fold import fold_by_peft
from optimizer.checkpoints.tensor_file import INDEX_FILE, WEIGHTS_FILE
from optimizer.checkpoints.urls import copy_of, is_url, place_of, url_problem
from optimizer.checkpoints.vocabulary import match_rows
from optimizer.errors import CheckpointError
from optimizer.masking import redacted

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
LAYER_OF = re.compile(r"(?:^|\.)([0-9]+)\.")
MOST_NEIGHBOURS = 10_000  # folders looked at for a name near a wrong one


def open_checkpoint(source: str | Path, *, base: Checkpoint | None = None) -> Checkpoint:
    """Open a checkpoint by its headers.

    Args:
        source: a folder, a GGUF file, a hub id whose files are in the local hub cache, or a URL whose are copied.
        base: for an expert, the checkpoint it was made from: an adapter stands on it, and the rows of other
            tokens are matched to its tokens by the two tokenizer.json.

    Raises:
        CheckpointError: the folder is missing, torn, unsafe or contradicts its config, or lacks a base's token.
    """
    folder = folder_of(str(source))
    if (folder / ADAPTER_CONFIG_FILE).is_file():
        if base is None:
            raise CheckpointError(f"{folder} is an adapter: it can be an expert, not a base")
        return _open_adapter(str(source), folder, base)
    config = checked_config(folder)
    entries, headers = _read_entries(folder)
    if not any(entry.bytes for entry in entries.values()):
        raise CheckpointError(f"{folder} holds no numbers: a model has tensors")
    contents = {file: content_of(file, header) for file, header in headers.items()}
    contents[folder / "config.json"] = content_of(folder / "config.json")
    names = _fingerprint(contents), _dated(contents)
    checkpoint = Checkpoint(str(source), folder, config, *names, entries, contents, {})
    checkpoint = _without_tied_head(checkpoint)
    return checkpoint if base is None else _with_rows_of(base, checkpoint)


def folder_of(source: str) -> Path:
    """Find a checkpoint's folder: the path itself, where the local hub cache has it, or the copy of a URL's.

    Raises:
        CheckpointError: there is none.
    """
    if is_url(source):
        if problem := url_problem(source):
            raise CheckpointError(f"{problem}; given {redacted(source)}")
        if (copy := copy_of(source)) is None:
            raise CheckpointError(
                f"there is no copy of {source} on this machine; its safetensors, config and tokenizer would be copied "
                f"to {place_of(source)}: give --download to check or search"
            )
        return copy
    folder = checked_path(source, error=CheckpointError)
    try:
        if (quantised := gguf_in(folder)) is not None:
            return dequantised(quantised.absolute()).resolve()
        if folder.is_dir():
            return folder.resolve()
        if folder.exists():
            raise CheckpointError(
                f"a checkpoint is a folder, a GGUF file, or a hub id such as org/model; {folder} is another file"
            )
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror}") from error
    if source.startswith((".", "/", "~")) or not HUB_ID.fullmatch(source):
        raise CheckpointError(f"a checkpoint is a folder, or a hub id such as org/model; {_missing(folder)}")
    found = cached(source)
    if found is None:
        raise CheckpointError(
            f"{_missing(folder)}, and {source!r} is not in the local hub cache; for a hub model give --download to "
            f"check or search, or run `hf download {source}`"
        )
    return found


def _missing(folder: Path) -> str:
    """Say that there is no such folder, and what lies in the last one of its path that there is."""
    above = next((parent for parent in folder.absolute().parents if parent.is_dir()), Path("/"))
    wanted = folder.absolute().relative_to(above).parts[0]
    with suppress(OSError):
        there = sorted(entry.name for entry in islice(above.iterdir(), MOST_NEIGHBOURS) if entry.is_dir())
        near = difflib.get_close_matches(wanted, there, n=3, cutoff=0.5)
        if near:
            return f"there is no folder {folder}; in {above} there is {listed(near)}"
    return f"there is no folder {folder}"


def _read_entries(folder: Path) -> tuple[dict[str, Entry], dict[Path, Header]]:
    """Return all tensors of a folder, and the header of each of its files."""
    if (folder / WEIGHTS_FILE).exists() or (folder / WEIGHTS_FILE).is_symlink():
        file = _inside(folder, WEIGHTS_FILE, str(folder))
        header = read_header(file)
        return dict(header.entries), {file: header}
    if not (folder / INDEX_FILE).is_file():
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        found = f"; {pickles[0]} is a pickle, which can run code when read: convert it" if pickles else ""
        raise CheckpointError(f"{folder} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}{found}")
    return _read_sharded(folder, read_json(folder / INDEX_FILE, unique=True))


def _read_sharded(folder: Path, index: Mapping[str, Any]) -> tuple[dict[str, Entry], dict[Path, Header]]:
    index_file = folder / INDEX_FILE
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index_file} must have a weight_map from tensor names to file names")
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        shards.setdefault(shard, set()).add(name)
    files = {shard: _inside(folder, shard, f"{index_file}, key {min(names):.80}") for shard, names in shards.items()}
    entries: dict[str, Entry] = {}
    headers: dict[Path, Header] = {}
    for shard, file in sorted(files.items()):
        header, names = read_header(file), shards[shard]
        if names != set(header.entries):
            odd = sorted(names ^ set(header.entries))
            raise CheckpointError(f"{index_file} and {file} disagree about {listed(odd)}")
        entries |= header.entries
        headers[file] = header
    return entries, headers


def _inside(folder: Path, name: str, what: str) -> Path:
    """Return the path of a file of a folder; links may lead only to the blobs of the same hub snapshot."""
    file = checked_path(folder / name, where=what, error=CheckpointError)
    roots = [folder, folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [folder]
    plain = PurePath(name).name == name and name.endswith(".safetensors") and "\\" not in name
    try:
        if not plain or not any(file.resolve().is_relative_to(root) for root in roots):
            raise CheckpointError(f"{what}: {shown(name)} is not a safetensors file inside the folder; refused")
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; download or copy it again")
    except (OSError, RuntimeError) as error:  # a link that leads to itself
        raise CheckpointError(f"{what}: {shown(name)} cannot be followed ({error})") from error
    return file


def _without_tied_head(checkpoint: Checkpoint) -> Checkpoint:
    """Drop a stored copy of a tied head, and require that config and tensors agree about tying and depth."""
    tied = checkpoint.config.get("tie_word_embeddings", _text_config(checkpoint.config).get("tie_word_embeddings"))
    heads = [name for name in checkpoint.names if name.endswith(HEADS)]
    embeddings = [name for name in checkpoint.names if name.endswith(EMBEDDINGS)]
    _require_depth(checkpoint)
    if tied is False and embeddings and not heads:
        raise CheckpointError(f"{checkpoint.folder}: tie_word_embeddings is false, but no tensor is the head")
    if not tied or not heads or not embeddings:
        return checkpoint
    unmapped = checkpoint.read_anew()
    if not torch.equal(unmapped.tensor(heads[0]), unmapped.tensor(embeddings[0])):
        raise CheckpointError(
            f"{checkpoint.folder}: tie_word_embeddings is true, but {heads[0]} differs from {embeddings[0]}; "
            "set it to false in config.json to keep the head"
        )
    kept = {name: entry for name, entry in checkpoint.entries.items() if name != heads[0]}
    return replace(checkpoint, entries=kept)


def _with_rows_of(base: Checkpoint, expert: Checkpoint) -> Checkpoint:
    """Give an expert with the rows of its embeddings and head in the base's order, none more and none less."""
    names = [name for name in base.names if name.endswith(TOKEN_ROWS) and name in expert.entries]
    names = [name for name in names if any(base.shape(name)[:1]) and any(expert.shape(name)[:1])]
    if not names:
        return expert
    rows, given = base.shape(names[0])[0], expert.shape(names[0])[0]
    index = match_rows(base.folder, expert.folder, rows=rows, given=given)
    if index is None:
        return expert
    names = [name for name in names if (base.shape(name)[0], expert.shape(name)[0]) == (rows, given)]
    stored = {name: expert.entries[name] for name in names}
    shown = {
        name: replace(entry, shape=(rows, *entry.shape[1:]), bytes=entry.bytes // given * rows)
        for name, entry in stored.items()
    }
    is_start = rows <= given and index.equal(torch.arange(rows))
    gathers = {} if is_start else {name: Gather(stored[name], index, base.entries[name]) for name in names}
    order = hashlib.sha256(index.numpy().tobytes()).hexdigest()[:16]
    return replace(
        expert,
        fingerprint=_fingerprint({}, expert.fingerprint, order),
        dated=_hashed([(expert.dated, order)]),
        is_matched=True,
        left_out=given - int((index >= 0).sum()),
        entries={**expert.entries, **shown},
        gathers=gathers,
    )


def _require_depth(checkpoint: Checkpoint) -> None:
    config = _text_config(checkpoint.config)
    layers = {int(match[1]) for name in checkpoint.names if (match := LAYER_OF.search(name))}
    depth = max(layers, default=-1) + 1
    if depth > len(checkpoint.names):
        raise CheckpointError(f"{checkpoint.folder}: {len(checkpoint.names)} tensors cannot be {shown(depth)} layers")
    for key in LAYER_COUNT_KEYS:
        if layers and key in config and config[key] != depth:
            raise CheckpointError(
                f"{checkpoint.folder}: config.json says {key}={shown(config[key])}, the tensors have {depth} layers"
            )


def _open_adapter(source: str, folder: Path, base: Checkpoint) -> Checkpoint:
    plain = is_plain(folder)
    deltas = read_adapter(folder, {name: base.shape(name) for name in base.names}) if plain else {}
    contents = {file: content_of(file) for file in (folder / ADAPTER_CONFIG_FILE, folder / ADAPTER_WEIGHTS_FILE)}
    fingerprint, dated = _fingerprint(contents, base.fingerprint), _dated(contents, (base.folder.name, base.dated))
    entries = base.entries
    if not plain:
        folded = fold_by_peft(folder, base, key=dated)
        header = read_header(folded)
        entries, contents[folded] = header.entries, content_of(folded, header)
    contents = {**base.contents, **contents}
    return Checkpoint(source, folder, base.config, fingerprint, dated, entries, contents, deltas, is_adapter=True)


def _fingerprint(contents: Mapping[Path, Content], *others: str) -> str:
    return _hashed(
        [*((file.name, content.size, content.digest) for file, content in sorted(contents.items())), *others]
    )


def _dated(contents: Mapping[Path, Content], *others: tuple[str, str]) -> str:
    facts = [(file.name, *content.stamp[2:], content.header) for file, content in sorted(contents.items())]
    return _hashed([*facts, *others])


def _hashed(facts: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the language model's part of a config; multimodal ones nest it."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config
