"""Checkpoints that are torn, unsafe or do not fit are refused, by the name of the file and of the tensor."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from optimizer.checkpoints.checkpoint import require_finite
from optimizer.checkpoints.compare import compare, require_compatible
from optimizer.checkpoints.configs import load_tokenizer
from optimizer.checkpoints.headers import read_header
from optimizer.checkpoints.opening import open_checkpoint
from optimizer.checkpoints.resident import require_loadable
from optimizer.errors import CheckpointError
from tests.pico import pico_expert, pico_llama

UP = "model.layers.0.mlp.up_proj.weight"
Q = "model.layers.1.self_attn.q_proj.weight"
EMBEDDINGS = "model.embed_tokens.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return pico_llama(tmp_path / "base")


@pytest.fixture
def expert(base: Path, tmp_path: Path) -> Path:
    return pico_expert(base, tmp_path / "expert")


def edit_json(file: Path, **changes: object) -> None:
    content = json.loads(file.read_text())
    content.update(changes)
    file.write_text(json.dumps(content))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def shard(folder: Path) -> dict[str, str]:
    """Split a folder's file in two with an index, and return the weight map."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {name: f"model-0000{1 + (i >= 9)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def safetensors(file: Path, header: object, payload: bytes = b"\0" * 8, *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + payload)
    return file


