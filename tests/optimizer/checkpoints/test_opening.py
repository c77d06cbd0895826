"""Where a checkpoint may be: folders, hub ids, links and shards."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from optimizer.checkpoints.opening import open_checkpoint
from optimizer.errors import CheckpointError
from tests.optimizer.checkpoints.edits import UP, cached, shard


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
        (
            "base/config.json",
            "a folder, a GGUF file, or a hub id such as org/model; base/config.json is another file",
        ),
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
