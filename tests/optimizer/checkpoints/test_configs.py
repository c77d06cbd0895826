"""Configs and tokenizers: what transformers objects to is an error of ours that names file and key."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

import pytest

from optimizer.checkpoints.compare import compare
from optimizer.checkpoints.configs import load_tokenizer
from optimizer.checkpoints.opening import open_checkpoint
from optimizer.checkpoints.resident import require_loadable
from optimizer.errors import CheckpointError
from tests.optimizer.checkpoints.edits import EMBEDDINGS, edit_json, edit_tensors


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"auto_map": {"AutoModel": "x.py"}}, "auto_map"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"num_hidden_layers": 3}, "num_hidden_layers=3, the tensors have 2 layers"),
        ({"tie_word_embeddings": False}, "no tensor is the head"),
    ],
)
def test_a_config_that_asks_for_code_or_contradicts_the_tensors_is_refused(
    changes: dict[str, object], words: str, base: Path
) -> None:
    edit_json(base / "config.json", **changes)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(base)


def test_a_config_must_be_there(base: Path) -> None:
    (base / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        open_checkpoint(base)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{" * 100_000, "not JSON"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "lie deeper"),
        ('{"a": ' + "9" * 5000 + "}", "may have 300 digits"),
        ('{"a": 1e400}', "must fit 64 bits"),
        ('{"model_type": "llama", "model_type": "gpt2"}', "the key 'model_type' stands twice"),
        ('{"num_labels": 4611686018427387904}', "num_labels may be 100,000 at most"),
        ('{"text_config": {"num_experts": 1000000}}', "num_experts may be 100,000 at most"),
        ('{"head_dim": 1000000000}', "head_dim may be 100,000 at most"),
        (
            '{"rope_parameters": {"partial_rotary_factor": 1e9}}',
            "partial_rotary_factor may be 1 at most; given 1000000000.0",
        ),
        ('{"_attn_implementation": "someone/kernel"}', "asks for code from the hub"),
        ("[]", "must hold a JSON object"),
        (" " * 16_000_001, "may hold 16,000,000 bytes"),
        ("\udcff", "must be UTF-8"),
        (None, "must be a regular file; given a pipe"),
        (Path("/dev/zero"), "must be a regular file; given a device"),
        (Path("/usr"), "must be a regular file; given a folder"),
    ],
    ids=lambda value: str(value)[:30].encode("ascii", "replace").decode(),
)
def test_a_config_is_a_small_regular_file_of_plain_json(content: str | Path | None, words: str, base: Path) -> None:
    file = base / "config.json"
    file.unlink()
    if content is None:
        os.mkfifo(file)
    elif isinstance(content, Path):
        file.symlink_to(content)
    else:
        file.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(base)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_cache": "x"}, r"config\.json: use_cache is 'x', which transformers cannot use"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, which transformers cannot use"),
        ({"head_dim": 0}, "head_dim is 0, which transformers cannot use"),
        ({"id2label": 3}, "id2label is 3, which transformers cannot use"),
        ({"dtype": "x"}, "dtype is 'x', which transformers cannot use"),
        ({"hidden_act": "x"}, "hidden_act is 'x', which transformers cannot use"),
        ({"layer_types": 1e308}, "layer_types is 1e.308, which transformers cannot use"),
        ({"vocab_size": 10**250}, "vocab_size is 1000.*, which transformers cannot use"),
        ({"rope_parameters": {"rope_type": "x"}}, "rope_parameters is .*, which transformers cannot use"),
        ({"model_type": ["llama"]}, r"not a model that transformers knows: model_type is \['llama'\]"),
        ({"intermediate_size": 48}, "config and tensors of .* do not fit: .*mlp"),
        ({"model_type": "bert"}, "a base must be a causal language model|do not fit"),
    ],
    ids=str,
)
def test_whatever_transformers_objects_to_names_the_key(changes: dict[str, object], words: str, base: Path) -> None:
    edit_json(base / "config.json", **changes)
    with pytest.raises(CheckpointError, match=words):
        require_loadable(open_checkpoint(base))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", "{}", "its tokenizer, which transformers cannot use"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}', "its tokenizer, which"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json: not JSON"),
        ("tokenizer_config.json", '{"tokenizer_class": 3}', "its tokenizer, which transformers cannot use"),
        ("tokenizer_config.json", '{"added_tokens_decoder": 3}', "its tokenizer, which transformers cannot use"),
        ("tokenizer_config.json", " " * 16_000_001, r"tokenizer_config\.json may hold 16,000,000 bytes"),
        ("generation_config.json", "[" * 100_000, r"generation_config\.json: "),
        ("config.json", '{"model_type": "llama", "use_cache": "x"}', "use_cache is 'x'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_tokenizer_that_cannot_be_made_names_its_file(name: str, content: str, words: str, base: Path) -> None:
    load_tokenizer(base)
    (base / name).write_text(content)
    with pytest.raises(CheckpointError, match=words) as caught:
        load_tokenizer(base)
    assert str(base) in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [{"model": 3}, {"model": {"vocab": {"a": "1"}}}, {"model": {"vocab": [3]}}, {"added_tokens": [3]},
     {"added_tokens": [{"content": "a", "id": -1}]}, {"model": {"vocab": {"a": 10**250}}}],
    ids=str,
)  # fmt: skip
def test_a_tokenizer_with_odd_ids_is_refused_when_two_are_compared(
    changes: dict[str, object], base: Path, expert: Path
) -> None:
    edit_json(expert / "tokenizer.json", **changes)
    with pytest.raises(CheckpointError, match=r"expert/tokenizer\.json: "):
        compare(open_checkpoint(base), open_checkpoint(expert, base=open_checkpoint(base)))


def test_a_stored_copy_of_a_tied_head_is_left_out_and_a_head_of_its_own_is_refused(base: Path) -> None:
    names = open_checkpoint(base).names
    edit_tensors(base, lambda tensors: tensors.update({"lm_head.weight": tensors[EMBEDDINGS].clone()}))
    assert open_checkpoint(base).names == names
    edit_tensors(base, lambda tensors: tensors["lm_head.weight"].mul_(2))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        open_checkpoint(base)


def test_keys_of_a_tokenizer_are_not_echoed_to_the_terminal(base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    content = json.loads((base / "tokenizer.json").read_text())
    content["added_tokens"] = [{**token, "spe" + "[" * 30_000: True} for token in content.get("added_tokens", [])]
    assert content["added_tokens"]
    (base / "tokenizer.json").write_text(json.dumps(content))
    with suppress(CheckpointError):
        load_tokenizer(base)
    print("still here")
    assert capfd.readouterr() == ("still here\n", "")
