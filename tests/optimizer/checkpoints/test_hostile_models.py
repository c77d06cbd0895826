"""Model folders changed in many seeded ways: opening, check and loading end well or in our error, soon and small."""

from __future__ import annotations

import json
import random
import resource
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from transformers.utils import logging

from optimizer.checkpoints.checkpoint import require_finite
from optimizer.checkpoints.configs import load_tokenizer
from optimizer.checkpoints.resident import resident_model
from optimizer.errors import CheckpointError
from optimizer.search.plan import make_plan
from optimizer.study.schema import Study
from optimizer.study.study_file import read_study
from tests.optimizer.checkpoints.edits import adapter, shard
from tests.optimizer.small_study import write_study

pytestmark = pytest.mark.slow  # hundreds of crafted files

ROUNDS = 25  # of each kind
SECONDS = 10  # a case takes some hundredths of one
GROWTH = 400_000  # kB over all cases of a kind; what is imported is among them
ODD: list[Any] = [
    None, True, False, "", "x", "\0", "../../x", "x" * 3000, "\u202e", -1, 0, 1, 3, 1.5, -0.0, 1e308, float("nan"),
    float("inf"), 2**31, 2**62, 2**64, 10**250, [], {}, [1], ["x"] * 3, {"a": 1}, [0] * 5000, {"a": {"b": [None]}},
]  # fmt: skip
RAW = ["9" * 5000, "1e400", "[" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000, "NaN", "-0", '"\\ud800"', "", "\ufeff{}"]
KEYS = [
    "num_labels", "id2label", "layer_types", "rope_scaling", "text_config", "attn_implementation", "per_layer_config",
    "experts_implementation", "dtype", "torch_dtype", "quantization_config", "is_encoder_decoder", "model_type",
    "__metadata__", "weight_map", "model", "rank_pattern", "x",
]  # fmt: skip
KINDS = [
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "index",
    "header",
    "adapter",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("study")).parent


@pytest.fixture(autouse=True)
def _models_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("optimizer.search.plan._open_tasks", lambda plan: None)
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    yield
    logging.set_verbosity_warning()
    logging.enable_progress_bar()


@contextmanager
def within(seconds: float) -> Iterator[None]:
    def late(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_changed_at_random_ends_well_or_in_our_error(kind: str, folder: Path) -> None:
    study, file = study_with(kind, folder)
    whole = file.read_bytes()
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seen = []
    try:
        for seed in range(ROUNDS):
            file.write_bytes(changed(whole, random.Random(f"{kind} {seed}"), is_header=kind == "header"))
            with within(SECONDS):
                seen.append(problems(study, folder))
    finally:
        file.write_bytes(whole)
    assert problems(study, folder) == []
    assert any(seen), "the changes do not reach what is checked"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start < GROWTH


def study_with(kind: str, folder: Path) -> tuple[Study, Path]:
    """A study, and the file of its models to be changed."""
    base, more = folder / "base", ()
    if kind == "index" and not (base / "model.safetensors.index.json").exists():
        shard(base)
    if kind == "adapter":
        lora = folder / "lora"
        lora = lora if lora.exists() else adapter(lora)
        more = (f"models.experts.lora={lora}",)
        return read_study(folder / "study.yaml", more), lora / "adapter_config.json"
    weights = folder / "expert/model.safetensors"
    name = {"index": "model.safetensors.index.json"}.get(kind, kind)
    return read_study(folder / "study.yaml", more), weights if kind == "header" else base / name


def problems(study: Study, folder: Path) -> list[str]:
    """What check says of the models; where it says nothing, they can be read and the base can be loaded."""
    plan = make_plan(study)
    if not plan.problems:
        for model in plan.models.values():
            plan.attempt("finite", lambda model=model: require_finite(model))
        try:
            load_tokenizer(folder / "base")
        except CheckpointError as error:
            plan.problems.append(str(error))
    if not plan.problems:
        assert plan.base is not None
        resident_model(plan.base, dtype="auto", device="cpu")
    return plan.problems


def changed(content: bytes, chance: random.Random, *, is_header: bool) -> bytes:
    """The file with one change: to a value of its JSON, to its text, or to its bytes."""
    size = int.from_bytes(content[:8], "little") if is_header else len(content)
    text, payload = (content[8 : 8 + size], content[8 + size :]) if is_header else (content, b"")
    how: Callable[[bytes, random.Random], bytes] = chance.choice([_value, _value, _value, _value, _raw, _bytes])
    new = how(text, chance)
    return struct.pack("<Q", len(new)) + new + payload if is_header else new


def _value(text: bytes, chance: random.Random) -> bytes:
    document = json.loads(text)
    places = list(_places(document, 6))
    holder, key = chance.choice(places)
    if chance.random() < 0.3:
        holder, key = (
            document,
            chance.choice(KEYS),
        )
    if chance.random() < 0.15 and key in (holder if isinstance(holder, dict) else range(len(holder))):
        del holder[key]
    else:
        holder[key] = chance.choice(ODD)
    return json.dumps(document).encode()


def _places(value: Any, depth: int) -> Iterator[tuple[Any, Any]]:
    """Each place of a JSON value, of long ones some."""
    inner = list(value.items())[:30] if isinstance(value, dict) else list(enumerate(value))[:3]
    for key, part in inner:
        yield value, key
        if isinstance(part, dict | list) and depth:
            yield from _places(part, depth - 1)


def _raw(text: bytes, chance: random.Random) -> bytes:
    """A value replaced by JSON text that Python would not write, or a key doubled."""
    document = json.loads(text)
    key = chance.choice(list(document)[:40])
    if chance.random() < 0.2:
        return json.dumps(document)[:-1].encode() + f", {json.dumps(key)}: 3}}".encode()
    document[key] = "RAW"
    return json.dumps(document).replace('"RAW"', chance.choice(RAW)).encode("utf-8", "surrogatepass")


def _bytes(text: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(min(len(text), 4000))
    cut = chance.choice([0, 1, 7, 4000])
    return text[:at] + chance.randbytes(chance.choice([0, 1, 5])) + text[at + cut :]
