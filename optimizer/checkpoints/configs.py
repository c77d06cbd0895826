"""A folder's config and tokenizer as transformers makes them, where whatever it objects to becomes our error.

Their files are read by our own guarded reader first: small, regular, JSON. Asked by `compare` when two models are
compared, by `resident` for the model itself, and for the tokenizer by `check` and by each worker.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.documents import LARGEST
from optimizer.checkpoints.headers import read_json
from optimizer.checkpoints.vocabulary import LARGEST as LARGEST_VOCABULARY
from optimizer.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

CONFIG_FILE = "config.json"
SETTINGS = (CONFIG_FILE, "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
READ_AS_TEXT = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab")  # of what a tokenizer may read
# layers, heads, experts, labels, or a head's width: transformers makes an object or number of each before it looks
MOST_OF_A_KIND = 100_000
MOST_KEYS = 300  # of a config that is searched for the key at fault
LAYER_COUNT_KEYS = ("num_hidden_layers", "n_layer", "n_layers")
SHOWN = 5  # names listed in one message
IMPLEMENTATIONS = ("attn_implementation", "_attn_implementation", "experts_implementation")


def checked_config(folder: Path) -> dict[str, Any]:
    """Read a folder's config.json, which neither asks for code nor for objects without end.

    Raises:
        CheckpointError: it does, or cannot be read, or is of quantised weights.
    """
    file = folder / CONFIG_FILE
    config = read_json(file, unique=True)
    if "auto_map" in config:
        raise CheckpointError(f"{file} has auto_map: it asks for code of its own to be run, which is never done")
    if config.get("quantization_config"):
        raise CheckpointError(f"{file} has quantization_config: quantised weights cannot be merged; give the original")
    for part in _objects(config):
        for key, value in part.items():
            if key in IMPLEMENTATIONS and "/" in str(value):
                raise CheckpointError(
                    f"{file} has {key}={shown(value)}: it asks for code from the hub, which is never run"
                )
            most = _most(key)
            if most is not None and isinstance(value, int | float) and value > most:
                raise CheckpointError(f"{file}: {key} may be {most:,} at most; given {shown(value)}")
    return config


def _most(key: str) -> int | None:
    """Return the most that a key may say before transformers makes something of that size, if it does."""
    if key.startswith("num_") or key.endswith(("head_dim", "rotary_dim")):
        return MOST_OF_A_KIND
    return 1 if key in ("partial_rotary_factor", "rotary_pct") else None


def full_config(folder: Path) -> dict[str, Any]:
    """Return a config with its defaults filled in and old spellings (rope_theta, rope_scaling) brought to new ones.

    Raises:
        CheckpointError: as `model_config`.
    """
    config = model_config(folder)
    with refused(folder / CONFIG_FILE):
        full: dict[str, Any] = config.to_dict()
    return full


def model_config(folder: Path) -> PreTrainedConfig:
    """Read a folder's config as transformers does.

    Raises:
        CheckpointError: it cannot be read, is of no known kind, or transformers objects to a value, whose key is named.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    file, document = folder / CONFIG_FILE, checked_config(folder)
    kind = document.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise CheckpointError(f"{file} is not a model that transformers knows: model_type is {shown(kind)}")

    def attempt(settings: dict[str, Any]) -> object:
        return CONFIG_MAPPING[kind].from_dict(settings)

    with refused(file, document, attempt):
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return config


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a folder's tokenizer; no code of the folder is run.

    Raises:
        CheckpointError: a file of it cannot be read, is too large, or transformers objects to it.
    """
    from transformers import AutoTokenizer

    for file in sorted(folder.iterdir()):
        limit = LARGEST if file.name in SETTINGS else LARGEST_VOCABULARY
        if file.suffix in READ_AS_TEXT and file.is_file() and file.stat().st_size > limit:
            raise CheckpointError(f"{file} may hold {limit:,} bytes; given {file.stat().st_size:,}")
        if file.name in SETTINGS:
            read_json(file)
    model_config(folder)
    with refused(folder, what="its tokenizer"), silent():
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    return tokenizer


@contextmanager
def silent() -> Iterator[None]:
    """Keep from the terminal what a library of another language writes to it: the tokenizers echo keys of a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    ends = {}
    for number in (1, 2):
        with suppress(OSError):  # a program may run without one
            ends[number] = os.dup(number)
    try:
        with open(os.devnull, "wb") as nothing:
            for number in ends:
                os.dup2(nothing.fileno(), number)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, end in ends.items():
            os.dup2(end, number)
            os.close(end)


@contextmanager
def refused(
    file: Path,
    document: Mapping[str, Any] | None = None,
    attempt: Callable[[dict[str, Any]], object] | None = None,
    *,
    what: str = "",
) -> Iterator[None]:
    """Turn whatever comes out of transformers into a CheckpointError that names the file, and the key where it is one.

    Args:
        file: what transformers reads.
        document, attempt: its keys and values, and the same call for others: the key is at fault without which it goes.
        what: is made of the file.
    """
    try:
        yield
    except CheckpointError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of Rust, no Exception
            raise
        key = _key_at_fault(document, attempt) if document and attempt else None
        given = f": {key} is {shown(document[key])}" if document and key else f": {what}" if what else ""
        told = " ".join(str(error).split())
        raise CheckpointError(
            f"{file}{given}, which transformers cannot use ({type(error).__name__}: {told:.200}); "
            "restore the file as the model's maker gave it"
        ) from error


def shown(value: object) -> str:
    """Write a value for a message: its beginning where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}..."


def listed(names: list[str]) -> str:
    """Join names in a message: the first few, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(repr(name) for name in names[:SHOWN]) + more


def _key_at_fault(document: Mapping[str, Any], attempt: Callable[[dict[str, Any]], object]) -> str | None:
    if len(document) > MOST_KEYS:
        return None
    for key in document:
        try:
            attempt(copy.deepcopy({name: value for name, value in document.items() if name != key}))
        except Exception:  # another key is at fault
            continue
        return key
    return None


def _objects(value: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield a JSON object and those in it, at any depth that the reader lets through."""
    yield value
    for inner in value.values():
        if isinstance(inner, dict):
            yield from _objects(inner)
