"""Checkpoints on disk: the base and the experts, opened by their headers and mapped, never copied.

A checkpoint is a folder of safetensors with its config, or an adapter on the base. `merge` reads its tensors;
`compare` says why two checkpoints cannot be merged. Nothing of a folder is executed and nothing is downloaded.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from evals.documents import checked_path
from optimizer.checkpoints.configs import checked_config, full_config, shown
from optimizer.checkpoints.contents import Content, content_of, full_digest, still_holds
from optimizer.checkpoints.headers import Entry, Header, read_header, read_json
from optimizer.checkpoints.lora import CONFIG_FILE as ADAPTER_CONFIG_FILE
from optimizer.checkpoints.lora import WEIGHTS_FILE as ADAPTER_WEIGHTS_FILE
from optimizer.checkpoints.lora import LowRank, is_plain, read_adapter
from optimizer.checkpoints.peft_fold import fold_by_peft
from optimizer.checkpoints.tensor_file import INDEX_FILE, WEIGHTS_FILE
from optimizer.checkpoints.vocabulary import match_rows, tokenizer_mismatches
from optimizer.errors import CheckpointError

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
HEADS = ("lm_head.weight", "embed_out.weight")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight")
TOKEN_ROWS = (*EMBEDDINGS, *HEADS, "lm_head.bias")  # a row for each token
LAYER_COUNT_KEYS = ("num_hidden_layers", "n_layer", "n_layers")
LAYER_OF = re.compile(r"(?:^|\.)([0-9]+)\.")
DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
# Config keys that may differ: they describe training, saving or generation, not what the tensors mean.
FREE_CONFIG_KEYS = {
    "architectures", "dtype", "initializer_range", "pad_token_id", "pretraining_tp", "problem_type", "return_dict",
    "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
MOST_NEIGHBOURS = 10_000  # folders looked at for a name near a wrong one
SHOWN = 5  # names listed in one message


@dataclass(frozen=True, slots=True)
class Gather:
    """Rows in the base's order: those of a stored tensor by index, the base's own where the index is -1."""

    stored: Entry
    index: torch.Tensor  # (rows,)
    own: Entry

    def read(self) -> torch.Tensor:
        """Read and gather them, in the stored dtype and in memory of their own."""
        rows = _read(self.stored).index_select(0, self.index.clamp(min=0))
        kept = self.index < 0
        rows[kept] = _read(self.own)[kept].to(rows.dtype)
        return rows


@dataclass(frozen=True)
class Checkpoint:
    """One model on disk.

    The embeddings and the head of an expert with other tokens than its base show the base's rows, matched by token:
    a merge keeps the base's vocabulary and tokenizer. Where the ids coincide that is a part of the mapped tensor.

    Attributes:
        source: what the user gave: a folder or a hub id.
        folder: where it lies; for an adapter, the adapter's folder.
        config: config.json; for an adapter, the base's.
        is_adapter: it is an adapter on the base.
        is_matched: its tokens or rows are other than the base's it was opened on, and were matched to them.
        left_out: how many of its rows belong to no row of that base.
    """

    source: str
    folder: Path
    config: Mapping[str, Any]
    fingerprint: str  # 16 hex digits over names, sizes and content of its files; of each tensor a block is read
    dated: str  # the same as earlier versions stored it: with the files' times, without the tensors' content
    _entries: Mapping[str, Entry] = field(repr=False)
    _contents: dict[Path, Content] = field(repr=False)  # as last looked at, the base's too
    _deltas: Mapping[str, LowRank] = field(repr=False)
    _is_mapped: bool = field(default=True, repr=False)
    is_adapter: bool = False
    is_matched: bool = False
    left_out: int = 0
    _gathers: Mapping[str, Gather] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, source: str | Path, *, base: Checkpoint | None = None) -> Checkpoint:
        """Open a checkpoint by its headers.

        Args:
            source: a folder, or a hub id whose files are in the local hub cache.
            base: for an expert, the checkpoint it was made from: an adapter stands on it, and the rows of other
                tokens are matched to its tokens by the two tokenizer.json.

        Raises:
            CheckpointError: the folder is missing, torn, unsafe or contradicts its config, or lacks a base's token.
        """
        folder = _folder_of(str(source))
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
        checkpoint = cls(str(source), folder, config, *names, entries, contents, {})
        checkpoint = _without_tied_head(checkpoint)
        return checkpoint if base is None else _with_rows_of(base, checkpoint)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted; a head tied to the embeddings is not among them."""
        return tuple(sorted(self._entries))

    @property
    def own_bytes(self) -> int:
        """Size in bytes of what it maps beside its base: of an adapter not yet folded, only its own file."""
        return (self.folder / ADAPTER_WEIGHTS_FILE).stat().st_size if self._deltas else self.bytes

    @property
    def bytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(entry.bytes for entry in self._entries.values())

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self._entries[name].dtype]

    def size(self, name: str) -> int:
        """Size of one tensor in bytes."""
        return self._entries[name].bytes

    def file(self, name: str) -> Path:
        """The file that holds a tensor (of an adapter: the base's)."""
        return self._entries[name].file

    def kind(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Safetensors dtype code and shape of one tensor."""
        return self._entries[name].dtype, self._entries[name].shape

    def read_anew(self) -> Checkpoint:
        """The same checkpoint, whose tensors are read from the file each time: they take memory only while in use."""
        return replace(self, _is_mapped=False)

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor in its stored dtype: mapped, so not to be written to; of a plain adapter, folded anew."""
        tensor = self._mapped[name] if self._is_mapped else self._read(name)
        return self._deltas[name].folded_into(tensor) if name in self._deltas else tensor

    def is_known_as(self, fingerprint: object) -> bool:
        """Whether a stored fingerprint is of these very files, also one of an earlier run, with their times in it."""
        return fingerprint in (self.fingerprint, self.dated)

    def full_digests(self) -> dict[Path, str]:
        """The sha256 of each of its files, of an adapter also of its base's, every byte read."""
        return {file: full_digest(file) for file in sorted(self._contents)}

    def require_unchanged(self) -> None:
        """Raise if a file holds something else than when it was opened; one touched or copied back is as good."""
        for file, known in self._contents.items():
            self._contents[file] = still_holds(file, known)

    @cached_property
    def _mapped(self) -> dict[str, torch.Tensor]:
        # asked for once: safetensors keeps 64 bytes of every get_tensor for good
        maps = {file: _map(file) for file in {entry.file for entry in self._entries.values()}}
        mapped = {n: maps[e.file].get_tensor(n) for n, e in self._entries.items() if n not in self._gathers}
        shown = {name: tensor[: self.shape(name)[0]] if tensor.dim() else tensor for name, tensor in mapped.items()}
        return shown | {name: gather.read() for name, gather in self._gathers.items()}

    def _read(self, name: str) -> torch.Tensor:
        return self._gathers[name].read() if name in self._gathers else _read(self._entries[name])


def _map(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be mapped ({error}); download or copy it again") from error


def require_finite(checkpoint: Checkpoint) -> None:
    """Read every tensor once and raise CheckpointError naming the first that holds NaN or infinity."""
    for name in checkpoint.names:
        tensor = checkpoint.tensor(name)
        bad = count_nonfinite(tensor)
        if bad:
            where = f"{checkpoint.file(name)}, tensor {name}"
            raise CheckpointError(
                f"weights must be finite: {where} has {bad} of {tensor.numel()} values NaN or infinite"
            )


def count_nonfinite(tensor: torch.Tensor) -> int:
    """Count NaN and infinite values; one fast sum settles the usual case of none."""
    if not tensor.is_floating_point() or sum_is_finite(tensor):
        return 0
    return int(tensor.numel() - torch.isfinite(tensor).sum())


def sum_is_finite(tensor: torch.Tensor) -> bool:
    """True proves that every value is finite; false may also be a sum that overflowed."""
    # float16 holds no more than 65504; the sum of bfloat16 is added up in float32 and has its range
    return math.isfinite(float(tensor.sum(dtype=torch.float32 if tensor.dtype == torch.float16 else None)))


def compare(base: Checkpoint, expert: Checkpoint) -> list[str]:
    """Say, one plain sentence each, why an expert cannot be merged with a base; an empty list means it can."""
    return [
        *_tensor_mismatches(base, expert),
        *_config_mismatches(base, expert),
        *tokenizer_mismatches(base.folder, expert.folder, is_matched=expert.is_matched),
    ]


def require_compatible(base: Checkpoint, expert: Checkpoint) -> None:
    """Raise CheckpointError with all that `compare` finds."""
    mismatches = compare(base, expert)
    if mismatches:
        raise CheckpointError(
            f"expert {expert.source} does not fit base {base.source}:\n" + "\n".join(f"- {m}" for m in mismatches)
        )


# Opening


def _folder_of(source: str) -> Path:
    folder = checked_path(source, error=CheckpointError)
    try:
        if folder.is_dir():
            return folder.resolve()
        if folder.exists():
            raise CheckpointError(f"a checkpoint is a folder, or a hub id such as org/model; {folder} is a file")
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror}") from error
    if source.startswith((".", "/", "~")) or not HUB_ID.fullmatch(source):
        raise CheckpointError(f"a checkpoint is a folder, or a hub id such as org/model; {_missing(folder)}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, local_files_only=True)).resolve()
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{_missing(folder)}, and {source!r} is not in the local hub cache; for a hub model run "
            f"`hf download {source}`"
        ) from error


def _missing(folder: Path) -> str:
    """Say that there is no such folder, and what lies in the last one of its path that there is."""
    above = next((parent for parent in folder.absolute().parents if parent.is_dir()), Path("/"))
    wanted = folder.absolute().relative_to(above).parts[0]
    with suppress(OSError):
        there = sorted(entry.name for entry in islice(above.iterdir(), MOST_NEIGHBOURS) if entry.is_dir())
        near = difflib.get_close_matches(wanted, there, n=3, cutoff=0.5)
        if near:
            return f"there is no folder {folder}; in {above} there is {_listed(near)}"
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
            raise CheckpointError(f"{index_file} and {file} disagree about {_listed(odd)}")
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
    tied = _text_config(checkpoint.config).get("tie_word_embeddings", checkpoint.config.get("tie_word_embeddings"))
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
    kept = {name: entry for name, entry in checkpoint._entries.items() if name != heads[0]}
    return replace(checkpoint, _entries=kept)


def _with_rows_of(base: Checkpoint, expert: Checkpoint) -> Checkpoint:
    """Give an expert with the rows of its embeddings and head in the base's order, none more and none less."""
    names = [name for name in base.names if name.endswith(TOKEN_ROWS) and name in expert._entries]
    names = [name for name in names if any(base.shape(name)[:1]) and any(expert.shape(name)[:1])]
    if not names:
        return expert
    rows, given = base.shape(names[0])[0], expert.shape(names[0])[0]
    index = match_rows(base.folder, expert.folder, rows=rows, given=given)
    if index is None:
        return expert
    names = [name for name in names if (base.shape(name)[0], expert.shape(name)[0]) == (rows, given)]
    stored = {name: expert._entries[name] for name in names}
    shown = {
        name: replace(entry, shape=(rows, *entry.shape[1:]), bytes=entry.bytes // given * rows)
        for name, entry in stored.items()
    }
    is_start = rows <= given and index.equal(torch.arange(rows))
    gathers = {} if is_start else {name: Gather(stored[name], index, base._entries[name]) for name in names}
    order = hashlib.sha256(index.numpy().tobytes()).hexdigest()[:16]
    return replace(
        expert,
        fingerprint=_fingerprint({}, expert.fingerprint, order),
        dated=_hashed([(expert.dated, order)]),
        is_matched=True,
        left_out=given - int((index >= 0).sum()),
        _entries={**expert._entries, **shown},
        _gathers=gathers,
    )


def _read(entry: Entry) -> torch.Tensor:
    """Read one tensor into memory of its own."""
    if entry.bytes == 0:
        return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    try:
        numbers = np.fromfile(entry.file, dtype=np.uint8, count=entry.bytes, offset=entry.start)
    except OSError as error:
        raise CheckpointError(f"{entry.file} can no longer be read ({error.strerror}); restore it") from error
    if numbers.size < entry.bytes:
        raise CheckpointError(f"{entry.file} was cut short after it was opened; restore it")
    return torch.from_numpy(numbers).view(DTYPES[entry.dtype]).reshape(entry.shape)


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
    entries = base._entries
    if not plain:
        folded = fold_by_peft(folder, base, key=dated)
        header = read_header(folded)
        entries, contents[folded] = header.entries, content_of(folded, header)
    contents = {**base._contents, **contents}
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


# Comparing


def _tensor_mismatches(base: Checkpoint, expert: Checkpoint) -> Iterator[str]:
    missing, extra = sorted(set(base.names) - set(expert.names)), sorted(set(expert.names) - set(base.names))
    if missing:
        yield f"the expert lacks {_listed(missing)}"
    if extra:
        yield f"the expert has {_listed(extra)}, unknown to the base"
    shared = [name for name in base.names if name in expert._entries]
    unlike = [name for name in shared if base.shape(name) != expert.shape(name)]
    for name in unlike[:SHOWN]:
        shapes = f"{base.shape(name)} in {base.file(name)}, {expert.shape(name)} in {expert.file(name)}"
        hint = "; the vocabularies differ in size: rows are matched by tokenizer.json, which both folders must hold"
        hint = hint if name.endswith(TOKEN_ROWS) and not expert.is_matched else ""
        yield f"{name} has shape {shapes}{hint}"
    if len(unlike) > SHOWN:
        yield f"{len(unlike) - SHOWN} more tensors differ in shape"
    for name in shared:
        if base.dtype(name).is_floating_point != expert.dtype(name).is_floating_point:
            yield f"{name} is {base.dtype(name)} in the base and {expert.dtype(name)} in the expert"


def _config_mismatches(base: Checkpoint, expert: Checkpoint) -> Iterator[str]:
    if expert.config is base.config:
        return
    ours, theirs = full_config(base.folder), full_config(expert.folder)
    if expert.is_matched:
        ours, theirs = _without_size(ours), _without_size(theirs)
    for key in sorted(set(ours) | set(theirs)):
        if key.startswith("_") or key in FREE_CONFIG_KEYS or key.endswith("dropout"):
            continue
        if ours.get(key) != theirs.get(key):
            yield f"config.json: {key} is {ours.get(key)!r} in the base and {theirs.get(key)!r} in the expert"


def _without_size(config: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the number of tokens, also of a nested language model."""
    kept = {key: value for key, value in config.items() if key != "vocab_size"}
    return {k: _without_size(v) if k == "text_config" and isinstance(v, dict) else v for k, v in kept.items()}


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config; multimodal ones nest it."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(repr(name) for name in names[:SHOWN]) + more