def test_a_checkpoint_is_described_by_its_headers(base: Path) -> None:
    checkpoint = open_checkpoint(base)
    tensors = load_file(base / "model.safetensors")
    assert checkpoint.names == tuple(sorted(tensors))
    assert checkpoint.bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert checkpoint.config["num_hidden_layers"] == 2
    assert checkpoint.folder == base.resolve()
    for name, tensor in tensors.items():
        assert (checkpoint.shape(name), checkpoint.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(checkpoint.tensor(name), tensor)


def test_shards_read_as_one(base: Path, tmp_path: Path) -> None:
    whole = open_checkpoint(pico_llama(tmp_path / "whole"))
    shard(base)
    sharded = open_checkpoint(base)
    assert sharded.names == whole.names
    assert all(torch.equal(sharded.tensor(name), whole.tensor(name)) for name in whole.names)


def test_a_fingerprint_is_of_the_content_and_not_of_times_or_places(base: Path, expert: Path, tmp_path: Path) -> None:
    one = open_checkpoint(base).fingerprint
    assert one == open_checkpoint(base).fingerprint
    os.utime(base / "model.safetensors", ns=(1, 1))
    assert one == open_checkpoint(shutil.copytree(base, tmp_path / "copy")).fingerprint
    on_base = open_checkpoint(adapter(tmp_path / "lora"), base=open_checkpoint(base))
    on_copy = open_checkpoint(
        shutil.copytree(tmp_path / "lora", tmp_path / "l"), base=open_checkpoint(tmp_path / "copy")
    )
    assert on_base.fingerprint == on_copy.fingerprint
    edit_json(base / "config.json", use_cache=False)
    assert len({one, open_checkpoint(base).fingerprint, open_checkpoint(expert).fingerprint, on_base.fingerprint}) == 4


@pytest.mark.parametrize("name", [UP, EMBEDDINGS, "model.norm.weight"])
def test_a_fingerprint_changes_with_any_tensor(name: str, base: Path) -> None:
    before = open_checkpoint(base).fingerprint
    edit_tensors(base, lambda tensors: tensors[name].add_(1))
    assert open_checkpoint(base).fingerprint != before


def test_a_file_touched_or_copied_back_in_use_is_as_good(base: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(base)
    os.utime(base / "model.safetensors", ns=(1, 1))
    os.utime(base / "config.json", ns=(1, 1))
    checkpoint.require_unchanged()
    shutil.copyfile(base / "model.safetensors", tmp_path / "kept")
    os.replace(tmp_path / "kept", base / "model.safetensors")
    checkpoint.require_unchanged()


def test_a_file_replaced_while_in_use_is_noticed(base: Path, expert: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(base)
    checkpoint.require_unchanged()
    before = checkpoint.tensor(UP).clone()
    kept = shutil.copyfile(base / "model.safetensors", tmp_path / "kept")
    os.replace(expert / "model.safetensors", base / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors changed after it was opened \(same size, other content"
    ):
        checkpoint.require_unchanged()
    assert torch.equal(checkpoint.tensor(UP), before)
    (base / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="can no longer be read"):
        checkpoint.require_unchanged()
    os.replace(kept, base / "model.safetensors")
    checkpoint.require_unchanged()
    os.truncate(base / "model.safetensors", 100)
    with pytest.raises(CheckpointError, match=r"model\.safetensors changed after it was opened \(size \d+ -> 100"):
        checkpoint.require_unchanged()


def test_a_full_look_gives_what_sha256sum_gives_and_finds_a_damaged_blob(base: Path, tmp_path: Path) -> None:
    snapshot = cached(base, tmp_path / "hub/models--org--pico")
    weights = snapshot / "model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    blob = weights.resolve()
    weights.unlink()
    weights.symlink_to(f"../../blobs/{blob.rename(blob.with_name(digest)).name}")
    assert open_checkpoint(snapshot).full_digests()[weights] == digest
    with weights.resolve().open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x01")
    with pytest.raises(CheckpointError, match=rf"model\.safetensors is damaged: the hub gave it sha256 {digest}"):
        open_checkpoint(snapshot).full_digests()


# Where a checkpoint may be


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("./no/such/folder", "there is no folder no/such/folder"),
        ("/no/such", "there is no folder /no/such"),
        ("a/b/c", "there is no folder a/b/c"),
        ("plain", "there is no folder plain"),
        ("-rf/x\n", "there is no folder -rf/x"),
        ("./bse", "there is no folder bse; in .* there is 'base'"),
        ("bse/x/y", "there is no folder bse/x/y; in .* there is 'base'"),
        ("base/config.json", "is a folder, or a hub id such as org/model; base/config.json is a file"),
        (
            "base/modle",
            r"no folder base/modle, and 'base/modle' is not in the local hub cache; .*`hf download base/modle`",
        ),
        ("~nobody-here/x", "no user of this machine has the home folder '~nobody-here/x'"),
        ("a\0b", "must not hold a NUL character"),
        ("x" * 5000, "may have 255 bytes in each name"),
        ("x/" * 5000, "4,095 in all"),
    ],
)
def test_a_source_is_a_folder_or_a_hub_id(source: str, words: str, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(base.parent)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(source)


def test_a_hub_id_is_looked_for_in_the_cache_only(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(CheckpointError, match=r"hf download org/pico"):
        open_checkpoint("org/pico")
    cached(base, tmp_path / "hub/models--org--pico")
    assert len(open_checkpoint("org/pico").names) == 20


def cached(base: Path, repository: Path) -> Path:
    """Lay a folder out as the hub cache does: links from a snapshot into blobs."""
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0" * 40)
    for i, file in enumerate(sorted(base.iterdir())):
        file.rename(repository / "blobs" / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    return snapshot


def test_links_may_lead_to_the_blobs_of_the_same_snapshot_only(base: Path, expert: Path, tmp_path: Path) -> None:
    snapshot = cached(base, tmp_path / "models--org--pico")
    assert len(open_checkpoint(snapshot).names) == 20
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(expert / "model.safetensors")
    with pytest.raises(CheckpointError, match="is not a safetensors file inside the folder"):
        open_checkpoint(snapshot)


@pytest.mark.parametrize("name", ["../expert/model.safetensors", "/etc/passwd", "..", "sub/a.safetensors", "a.bin"])
def test_an_index_stays_in_its_folder(name: str, base: Path, expert: Path) -> None:
    weight_map = shard(base)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {**weight_map, UP: name}}))
    with pytest.raises(
        CheckpointError, match=rf"index\.json, key {UP}: .* is not a safetensors file inside the folder"
    ):
        open_checkpoint(base)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a\0.safetensors", "must not hold a NUL"),
        ("a" * 5000 + ".safetensors", "may have 255 bytes in each name"),
        ("loop.safetensors", "cannot be followed"),
        ("pipe.safetensors", "is missing"),
        ("device.safetensors", "is not a safetensors file inside the folder"),
        ("\ud800.safetensors", "half of a surrogate pair"),
    ],
)
def test_a_shard_is_a_regular_file_with_a_name_that_can_be(name: str, words: str, base: Path) -> None:
    weight_map = shard(base)
    (base / "loop.safetensors").symlink_to("loop.safetensors")
    (base / "device.safetensors").symlink_to("/dev/zero")
    os.mkfifo(base / "pipe.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {**weight_map, UP: name}}))
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(base)


def test_an_index_and_its_shards_must_agree(base: Path) -> None:
    weight_map = shard(base)
    index = base / "model.safetensors.index.json"
    first, second = sorted(set(weight_map.values()))
    for content, words in [
        ({}, "must have a weight_map"),
        ({"weight_map": {UP: 3}}, "must have a weight_map"),
        ({"weight_map": {**weight_map, UP: second}}, "disagree about"),
        ({"weight_map": {**weight_map, "ghost": first}}, "disagree about 'ghost'"),
        ({"weight_map": {k: v for k, v in weight_map.items() if k != UP}}, f"disagree about '{UP}'"),
        ({"weight_map": {**weight_map, "ghost": "model-00003-of-00003.safetensors"}}, "is missing"),
        ([], "must hold a JSON object"),
        ({"weight_map": [[[]]] * 3}, "must have a weight_map"),
    ]:
        index.write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint(base)
    index.write_text("{")
    with pytest.raises(CheckpointError, match=r"index\.json: not JSON"):
        open_checkpoint(base)


# Torn and hostile files


@pytest.mark.parametrize("cut", [1, 5, 40_000])
def test_a_file_cut_short_says_so(cut: int, base: Path) -> None:
    file = base / "model.safetensors"
    os.truncate(file, file.stat().st_size - cut)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not .* cut short: .* download or copy it again"):
        open_checkpoint(base)


@pytest.mark.parametrize("size", [0, 4, 8, 100])
def test_a_file_cut_within_its_header_says_so(size: int, base: Path) -> None:
    os.truncate(base / "model.safetensors", size)
    with pytest.raises(CheckpointError, match="cut short"):
        open_checkpoint(base)


def test_bytes_after_the_last_tensor_are_refused(base: Path) -> None:
    with (base / "model.safetensors").open("ab") as stream:
        stream.write(b"more")
    with pytest.raises(CheckpointError, match="4 bytes follow its last tensor"):
        open_checkpoint(base)


def test_a_git_lfs_pointer_is_recognised(base: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
    (base / "model.safetensors").write_text(pointer)
    with pytest.raises(CheckpointError, match="git lfs pull"):
        open_checkpoint(base)


def tensor(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HOSTILE: dict[str, tuple[Any, str]] = {
    "not utf-8": (b"\xff\xfe", "not JSON"),
    "not json": (b"{", "not JSON"),
    "deep": (b'{"a":' + b"[" * 100_000, "lie deeper"),
    "a list": ([], "not a JSON object"),
    "blanks first": (b' {"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "not a JSON object"),
    "metadata number": (
        {"__metadata__": {"a": 1}, "a": tensor()},
        r"__metadata__ must hold texts by name; given \{'a': 1",
    ),
    "metadata text": ({"__metadata__": "pt", "a": tensor()}, "__metadata__ must hold texts by name; given 'pt'"),
    "long number": (b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,8]}}' % (b"9" * 5000), "may have 300 digits"),
    "large number": ({"a": tensor(shape=[10**250] * 1000)}, "whole numbers of 63 bits"),
    "many dimensions": ({"a": tensor(shape=[2**62] * 500_000)}, "500,000 dimensions, the limit is 32"),
    "long name": ({"a" * 5000: tensor()}, "a tensor's name may have 500 characters; given 'aaaa"),
    "no name": ({"": tensor()}, "a tensor's name may have 500 characters"),
    "half a character": (b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "half of a surrogate pair"),
    "duplicate": (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{}}', "key 'a' stands twice"),
    "no shape": ({"a": {"dtype": "F32"}}, "'a' needs exactly"),
    "a number": ({"a": 3}, "'a' needs exactly"),
    "unknown dtype": ({"a": tensor("F4")}, "'a' is of dtype 'F4'"),
    "dtype list": ({"a": tensor([])}, "'a' is of dtype"),
    "negative": ({"a": tensor(shape=[-2])}, "whole numbers"),
    "float shape": ({"a": tensor(shape=[2.0])}, "whole numbers"),
    "bool shape": ({"a": tensor(shape=[True])}, "whole numbers"),
    "overflow": ({"a": tensor(shape=[2**62, 8])}, "do not hold shape"),
    "three offsets": ({"a": tensor(offsets=[0, 4, 8])}, "do not hold shape"),
    "backwards": ({"a": tensor(offsets=[8, 0])}, "do not hold shape"),
    "hole": ({"a": tensor("F32", [1], [4, 8])}, "'a' leaves a hole"),
    "overlap": ({"a": tensor("F32", [1], [0, 4]), "b": tensor("U8", [6], [2, 8])}, "'b' overlaps"),
    "beyond": ({"a": tensor("F32", [4], [0, 16])}, "cut short"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_header_that_lies_is_refused(case: str, tmp_path: Path) -> None:
    header, words = HOSTILE[case]
    file = safetensors(tmp_path / "x.safetensors", header)
    with pytest.raises(CheckpointError, match=words) as caught:
        read_header(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("size", "words"), [(0, "not a JSON object"), (99_000_000, "limit"), (2**40, "limit"), (999, "cut")]
)
def test_a_header_length_that_lies_is_refused(size: int, words: str, tmp_path: Path) -> None:
    file = safetensors(tmp_path / "x.safetensors", {"a": tensor()}, length=size)
    with pytest.raises(CheckpointError, match=words):
        read_header(file)


def test_an_honest_header_is_read(tmp_path: Path) -> None:
    file = safetensors(
        tmp_path / "x.safetensors", {"__metadata__": {"a": "b"}, "e": tensor("U8", [0], [0, 0]), "a": tensor()}
    )
    entries = read_header(file).entries
    assert {name: (entry.shape, entry.bytes) for name, entry in entries.items()} == {"e": ((0,), 0), "a": ((2,), 8)}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_not_read(name: str, base: Path) -> None:
    (base / "model.safetensors").rename(base / name)
    with pytest.raises(CheckpointError, match=f"{name} is a pickle"):
        open_checkpoint(base)


# Configs


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


# Finiteness


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_found(value: float, base: Path) -> None:
    require_finite(open_checkpoint(base))
    edit_tensors(base, lambda tensors: tensors[Q].view(-1)[5:8].fill_(value))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors, tensor {Q} has 3 of 1024 values"):
        require_finite(open_checkpoint(base))


# Comparing


def test_an_expert_made_from_the_base_fits(base: Path, expert: Path) -> None:
    assert compare(open_checkpoint(base), open_checkpoint(expert)) == []
    require_compatible(open_checkpoint(base), open_checkpoint(expert))


def test_missing_unknown_and_misshapen_tensors_are_named(base: Path, expert: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[UP]
        tensors["model.layers.0.mlp.extra.weight"] = torch.zeros(2)
        tensors[Q] = torch.zeros(32, 16)
        tensors[EMBEDDINGS] = torch.zeros(260, 32)

    edit_tensors(expert, change)
    one, other = open_checkpoint(base), open_checkpoint(expert)
    text = "\n".join(compare(one, other))
    assert f"the expert lacks '{UP}'" in text
    assert "the expert has 'model.layers.0.mlp.extra.weight', unknown to the base" in text
    assert f"{Q} has shape (32, 32) in {base}/model.safetensors, (32, 16) in {expert}/model.safetensors" in text
    assert "(260, 32)" in text
    assert "vocabularies differ in size" in text
    with pytest.raises(CheckpointError, match=f"expert {expert} does not fit base {base}"):
        require_compatible(one, other)


@pytest.mark.parametrize(
    ("key", "value"), [("rms_norm_eps", 1e-5), ("num_key_value_heads", 4), ("hidden_act", "gelu"), ("rope_theta", 5e5)]
)
def test_config_keys_that_change_the_model_are_named(key: str, value: object, base: Path, expert: Path) -> None:
    content = json.loads((expert / "config.json").read_text())
    content.pop("rope_parameters" if key == "rope_theta" else "none", None)
    (expert / "config.json").write_text(json.dumps({**content, key: value}))
    found = compare(open_checkpoint(base), open_checkpoint(expert))
    assert len(found) == 1
    assert ("rope_parameters" if key == "rope_theta" else key) in found[0]


def test_configs_that_say_the_same_in_other_words_fit(base: Path, expert: Path) -> None:
    content = json.loads((expert / "config.json").read_text())
    theta = content.pop("rope_parameters")["rope_theta"]
    del content["attention_bias"]  # false by default
    content |= {"rope_theta": theta, "rope_scaling": None, "torch_dtype": "bfloat16", "transformers_version": "4.40.0"}
    (expert / "config.json").write_text(json.dumps(content))
    assert compare(open_checkpoint(base), open_checkpoint(expert)) == []


def test_a_model_type_that_is_not_known_is_refused(base: Path, expert: Path) -> None:
    edit_json(expert / "config.json", model_type="marvel")
    with pytest.raises(CheckpointError, match=r"expert/config\.json is not a model that transformers knows"):
        compare(open_checkpoint(base), open_checkpoint(expert))


def test_tokenizers_that_differ_are_named_by_their_first_tokens(base: Path, expert: Path) -> None:
    content = json.loads((expert / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    content["model"]["merges"] = [["a", "b"]]
    (expert / "tokenizer.json").write_text(json.dumps(content))
    edit_json(expert / "tokenizer_config.json", eos_token="<s>")
    text = "\n".join(compare(open_checkpoint(base), open_checkpoint(expert)))
    assert "2 tokens have other ids (base / expert): 'A' is" in text
    assert "the merges differ" in text
    assert "eos_token is '</s>' in the base and '<s>' in the expert" in text


def test_a_tokenizer_written_in_another_way_or_not_at_all_fits(base: Path, expert: Path) -> None:
    content = json.loads((expert / "tokenizer.json").read_text())
    (expert / "tokenizer.json").write_text(json.dumps(content, indent=7))
    assert compare(open_checkpoint(base), open_checkpoint(expert)) == []
    (expert / "tokenizer.json").unlink()
    assert compare(open_checkpoint(base), open_checkpoint(expert)) == []


# Adapters


def adapter(folder: Path, *, rank: int = 4, **config: object) -> Path:
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "bias": "none", "megatron_core": "megatron.core"}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "target_modules": ["q_proj"], **config}))
    generator = torch.Generator().manual_seed(5)
    factors = {
        "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight": torch.randn(rank, 32, generator=generator),
        "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight": torch.randn(32, rank, generator=generator),
    }
    save_file(factors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(("rslora", "scale"), [(False, 6 / 4), (True, 6 / 2)])
def test_an_adapter_is_the_base_plus_its_delta(rslora: bool, scale: float, base: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "lora", use_rslora=rslora)
    opened = open_checkpoint(base)
    expert = open_checkpoint(folder, base=opened)
    down, up = load_file(folder / "adapter_model.safetensors").values()
    wanted = (opened.tensor(Q).double() + scale * up.double() @ down.double()).bfloat16()
    assert torch.allclose(expert.tensor(Q).float(), wanted.float(), rtol=2**-7)
    assert torch.equal(expert.tensor(UP), opened.tensor(UP))
    assert expert.is_adapter
    assert not opened.is_adapter
    assert compare(opened, expert) == []
    assert expert.fingerprint != opened.fingerprint
    expert.require_unchanged()


def test_an_adapter_needs_its_base(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="can be an expert, not a base"):
        open_checkpoint(adapter(tmp_path / "lora"))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"init_lora_weights": "pissa"}, "changes the base itself"),
        ({"r": 8}, "do not fit its factors"),
        ({"rank_pattern": {"q_proj": 2}}, "rank 2 and shape"),
        ({"rank_pattern": {"q_proj": "4"}}, "r must be a whole number from 1 to 65,536"),
        ({"alpha_pattern": {"(": 2}}, "alpha_pattern must map regular expressions to numbers"),
        ({"rank_pattern": {r"((\w|\.)+)+x": 4}}, "rank_pattern: a pattern may repeat 8 times and no group"),
        ({"alpha_pattern": {".*" * 30: 4}}, "alpha_pattern: a pattern may repeat 8 times and no group"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern must map regular expressions to numbers"),
        ({"r": "4"}, "r must be a whole number from 1 to 65,536"),
        ({"lora_alpha": None}, "lora_alpha a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha a number"),
        ({"r": 10**250}, "r must be a whole number from 1 to 65,536"),
        ({"peft_type": ["LORA"]}, "knows no peft_type"),
        ({"use_dora": True, "r": 10**9}, "r may be 65,536 at most; given 1000000000"),
    ],
)
def test_an_adapter_that_does_not_fit_itself_is_refused(
    config: dict[str, object], words: str, base: Path, tmp_path: Path
) -> None:
    folder = adapter(tmp_path / "lora")
    edit_json(folder / "adapter_config.json", **config)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(folder, base=open_checkpoint(base))


def test_a_module_may_have_a_rank_and_an_alpha_of_its_own(base: Path, tmp_path: Path) -> None:
    opened, own = open_checkpoint(base), {r"layers\.1\..*q_proj": 12, "proj": 1}
    patterned = adapter(tmp_path / "own", rank=4, r=64, lora_alpha=7, rank_pattern={"q_proj": 4}, alpha_pattern=own)
    plain = adapter(tmp_path / "plain", rank=4, lora_alpha=12)
    one, other = (open_checkpoint(folder, base=opened) for folder in (patterned, plain))
    assert one.tensor(Q).equal(other.tensor(Q))
    assert not one.tensor(Q).equal(opened.tensor(Q))


def test_an_adapter_for_peft_says_what_to_install(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("optimizer.checkpoints.peft_fold.version", missing)
    with pytest.raises(CheckpointError, match=r"not plain LoRA, .* pip install 'mergefront\[adapters\]'"):
        open_checkpoint(adapter(tmp_path / "lora", use_dora=True), base=open_checkpoint(base))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("lora_A", "lora_magnitude_vector", "not a plain LoRA factor"),
        ("q_proj", "z_proj", "which the base does not have"),
        ("q_proj.lora_A", "k_proj.lora_A", "has no partner"),
    ],
)
def test_an_adapter_whose_tensors_do_not_pair_is_refused(
    old: str, new: str, words: str, base: Path, tmp_path: Path
) -> None:
    file = adapter(tmp_path / "lora") / "adapter_model.safetensors"
    save_file({name.replace(old, new): value for name, value in load_file(file).items()}, file)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(file.parent, base=open_checkpoint(base))
    file.unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is missing"):
        open_checkpoint(file.parent, base=open_checkpoint(base))


def test_keys_of_a_tokenizer_are_not_echoed_to_the_terminal(base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    content = json.loads((base / "tokenizer.json").read_text())
    content["added_tokens"] = [{**token, "spe" + "[" * 30_000: True} for token in content.get("added_tokens", [])]
    assert content["added_tokens"]
    (base / "tokenizer.json").write_text(json.dumps(content))
    with suppress(CheckpointError):
        load_tokenizer(base)
    print("still here")
    assert capfd.readouterr() == ("still here\n", "")
