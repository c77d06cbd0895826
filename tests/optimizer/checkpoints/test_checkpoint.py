"""One checkpoint: what it says of itself, and that a file which changed is noticed."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from optimizer.checkpoints.checkpoint import require_finite
from optimizer.checkpoints.opening import open_checkpoint
from optimizer.errors import CheckpointError
from tests.optimizer.checkpoints.edits import EMBEDDINGS, UP, Q, adapter, cached, edit_json, edit_tensors, shard
from tests.pico import pico_llama


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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_found(value: float, base: Path) -> None:
    require_finite(open_checkpoint(base))
    edit_tensors(base, lambda tensors: tensors[Q].view(-1)[5:8].fill_(value))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors, tensor {Q} has 3 of 1024 values"):
        require_finite(open_checkpoint(base))
